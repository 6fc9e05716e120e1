#!/bin/sh
# LLaVA-1.5-7B with MPO on one GPU: a LoRA of rank 128 on the decoder and nothing else trains, so the policy
# without its LoRA is the reference and there is no second copy. MPO's own weights and beta; the rate is that
# of the paper's 8B (5e-6) times 10, as LLaVA's own LoRA has ten times the rate of full finetuning: nobody has
# published one for this. MODEL=DIR PAIRS=FILE IMAGES=DIR
set -eu
: "${MODEL:?set it to the folder of a LLaVA-1.5-7B}"
: "${PAIRS:?set it to a file of preference pairs, in JSON lines}"
: "${IMAGES:?set it to the folder that the picture names in PAIRS start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../mpo.py" \
    --model "$MODEL" --data "$PAIRS" --image-root "$IMAGES" --train llm --lora-r 128 --lora-alpha 256 \
    --reference lora-off --beta 0.1 --w-p 0.8 --w-q 0.2 --w-g 1 --lr 5e-5 --warmup 0.03 --weight-decay 0 \
    --clip 1 --epochs 1 --batch-size 64 --micro-batch-size 1 --max-length 2048 --weights bfloat16 \
    --recompute 32 --eval-every 0 --save-every 200 --out "${OUT:-out/llava-1.5-mpo-lora}" "$@"
