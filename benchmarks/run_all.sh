#!/usr/bin/env bash
# Run every benchmark: benchmarks/run_all.sh COCO [OUT]
# COCO is a folder with annotations/, train2017/ and val2017/. The tables and the JSON files go to OUT.
# MMDETECTION=PYTHON and DETECTRON2=PYTHON add peers that live in those Pythons' environments.
# DEVICE=cuda measures a GPU: bfloat16 for all, batches of 16 images, and how batches of 1 to 32 compare.
set -euo pipefail

data=$(realpath "${1:?usage: benchmarks/run_all.sh COCO [OUT]}")
for name in PYTHON MMDETECTION DETECTRON2; do  # relative to here; realpath would lead out of an environment
    if [[ ${!name:-} == [!/]*/* ]]; then
        printf -v "$name" %s "$PWD/${!name}"
    fi
done
out=${2:+$(mkdir -p "$2" && realpath "$2")}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
out=${out:-work_dirs/benchmarks}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

run() {  # SCRIPT NAME [FLAG]...
    echo "== $2"
    "$python" "benchmarks/$1.py" --out "$out/$2.json" "${@:3}" | tee "$out/$2.txt"
}

others=(${MMDETECTION:+--mmdetection "$MMDETECTION"} ${DETECTRON2:+--detectron2 "$DETECTRON2"})
device=(--device "${DEVICE:-cpu}")
# Reads these flags, and says now what is wrong with them.
"$python" benchmarks/inference.py --data "$data" "${device[@]}" "${others[@]}" --help > /dev/null
for name in memory roi_align nms masks mask_targets; do
    run "$name" "$name" "${device[@]}"
done

if [[ ${DEVICE:-cpu} != cpu ]]; then
    run context_block context_block "${device[@]}" --dtype bfloat16 --images 2 16
    steps=("${device[@]}" --amp --data "$data" --case 800)
    for name in inference train_step; do
        run "$name" "$name" "${steps[@]}" --batch 16 --peers torchvision float32 'float32, GC r4' "${others[@]}"
    done
    run scaling scaling "${steps[@]}"
    exit
fi

# Without instructions for it a step in bfloat16 takes minutes.
half=$("$python" -c 'import torch; print("bfloat16" * torch.cpu._is_avx512_bf16_supported())')
run deform_conv deform_conv  # on a GPU torchvision's operator is used
run context_block context_block
run evaluation evaluation --case 1000 --rounds 3
run evaluation evaluation_5000 --case 5000 --rounds 1
run loader loader --data "$data" ${MMDETECTION:+--mmdetection "$MMDETECTION"}
run inference inference --data "$data" --peers torchvision float32 'float32, folded' 'float32, GC r4' $half \
    "${others[@]}"
run train_step train_step_256 --data "$data" --case 256 --peers torchvision float32 'float32, GC r4' $half \
    "${others[@]}"
# A peer's process takes 5 GB and more at 800 pixels: not all at once.
run train_step train_step_800 --data "$data" --case 800 --rounds 3 --peers torchvision float32 'float32, GC r4'
if [[ $half ]]; then
    run train_step train_step_800_bfloat16 --data "$data" --case 800 --rounds 3 --peers float32 bfloat16
fi
if ((${#others[@]})); then
    run train_step train_step_800_others --data "$data" --case 800 --rounds 3 --peers float32 "${others[@]}"
fi
