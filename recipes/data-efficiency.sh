#!/bin/sh
# The experiment on data efficiency of LLaVA-1.5 (arXiv:2310.03744, Figure 4): stage 2 on a tenth to a
# half of the mixture.
# FRACTION=0.5 and the variables of llava-1.5-finetune.sh
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard for 13b.
set -eu
: "${CLIP:?set it to the folder of openai/clip-vit-large-patch14-336}"
: "${VICUNA:?set it to the folder of lmsys/vicuna-7b-v1.5, or 13b}"
: "${DATA:?set it to llava_v1_5_mix665k.json of liuhaotian/LLaVA-Instruct-150K}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage finetune --model llava-1.5-${SIZE:-7b} --vision "$CLIP" --llm "$VICUNA" --data "$DATA" \
    --image-root "$IMAGES" --projector "${PROJECTOR:-out/llava-1.5-${SIZE:-7b}-pretrain}" \
    --data-fraction "${FRACTION:-0.5}" --image-mode pad --batch-size 128 --lr 2e-5 --warmup 0.03 \
    --weight-decay 0 --clip inf --epochs 1 --max-length 2048 --dtype bfloat16 --token-budget 8192 \
    --bad-records skip --eval-every 0 --save-every 500 \
    --out "out/llava-1.5-${SIZE:-7b}-${FRACTION:-0.5}" "$@"
