#!/bin/sh
# LLaVA-1.5, stage 1 (arXiv:2310.03744): the connector alone on 558K captions. Pictures are cropped here,
# and padded in stage 2.
# SIZE=7b|13b CLIP=DIR VICUNA=DIR DATA=blip_laion_cc_sbu_558k.json IMAGES=DIR
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard for 13b.
set -eu
: "${CLIP:?set it to the folder of openai/clip-vit-large-patch14-336}"
: "${VICUNA:?set it to the folder of lmsys/vicuna-7b-v1.5, or 13b}"
: "${DATA:?set it to blip_laion_cc_sbu_558k.json of liuhaotian/LLaVA-Pretrain}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage pretrain --model llava-1.5-${SIZE:-7b} --vision "$CLIP" --llm "$VICUNA" --data "$DATA" \
    --image-root "$IMAGES" --image-mode crop --batch-size 256 --lr 1e-3 --warmup 0.03 --weight-decay 0 \
    --clip inf --epochs 1 --max-length 2048 --dtype bfloat16 --token-budget 16384 \
    --bad-records skip --eval-every 0 --save-every 500 --out "out/llava-1.5-${SIZE:-7b}-pretrain" "$@"
