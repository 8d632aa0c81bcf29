"""Print the tables of published results, read from the docstrings of the configs.

    python tools/analysis/results_table.py [--write]

With --write they replace the tables between the markers in README.md and configs/gcnet/README.md.
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'gcnet'
BEGIN, END = '<!-- begin {} -->', '<!-- end {} -->'


class Row(NamedTuple):
    """One published variant; '-' where nothing was published."""

    name: str
    backbone: str
    model: str
    norm: str
    heads: str
    context: str
    schedule: str
    memory: str
    train_time: str
    fps: str
    box_ap: str
    mask_ap: str
    checkpoint: str
    measured: str


def read_row(path: Path) -> Row:
    """The row of one config, from its docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ''
    title, *_ = text.splitlines()
    ap = re.search(r'Published on COCO val2017: ([\d.]+) box AP, ([\d.]+) mask AP', text)
    checkpoint = re.search(r'Checkpoint: (\S+)', text)
    measured = re.search(r'Measured here: ([\d.]+) box AP, ([\d.]+) mask AP', text)
    if ap is None or checkpoint is None:
        raise ValueError(f'{path}: the docstring has no "Published on COCO val2017" or no "Checkpoint:" line')

    def figure(unit: str) -> str:
        found = re.search(rf'([\d.]+) {unit}', text)
        return found[1] if found else '-'

    backbone = re.search(r'([RX])-(\d+)', title)
    ratio = re.search(r'ratio 1/(\d+)', title)
    assert backbone is not None
    return Row(
        name=path.stem,
        backbone=f'{backbone[1]}{backbone[2]}-FPN',
        model=('DCN ' if 'DCN' in title else '') + ('Cascade Mask' if 'Cascade' in title else 'Mask'),
        norm='fixBN' if 'fixed BN' in title else 'SyncBN',
        heads='4conv1fc (SyncBN)' if '4conv1fc' in title else '2fc',
        context=f'GC(c3-c5, r{ratio[1]})' if ratio else '-',
        schedule=title.rstrip('.')[-2:],
        memory=figure('GB'),
        train_time=figure('s/iter'),
        fps=figure('fps'),
        box_ap=ap[1],
        mask_ap=ap[2],
        checkpoint=checkpoint[1],
        measured=f'{measured[1]} / {measured[2]}' if measured else '')


def read_rows() -> list[Row]:
    """All published variants, in the order of the three tables of 2019."""
    def order(row: Row) -> tuple:
        backbone = ['R50-FPN', 'R101-FPN', 'X101-FPN'].index(row.backbone)
        model = ['Mask', 'Cascade Mask', 'DCN Cascade Mask'].index(row.model)
        context = ['-', 'GC(c3-c5, r16)', 'GC(c3-c5, r4)'].index(row.context)
        return backbone, model, row.norm != 'fixBN', row.heads != '2fc', row.schedule, context

    return sorted((read_row(path) for path in CONFIGS.glob('*.py')), key=order)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as GitHub draws it."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def published_table(rows: list[Row]) -> str:
    """What was published, with links to config and checkpoint."""
    header = ['Backbone', 'Model', 'Norm', 'Heads', 'Context', 'Lr schd', 'Mem (GB)', 'Train time (s/iter)',
              'Inf time (fps)', 'Box AP', 'Mask AP', 'Download']
    return markdown(header, [
        [*row[1:6], f'[{row.schedule}](configs/gcnet/{row.name}.py)', *row[7:12],
         f'[model]({row.checkpoint})']
        for row in rows])


def config_table(rows: list[Row]) -> str:
    """Every config with its published figures, and what this code measured, where it did."""
    header = ['Config', 'Mem (GB)', 'Train time (s/iter)', 'Published box / mask AP',
              'Measured here box / mask AP']
    return markdown(header, [
        [f'[{row.name}]({row.name}.py)', row.memory, row.train_time, f'{row.box_ap} / {row.mask_ap}',
         row.measured]
        for row in rows])


def tables() -> dict[tuple[Path, str], str]:
    """Each table, and the file and marker that it stands at."""
    rows = read_rows()
    readme = ROOT / 'README.md'
    groups = {
        'R50 fixBN': [r for r in rows if r.backbone == 'R50-FPN' and r.norm == 'fixBN'],
        'R50 SyncBN': [r for r in rows if r.backbone == 'R50-FPN' and r.norm == 'SyncBN'],
        'stronger backbones': [r for r in rows if r.backbone != 'R50-FPN'],
    }
    return {
        **{(readme, name): published_table(group) for name, group in groups.items()},
        (CONFIGS / 'README.md', 'configs'): config_table(rows),
    }


def with_table(text: str, name: str, table: str) -> str:
    """The text with what stands between the markers of ``name`` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise ValueError(f'no markers "{begin}" and "{end}" to put the table between')
    return f'{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}'


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='put the tables into the two README files')
    args = parser.parse_args()
    for (path, name), table in tables().items():
        if args.write:
            path.write_text(with_table(path.read_text(), name, table))
        else:
            print(f'{name}\n\n{table}\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
