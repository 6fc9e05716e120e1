#!/bin/sh
# The whole chain at the size of the toy: finetune, questions, pairs by both methods from the model's own answers,
# MPO, and a last question. `python -m lab.run mpo` repeats it for every loss and three seeds, and draws up the table.
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mpo-toy}
[ -f out/finetune/config.json ] || python train.py --stage finetune
mkdir -p "$OUT"
# 300 reasoning questions with their answers; 300 requests for a caption, which have no one true answer
WRITE='import sys; from pathlib import Path; from lab.mpo import write_questions; write_questions(Path(sys.argv[1]), 300)'
python -c "$WRITE" "$OUT"
[ -f "$OUT/correctness.jsonl" ] || python pairs.py --method correctness --model out/finetune \
    --data "$OUT/reasoning.jsonl" --image-root toyworld --samples 8 --min-newlines 1 --max-new-tokens 96 \
    --out "$OUT/correctness.jsonl"
[ -f "$OUT/dropout.jsonl" ] || python pairs.py --method dropout-ntp --model out/finetune \
    --data "$OUT/captions.jsonl" --image-root toyworld --max-new-tokens 96 --out "$OUT/dropout.jsonl"
cat "$OUT/correctness.jsonl" "$OUT/dropout.jsonl" > "$OUT/pairs.jsonl"
python mpo.py --model out/finetune --data "$OUT/pairs.jsonl" --image-root toyworld --val toyworld/val.jsonl \
    --max-steps 60 --out "$OUT/mpo" "$@"
python sample.py --model "$OUT/mpo" --image cat.jpg
