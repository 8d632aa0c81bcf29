"""Time peers side by side: each in its own process, in turns, with malloc as it is and told to keep memory.

A script calls ``main`` with its peers. It is then started once a peer, with ``--worker PEER``: that process
prepares, runs a step to warm up, says what came out of it, and runs and times one step for each line that
it reads. A peer that this environment lacks is a command of another one, which does the same (``serve``).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from terminaltables import AsciiTable

Step = Callable[[], Any]
"""Runs one step and returns what is compared with other peers, in types that JSON knows."""
Peer = Callable[[argparse.Namespace], Step]
"""Prepares a step from the script's arguments, in a process of its own."""
Series = dict[str, list[float]]
"""Of each round: seconds on the clock ('wall') and of the CPU, the most memory in use until then ('GB')."""
# Read by glibc at process start: large blocks come from the heap, which is never given back.
KEEP_MEMORY = dict(GLIBC_TUNABLES='glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4611686018427387904')
MALLOC = {'malloc as it is': {}, 'malloc keeps memory': KEEP_MEMORY}


def out_parser(doc: str | None) -> argparse.ArgumentParser:
    """The flag of every script."""
    parser = argparse.ArgumentParser(description=(doc or '').partition('\n')[0])
    parser.add_argument('--out', type=out_file, metavar='FILE.json', help='write the numbers to this file')
    return parser


def common_parser(doc: str | None) -> argparse.ArgumentParser:
    """The flags of every script that times something in rounds."""
    parser = out_parser(doc)
    parser.add_argument('--rounds', type=positive, default=5, help='timed steps of each peer')
    parser.add_argument('--threads', type=positive, default=torch.get_num_threads(), help='of each process')
    return parser


def out_file(text: str) -> Path:
    """A flag's value: a file that can be written, before anything is measured; its folder is made."""
    try:
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        open(text, 'a').close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f'{error.filename!r} cannot be written: {error.strerror}') from None
    return Path(text)


def positive(text: str) -> int:
    """A flag's value: a number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no number from 1 on')
    return int(text)


def device(text: str) -> str:
    """A flag's value: 'cpu' or 'cuda', if this machine has it; CUDA_VISIBLE_DEVICES chooses a GPU."""
    if text not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'{text!r} is no device to measure; take cpu or cuda')
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f'{text!r} is no device of this machine: {problem}') from None
    return text


