#!/bin/sh
# LLaVA-1.5, stage 2 as a LoRA of rank 128 on all linear layers of the decoder; the connector is trained
# whole, at a tenth of the rate.
# SIZE=7b|13b CLIP=DIR VICUNA=DIR DATA=llava_v1_5_mix665k.json IMAGES=DIR; PROJECTOR is what stage 1 wrote.
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard for 13b.
set -eu
: "${CLIP:?set it to the folder of openai/clip-vit-large-patch14-336}"
: "${VICUNA:?set it to the folder of lmsys/vicuna-7b-v1.5, or 13b}"
: "${DATA:?set it to llava_v1_5_mix665k.json of liuhaotian/LLaVA-Instruct-150K}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage finetune --model llava-1.5-${SIZE:-7b} --vision "$CLIP" --llm "$VICUNA" --data "$DATA" \
    --image-root "$IMAGES" --projector "${PROJECTOR:-out/llava-1.5-${SIZE:-7b}-pretrain}" --lora-r 128 \
    --lora-alpha 256 --lora-dropout 0.05 --lr 2e-4 --lr-connector 2e-5 --image-mode pad --batch-size 128 \
    --warmup 0.03 --weight-decay 0 --clip inf --epochs 1 --max-length 2048 --weights bfloat16 \
    --token-budget 2048 --recompute 40 --bad-records skip --eval-every 0 --save-every 500 \
    --out "out/llava-1.5-${SIZE:-7b}-lora" "$@"
