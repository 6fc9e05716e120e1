#!/bin/sh
# Prism (arXiv:2402.07865), one stage: DINOv2 and SigLIP at 384 px side by side and frozen, a connector from
# random weights, Llama-2.
# DINO=DIR SIGLIP=DIR LLAMA=DIR DATA=llava_v1_5_mix665k.json IMAGES=DIR; EPOCHS=2 for the final models.
# The weight decay is the paper's; in the authors' code it most likely never took effect: --weight-decay 0
# is what their weights had.
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard where one cannot hold what --dry-run says.
set -eu
: "${DINO:?set it to the folder of facebook/dinov2-with-registers-large}"
: "${SIGLIP:?set it to the folder of google/siglip-so400m-patch14-384}"
: "${LLAMA:?set it to the folder of meta-llama/Llama-2-7b-hf}"
: "${DATA:?set it to llava_v1_5_mix665k.json of liuhaotian/LLaVA-Instruct-150K}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage finetune --model llava-1.5-7b --vision "$DINO,$SIGLIP" --llm "$LLAMA" --train connector,llm \
    --data "$DATA" --image-root "$IMAGES" --image-size 384 --image-mode resize --template prism_pure \
    --batch-size 128 --lr 2e-5 --warmup 0.03 --weight-decay 0.1 --clip 1 --epochs ${EPOCHS:-1} \
    --max-length 2048 --dtype bfloat16 --token-budget 8192 --seed 7 --bad-records skip \
    --eval-every 0 --save-every 500 --out out/prism-7b "$@"
