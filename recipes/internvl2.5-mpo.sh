#!/bin/sh
# InternVL2.5-2B-MPO or -8B-MPO from InternVL2.5-2B or -8B on MMPR-v1.1, with the published hyper-parameters
# (the authors' shell/internvl2.5_mpo; the same for both sizes): everything trains, 1 epoch, batch 256.
# MODEL=DIR META=meta.json (its root and annotation rewritten to this machine's) ROOT=folder that relative
# ones start from. InternVL2-8B-MPO differs by --lr 5e-6 --max-length 6144. Where ours differs: no DropPath in
# the tower (theirs 0.1), and the pairs' reference is computed once, not in each step.
set -eu
: "${MODEL:?set it to the folder of OpenGVLab/InternVL2_5-2B or 8B}"
: "${META:?set it to meta.json of OpenGVLab/MMPR-v1.1, its root and annotation rewritten to this machine}"
: "${ROOT:?set it to the folder that relative paths in META start from}"
exec ${LAUNCH:-python} "$(dirname "$0")/../mpo.py" \
    --model "$MODEL" --data "$META" --image-root "$ROOT" --train connector,llm,vision --beta 0.1 --w-p 0.8 \
    --w-q 0.2 --w-g 1 --reference precomputed --lr 1e-6 --warmup 0.03 --weight-decay 0.05 --clip 1 \
    --epochs 1 --batch-size 256 --micro-batch-size 1 --max-length 8192 --eval-every 0 --save-every 200 \
    --workers 8 --out "${OUT:-out/internvl2.5-mpo}" "$@"
