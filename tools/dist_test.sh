#!/usr/bin/env bash
# Usage: tools/dist_test.sh CONFIG CHECKPOINT N [arguments of tools/test.py]
# Runs N processes under torch.distributed.run: one a GPU, or on the CPU where there is no GPU.
# Environment: PYTHON; for several machines NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v python || command -v python3)
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
        PYTHON=$root/.venv/bin/python
    fi
fi
exec "$PYTHON" "$root/tools/test.py" "$1" "$2" --gpus "$3" "${@:4}"
