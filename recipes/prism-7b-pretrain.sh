#!/bin/sh
# Prism's align stage (arXiv:2402.07865), which the authors' best models leave out: the connector alone on
# 558K captions. Then: prism-7b.sh --projector out/prism-7b-pretrain
# DINO=DIR SIGLIP=DIR LLAMA=DIR DATA=blip_laion_cc_sbu_558k.json IMAGES=DIR
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8".
set -eu
: "${DINO:?set it to the folder of facebook/dinov2-with-registers-large}"
: "${SIGLIP:?set it to the folder of google/siglip-so400m-patch14-384}"
: "${LLAMA:?set it to the folder of meta-llama/Llama-2-7b-hf}"
: "${DATA:?set it to blip_laion_cc_sbu_558k.json of liuhaotian/LLaVA-Pretrain}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage pretrain --model llava-1.5-7b --vision "$DINO,$SIGLIP" --llm "$LLAMA" --data "$DATA" \
    --image-root "$IMAGES" --image-size 384 --image-mode resize --template prism_plain --batch-size 256 \
    --lr 1e-3 --warmup 0.03 --weight-decay 0 --clip 1 --epochs 1 --max-length 2048 --dtype bfloat16 \
    --token-budget 16384 --seed 7 --bad-records skip --eval-every 0 --save-every 500 \
    --out out/prism-7b-pretrain "$@"
