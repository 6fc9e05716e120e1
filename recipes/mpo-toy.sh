#!/bin/sh
# The whole chain at the size of the toy: finetune, pairs by both methods from the model's own answers, MPO,
# and a last question. `python -m lab.run losses` compares the losses, each with three seeds.
# LIMIT=N asks fewer questions for pairs; more flags are those of mpo.py.
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mpo-toy}
[ -f out/finetune/config.json ] || python train.py --stage finetune
[ -f "$OUT/correctness.jsonl" ] || python pairs.py --method correctness --model out/finetune \
    --data toyworld/train.json --image-root toyworld --limit ${LIMIT:-600} --samples 8 --min-newlines 1 \
    --max-new-tokens 96 --out "$OUT/correctness.jsonl"
[ -f "$OUT/dropout.jsonl" ] || python pairs.py --method dropout-ntp --model out/finetune \
    --data toyworld/pretrain.json --image-root toyworld --limit ${LIMIT:-300} \
    --max-new-tokens 128 --out "$OUT/dropout.jsonl"
python mpo.py --model out/finetune --data "$OUT/correctness.jsonl,$OUT/dropout.jsonl" --image-root toyworld \
    --val toyworld/val.jsonl --max-steps 60 --out "$OUT/mpo" "$@"
python sample.py --model "$OUT/mpo" --image cat.jpg
