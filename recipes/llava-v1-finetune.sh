#!/bin/sh
# LLaVA (arXiv:2304.08485), stage 2: three epochs over the 158K conversations.
# CLIP=DIR VICUNA=DIR DATA=llava_instruct_150k.json IMAGES=DIR
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard where one cannot hold what --dry-run says.
set -eu
: "${CLIP:?set it to the folder of openai/clip-vit-large-patch14}"
: "${VICUNA:?set it to the folder of Vicuna 7B}"
: "${DATA:?set it to llava_instruct_150k.json of liuhaotian/LLaVA-Instruct-150K}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage finetune --model llava-v1-7b --vision "$CLIP" --llm "$VICUNA" --data "$DATA" \
    --image-root "$IMAGES" --projector "${PROJECTOR:-out/llava-v1-pretrain}" --image-mode crop \
    --batch-size 32 --lr 2e-5 --warmup 0.03 --weight-decay 0 --clip inf --epochs 3 --max-length 2048 \
    --dtype bfloat16 --token-budget 8192 --bad-records skip --eval-every 0 --save-every 500 \
    --out out/llava-v1 "$@"
