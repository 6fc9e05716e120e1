#!/bin/sh
# Prism (arXiv:2402.07865) on the mixture with LVIS-Instruct-4V and LRV-Instruct beside the 665K.
# DINO=DIR SIGLIP=DIR LLAMA=DIR DATA=llava_v1_5_lvis4v_lrv_mix1231k.json IMAGES=DIR, or DATA=FILE,FILE,FILE
# with --data-weights X,X,X
# More flags may follow: --dry-run, --resume, --token-budget.
# On 8 GPUs: LAUNCH="torchrun --nproc-per-node 8", and --shard where one cannot hold what --dry-run says.
set -eu
: "${DINO:?set it to the folder of facebook/dinov2-with-registers-large}"
: "${SIGLIP:?set it to the folder of google/siglip-so400m-patch14-384}"
: "${LLAMA:?set it to the folder of meta-llama/Llama-2-7b-hf}"
: "${DATA:?set it to llava_v1_5_lvis4v_lrv_mix1231k.json, which the authors' scripts make; or FILE,FILE,FILE}"
: "${IMAGES:?set it to the folder that the picture names in DATA start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../train.py" \
    --stage finetune --model llava-1.5-7b --vision "$DINO,$SIGLIP" --llm "$LLAMA" --train connector,llm \
    --data "$DATA" --image-root "$IMAGES" --image-size 384 --image-mode resize --template prism_pure \
    --batch-size 128 --lr 2e-5 --warmup 0.03 --weight-decay 0.1 --clip 1 --epochs ${EPOCHS:-2} \
    --max-length 2048 --dtype bfloat16 --token-budget 8192 --seed 7 --bad-records skip \
    --eval-every 0 --save-every 500 --out out/prism-7b-mix "$@"
