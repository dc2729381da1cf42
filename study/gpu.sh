#!/usr/bin/env bash
# Everything that is to be measured on one GPU; goes on after a failure. MODEL=NAME_OR_FOLDER adds
# the real language model: three seeds, then one with RL from an early and a late checkpoint.
# On the CPU in miniature:
#   PRESET="--preset smoke" SEEDS=2 CARDS="--rounds 1" GPT2="--rounds 1 --compile 1 --bf16 1 --vocab_size 512 --rows 2 --decode 8" study/gpu.sh runs/gpu-mini
set -ux
out=${1:-runs/gpu}
failed=0
nano=""
if ! test -e "$out/nanoGPT/model.py"; then
    timeout 60 git clone -q https://github.com/karpathy/nanoGPT "$out/nanoGPT"
fi
if test -e "$out/nanoGPT/model.py"; then
    nano="--nanogpt $out/nanoGPT/model.py"
fi
time python clipsft.py ${PRESET:---preset gpu} --out_dir "$out/main" || failed=1
python study/speed.py $nano ${GPT2:---device cuda --bf16 1 --compile 1 --n_layer 12 --n_head 12 --n_embd 768 --vocab_size 50304 --block_size 1024 --rows 16 --decode 512 --rounds 5} || failed=1
python study/speed.py ${CARDS:---device cuda} || failed=1
time python clipsft.py ${PRESET:---preset gpu} --seeds "${SEEDS:-10}" --seed 700 --out_dir "$out/ten" || failed=1
if test -n "${MODEL:-}"; then
    llm=${LLM:---device cuda --steps 96 --batch_size 16 --lr 5e-5 --eval_n 128}
    time python study/llm.py --model "$MODEL" --out_dir "$out/llm" --rows "$out/llm.jsonl" $llm || failed=1
    time python study/llm.py --model "$MODEL" --out_dir "$out/llm-rl" --rows "$out/llm-rl.jsonl" $llm --seeds 1 --rl_from 16 96 --rl_steps 10 || failed=1
fi
exit $failed