def main(parser: argparse.ArgumentParser, peers: dict[str, Peer], cases: Sequence[str],
         agree: Callable[[argparse.Namespace, dict[str, Any]], Iterable[str]],
         other: Callable[[argparse.Namespace, str], dict[str, list[str]]]) -> None:
    """Time the peers on each case and print times, ratios to the first peer, and how their results agree.

    Args:
        parser: from ``common_parser``, with the script's flags, ``--peers`` not among them.
        peers: by name; the first is what the others are compared with.
        cases: values of the flag ``--case``; a peer is prepared for one of them.
        agree: lines on how the results of a case agree, from the arguments and the peers' results by name;
            raises SystemExit where they do not.
        other: commands of further peers, by name, from the arguments and the case.
    """
    parser.add_argument('--case', nargs='+', choices=cases, default=cases)
    parser.add_argument('--peers', nargs='+', choices=list(peers), default=list(peers))
    parser.add_argument('--worker', choices=list(peers), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.case = args.case[0]
        return serve(lambda: peers[args.worker](args), args.threads)
    records, given = [], args.case
    for case in given:
        args.case, timed = case, {}
        own = [sys.executable, *sys.argv, '--case', case, '--worker']
        commands = {name: [*own, name] for name in args.peers} | other(args, case)
        for malloc, env in MALLOC.items() if args.device == 'cpu' else [('malloc as it is', {})]:
            timed[malloc], lines = _time_in_turns(commands, args, env, agree)
            base = next(iter(timed[malloc].values()))['wall']
            records += [dict(case=case, malloc=malloc, peer=name, **series, agree=lines,
                             times_as_fast=[a / b for a, b in zip(base, series['wall'])])
                        for name, series in timed[malloc].items()]
        print(_table(case, timed), *lines, '', sep='\n', flush=True)
    args.case = given
    write_json(args, records)


def serve(prepare: Callable[[], Step], threads: int) -> None:
    """Be the process of a peer."""
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    step = prepare()
    answer: Any = step()
    print(json.dumps(answer), file=channel, flush=True)
    for _ in sys.stdin:
        print(json.dumps(time_step(step)), file=channel, flush=True)


def time_step(step: Step) -> dict[str, float]:
    """What ``Series`` has, of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    measured = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
    if torch.cuda.is_initialized():
        measured['GB on the GPU'] = torch.cuda.max_memory_allocated() / 1e9
    else:
        measured['GB'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return measured


def serve_other(
    build: Callable[[dict[str, Any]], tuple[Any, Any]],
    steps: dict[str, Callable[[Any, Any, torch.autocast], Step]],
) -> None:
    """Be the process of a peer that lives in another environment, from the words of ``other_commands``.

    Args:
        build: model and batch from the weights, images and samples in the file.
        steps: 'test' and 'train', which prepare a step of that model and batch.
    """
    part, file, threads, device, *amp = sys.argv[1:]

    def prepare() -> Step:
        model, batch = build(torch.load(file))
        autocast = torch.autocast(device, torch.bfloat16, enabled=bool(amp))
        return steps[part](model.to(device), batch, autocast)

    serve(prepare, int(threads))


def _time_in_turns(
    commands: dict[str, list[str]], args: argparse.Namespace, env: dict[str, str],
    agree: Callable[[argparse.Namespace, dict[str, Any]], Iterable[str]],
) -> tuple[dict[str, Series], list[str]]:
    """What was measured in each round, by peer, and how their results agree."""
    threads = dict(OMP_NUM_THREADS=str(args.threads))
    errors = {name: tempfile.TemporaryFile('w+') for name in commands}
    workers = {
        name: subprocess.Popen(
            command, env=os.environ | threads | env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors[name])
        for name, command in commands.items()}
    lines = list(agree(args, {name: _answer(name, worker, errors[name]) for name, worker in workers.items()}))
    times: dict[str, Series] = {name: {} for name in commands}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            assert worker.stdin is not None
            try:
                print(file=worker.stdin, flush=True)
            except BrokenPipeError:
                pass  # it has died, which the answer tells
            for clock, value in _answer(name, worker, errors[name]).items():
                times[name].setdefault(clock, []).append(value)
    for worker in workers.values():
        worker.communicate()
    return times, lines


def _answer(name: str, worker: subprocess.Popen, errors: IO[str]) -> Any:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        status = worker.wait()
        errors.seek(0)
        said = [text.strip() for text in errors if text.strip()] or ['it said nothing']
        reason = 'killed, maybe for want of memory: give fewer --peers' if status == -9 else said[-1]
        raise SystemExit(f'error: {name} has stopped with {status}: {reason}')
    return json.loads(line)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times ``fast`` is faster than ``slow``, round by round: median (smallest to largest)."""
    each = [a / b for a, b in zip(slow, fast)]
    return f'{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})'


def _table(case: str, timed: dict[str, dict[str, Series]]) -> str:
    rows = [[case, 'seconds', *(f'{malloc}: median, ratio' for malloc in timed)]]
    for name, measured in next(iter(timed.values())).items():
        for i, clock in enumerate(measured):
            row = [name if i == 0 else '', clock]
            for times in timed.values():
                first, own = next(iter(times.values()))[clock], times[name][clock]
                row.append(f'{statistics.median(own):7.3f}  {ratios(first, own)}')
            rows.append(row)
    return AsciiTable(rows).table


def machine() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    cpu = platform.processor()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.partition(': ')[2] for line in lines if line.startswith('model name')), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), load=os.getloadavg(), gpu=gpu,
                torch=torch.__version__, python=platform.python_version(),
                date=time.strftime('%Y-%m-%d %H:%M'))


def write_json(args: argparse.Namespace, records: Sequence[dict[str, Any]]) -> None:
    """Write the records, the machine and the arguments to ``--out``, if that is given."""
    if args.out:
        options = {key: value if isinstance(value, list | int | float | None) else str(value)
                   for key, value in vars(args).items()}
        content = dict(machine=machine(), command=' '.join(sys.argv), options=options, records=records)
        args.out.write_text(json.dumps(content, indent=1))
