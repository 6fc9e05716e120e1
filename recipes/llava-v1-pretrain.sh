#!/bin/sh
# LLaVA (arXiv:2304.08485), stage 1: a linear connector on CC-595K, pictures of 224 px.
# CLIP=DIR VICUNA=DIR DATA=chat.json IMAGES=DIR
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard where one cannot hold what --dry-run says.
set -eu
: "${CLIP:?set it to the folder of openai/clip-vit-large-patch14}"
: "${VICUNA:?set it to the folder of Vicuna 7B}"
: "${DATA:?set it to chat.json of liuhaotian/LLaVA-CC3M-Pretrain-595K}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage pretrain --model llava-v1-7b --vision "$CLIP" --llm "$VICUNA" --data "$DATA" \
    --image-root "$IMAGES" --image-mode crop --batch-size 128 --lr 2e-3 --warmup 0.03 --weight-decay 0 \
    --clip inf --epochs 1 --max-length 2048 --dtype bfloat16 --token-budget 16384 \
    --bad-records skip --eval-every 0 --save-every 500 --out out/llava-v1-pretrain "$@"
