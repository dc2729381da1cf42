#!/usr/bin/env bash
# Everything that is to be measured on one GPU, in ten minutes. On the CPU in miniature:
#   PRESET="--preset smoke" SEEDS=2 SPEED="--rows 8 --decode 16" study/gpu.sh runs/gpu-mini
set -eux
out=${1:-runs/gpu}
time python clipsft.py ${PRESET:---preset gpu} --out_dir "$out/main"
time python clipsft.py ${PRESET:---preset gpu} --seeds "${SEEDS:-10}" --seed 60 --workers "${WORKERS:-3}" --out_dir "$out/ten"
python study/speed.py ${SPEED:---device cuda --bf16 1 --n_layer 12 --n_head 12 --n_embd 768 --vocab_size 50304 --block_size 1024 --rows 16 --decode 512}
python study/speed.py ${SPEED:---device cuda}
