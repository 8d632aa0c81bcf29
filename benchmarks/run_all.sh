#!/usr/bin/env bash
# Run every benchmark: benchmarks/run_all.sh COCO [OUT]
# COCO is a folder with annotations/, train2017/ and val2017/. The tables and the JSON files go to OUT.
set -euo pipefail

data=$(realpath "${1:?usage: benchmarks/run_all.sh COCO [OUT]}")
out=${2:-work_dirs/benchmarks}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"
for script in $(grep -l __main__ benchmarks/*.py); do
    name=$(basename "$script" .py)
    words=(--out "$out/$name.json")
    if grep -q add_data_arguments "$script"; then
        words+=(--data "$data")
    fi
    echo "== $name"
    "$python" "$script" "${words[@]}" | tee "$out/$name.txt"
done
