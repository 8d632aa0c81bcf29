#!/usr/bin/env bash
# From nothing to a trained and tested GCNet Mask R-CNN, on a CPU in minutes: sets up, draws a small data set,
# trains on it from scratch, tests, and shows the result.
#
#   tools/quickstart.sh                 PYTHON=python3.12 tools/quickstart.sh
#
# Another run starts again and writes over the checkpoints of the last one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/compile.sh"
export PYTHON=python  # that of the environment, also where another one was named to make it

config=configs/quickstart/mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py
data=data/synthetic
work_dir=work_dirs/quickstart
# On the CPU, two processes of half the batch lose less time to cores that are busy than one with more threads.
processes=$(python -c 'import torch; print(1 if torch.cuda.is_available() else 2)')
batch=$((8 / processes))

say "drawing the data set"
python tools/make_synthetic.py "$data"

say "training: $config"
start=$SECONDS
tools/dist_train.sh "$config" "$processes" --validate --seed 0 --work_dir "$work_dir" \
    --cfg-options train_dataloader.batch_size="$batch"
minutes=$(awk "BEGIN { printf \"%.1f\", ($SECONDS - $start) / 60 }")
checkpoint=$(ls -t "$work_dir"/epoch_*.pth | head -n1)
log=$(ls -t "$work_dir"/*/*.log | head -n1)
python tools/analysis/plot_curves.py "$work_dir" --out "$work_dir/curves.png" > /dev/null

say "testing $checkpoint"
rm -rf "$work_dir/predictions"
python tools/test.py "$config" "$checkpoint" --eval bbox segm --show-dir "$work_dir/predictions" --work_dir "$work_dir"
python tools/analysis/make_grid.py "$work_dir/predictions" --out "$work_dir/predictions.png" > /dev/null

echo
grep -hE 'Evaluation of|Average (Precision|Recall)' "$(ls -t "$work_dir"/*/*.log | head -n1)" |
  sed 's/.*Evaluation of/Evaluation of/'
cat << END

Trained in $minutes minutes. Have a look at
  predictions  $work_dir/predictions.png
  curves       $work_dir/curves.png
  checkpoint   $checkpoint
  log          $log
END
