#!/usr/bin/env bash
# Run every benchmark: benchmarks/run_all.sh COCO [OUT]
# COCO is a folder with annotations/, train2017/ and val2017/. The tables and the JSON files go to OUT.
# MMDETECTION=PYTHON adds mmdetection 3 of that Python's environment as a peer.
set -euo pipefail

data=$(realpath "${1:?usage: benchmarks/run_all.sh COCO [OUT]}")
out=${2:-work_dirs/benchmarks}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

run() {  # NAME [FLAG]...
    echo "== $1"
    "$python" "benchmarks/$1.py" --out "$out/$1.json" "${@:2}" | tee "$out/$1.txt"
}

for name in context_block roi_align nms masks evaluation; do
    run "$name"
done
run loader --data "$data"
for name in inference train_step; do
    run "$name" --data "$data" ${MMDETECTION:+--mmdetection "$MMDETECTION"}
done
