"""The papers' findings in miniature: what is trained on, what is scored, and the commands of every row.

What the paper says, which columns are scored and what is claimed stands on the page of an experiment,
results/NAME.md; lab/run.py trains, scores and brings the page up to date.
"""

import random
import re
from dataclasses import replace
from typing import NamedTuple

import toyworld
from benchmarks.common import COT, INSUFFICIENT, LETTER, SHORT
from lab.common import move_parts
from lab.losses import NAMES
from toyworld import BOX, CAPTION, CATEGORIES, COLORS, DETAIL, KINDS, llava_record, without_format

# ---- what is scored: of a judged answer to a held-out question the values to be averaged ----


def score(record):
    return [record["score"]]


def made_up(record):
    """Of each thing in a caption whether it is not in the picture (CHAIR_i, arXiv:1809.02156)."""
    return [name not in things_named(record["truth"]) for name in things_named(record["answer"])]


def things_named(text):
    return set(re.findall(rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(KINDS)})\b|says \w+", text))


def no_final_answer(record):
    return ["Final answer:" not in record["answer"]]


def one_word(record):
    return [" " not in record["answer"].strip()]


MEASURES = {category: (score, [category]) for category in CATEGORIES} | {
    "all": (score, CATEGORIES),
    "short answers": (score, ["existence", "count", "attribute", "spatial", "reading", "reasoning"]),
    "made up": (made_up, ["caption"]),
    "no final answer": (no_final_answer, ["cot"]),
    "chat in one word": (one_word, ["chat"]),
}


def measure(column, records):
    """The mean of what one of the MEASURES says of the records of its categories."""
    values, categories = MEASURES[column]
    found = []
    for record in records:
        if set(categories) & set(record["category"]):
            found += values(record)
    return sum(found) / max(1, len(found))


# ---- what is trained on ----


def keep(record):
    return [record]


def keep_pairs(is_wanted):
    """Of a record of train.json only the (question, answer) that are wanted."""
    def rewrite(record):
        pairs = [pair for pair in pairs_of(record) if is_wanted(pair[0])]
        return [llava_record(record["id"], record["image"], pairs)] if pairs else []
    return rewrite


def pairs_of(record):
    texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(texts[::2], texts[1::2]))


def is_talk(question):
    """As people ask, or a request for a description."""
    return question != CAPTION and not any(part in question for part in (SHORT, LETTER, COT, BOX))


def strip_formats(record):
    pairs = [(without_format(question), answer) for question, answer in pairs_of(record)]
    return [llava_record(record["id"], record["image"], pairs)]


def add_text(record):
    """Beside every fifth record the same without its picture, which is described in words instead."""
    if int(record["id"].split("-")[1]) % 5:
        return [record]
    *pairs, (_, description) = pairs_of(record)
    text = llava_record(record["id"] + "-text", None, pairs)
    text["conversations"][0]["value"] = f"{description}\n{pairs[0][0]}"
    del text["image"]
    return [record, text]


def widen_pictures(folder):
    """Draw the pictures of a world again, half as wide again as they are high.

    Each is the middle of a drawing of 144 px, where things keep their size of 96 px and move apart sideways.
    """
    def move(part):
        x1, y1, x2, y2 = part.box
        x, y = (x1 + x2) / 2, (y1 + y2) / 3 + 1 / 6
        w, h = (x2 - x1) / 3, (y2 - y1) / 3
        return replace(part, box=(x - w, y - h, x + w, y + h))

    for path in folder.glob("images/*.png"):
        scene = move_parts(scene_of(path), move)
        toyworld.draw_scene(scene, 144).crop((0, 24, 144, 120)).save(path)


def scene_of(path):
    """The scene that a picture of a world of seed 0 shows."""
    split, i = path.stem.split("_")
    return toyworld.random_scene(random.Random(f"0 {split} {int(i)}"), held_out=split == "val")


class World(NamedTuple):
    n_train: int = 1280              # pictures to train on
    n_val: int = 240                 # held-out ones, with 72 questions of a category; 198 for 660
    size: int = 96                   # side of a picture in pixels
    words: float = 1.0               # size of the signs
    wide: bool = False               # see widen_pictures()


TWO_STEPS = re.compile("How many .* (together|than|left)")
WORLD = World()
MANY = World(n_val=660)
WIDE = World(wide=True)
FILES = {                            # name -> its world, and what becomes of a record; "val": of a question
    "base": (WORLD, keep),
    "captions": (WORLD, keep_pairs(lambda q: q == DETAIL)),
    "bare": (WORLD, strip_formats),
    "talk": (WORLD, keep_pairs(is_talk)),
    "short": (WORLD, keep_pairs(lambda q: is_talk(q) or SHORT in q and INSUFFICIENT not in q)),
    "noletters": (WORLD, keep_pairs(lambda q: LETTER not in q)),
    "noabsent": (WORLD, keep_pairs(lambda q: INSUFFICIENT not in q)),
    "texts": (WORLD, add_text),
    "coarse": (World(size=24), keep),
    "middling": (World(size=48), keep),
    "signs": (World(6000, size=192, words=0.5), keep),
    "wide": (WIDE, keep_pairs(lambda q: BOX not in q and q != DETAIL)),
    "wideval": (WIDE, lambda q: [q] if q["category"] != "box" else []),
    "manytexts": (MANY, add_text),
    "manyval": (MANY, lambda q: [q] if q["category"] in ("reasoning", "cot", "caption") else []),
    "steps": (MANY, keep_pairs(lambda q: TWO_STEPS.search(q) and SHORT in q)),
    "describe": (MANY, keep_pairs(lambda q: q == CAPTION)),
}


# ---- what is compared ----
#
# The commands of a row are joined by &&; the last makes the model that is scored. {name} is a file of FILES,
# and {0}, {1} are what the row's earlier commands made. One epoch of {base}, 1,280 records, is 80 steps.

FRESH = "--projector= --lr-connector 5e-3"       # a connector of random weights
BASE = "train --epochs 1 --data {base}"
WIDE_PICTURES = "train --epochs 1 --data {wide} --val {wideval} --image-mode"
FROM_RANDOM = f"train --max-steps 240 --data {{base}} {FRESH}"
TILES = "--vision assets/toy-clip-tiles --projector assets/toy-connector-tiles"
HD = f"train --data {{signs}} --batch-size 8 --lr 1e-3 {TILES} --image-mode"
BEFORE = "train --max-steps 200 --data {manytexts} --val {manyval}"
CORRECTNESS = "pairs --method correctness --samples 8 --min-newlines 1 --data {steps}"
DROPOUT = "pairs --method dropout-ntp --data {describe} --ratio"


def prefer(command, *sources):
    """The commands of a row: 40 steps of 16 pairs."""
    asked = [f"{source} --model {{0}} --max-new-tokens 96 --limit 200" for source in sources]
    files = ",".join(f"{{{k}}}" for k in range(1, 1 + len(sources)))
    places = f"--model {{0}} --data {files} --image-root {{manyval.parent}} --val {{manyval}}"
    return " && ".join([BEFORE, *asked, f"{command} {places} --max-steps 40"])


BOTH = (CORRECTNESS, f"{DROPOUT} 0.5")
DPO = prefer("mpo --w-p 1 --w-q 0 --w-g 0", *BOTH)
MPO = prefer("mpo --w-p 0.8 --w-q 0.2 --w-g 1", *BOTH)
EXPERIMENTS = {
    # LLaVA-1.5
    "formats": {"with prompts": BASE, "without": "train --epochs 1 --data {bare}"},
    "unseen": {
        "all formats": BASE,
        "no letters": "train --epochs 1 --data {noletters}",
        "no Unanswerable": "train --epochs 1 --data {noabsent}",
    },
    "tasks": {
        "talk": "train --epochs 1 --data {talk}",
        "talk and short": "train --epochs 1 --data {short}",
        "all tasks": BASE,
    },
    "connector": {"linear": f"{BASE} --connector linear {FRESH}", "two layers": f"{BASE} {FRESH}"},
    "data": {
        "10%": f"{BASE} --data-fraction 0.1",
        "25%": f"{BASE} --data-fraction 0.25",
        "50%": f"{BASE} --data-fraction 0.5",
        "75%": f"{BASE} --data-fraction 0.75",
        "100%": BASE,
    },
    "resolution": {
        "24 px": "train --epochs 1 --data {coarse}",
        "48 px": "train --epochs 1 --data {middling}",
        "96 px": BASE,
    },
    "hd": {
        "pad": f"{HD} pad --max-steps 442",
        "hd": f"{HD} hd --max-steps 270",
        "hd, no global view": f"{HD} hd --global-view none --max-steps 297",
    },

    # Prismatic
    "shapes": {
        "letterbox": f"{WIDE_PICTURES} letterbox",
        "crop": f"{WIDE_PICTURES} crop",
        "plain resize": f"{WIDE_PICTURES} resize",
    },
    "towers": {
        "CLIP": FROM_RANDOM,
        "DINO": f"{FROM_RANDOM} --vision assets/toy-dino",
        "DINO and CLIP": f"{FROM_RANDOM} --vision assets/toy-dino,assets/toy-clip",
    },
    "base": {
        "instruct": FROM_RANDOM,
        "base": f"{FROM_RANDOM} --llm assets/toy-base --template prism_pure",
    },
    "stages": {
        "two stages": "train --stage pretrain --max-steps 80 --data {captions} && "
                      "train --epochs 1 --data {base} --projector {0} --lr-connector 5e-3",
        "one stage": f"{BASE} {FRESH}",
    },
    "tower": {
        "frozen": BASE,
        "trained": f"{BASE} --train connector,llm,vision",
        "at a tenth of the rate": f"{BASE} --train connector,llm,vision --lr-vision 4e-5",
    },
    "epochs": {
        "1 epoch": BASE,
        "2 epochs": "train --epochs 2 --data {base}",
        "3 epochs": "train --epochs 3 --data {base}",
    },
    "texts": {"pictures alone": BASE, "and texts": "train --epochs 1 --data {texts}"},

    # InternVL-2.5-MPO: finetune, let the model make its own pairs, train each variant on them
    "losses": {
        "before": BEFORE,
        "SFT on chosen": prefer("mpo --w-p 0 --w-q 0 --w-g 1", *BOTH),
        "DPO": DPO,
        "BCO": prefer("mpo --w-p 0 --w-q 1 --w-g 0", *BOTH),
        "DPO+SFT": prefer("mpo --w-p 1 --w-q 0 --w-g 1", *BOTH),
        "BCO+SFT": prefer("mpo --w-p 0 --w-q 1 --w-g 1", *BOTH),
        "MPO": MPO,
    },
    "ablation": {"DPO": DPO, "MPO": MPO}
                | {name: prefer(f"losses --loss {name} --w-g 0", *BOTH) for name in NAMES},
    "dropout": {
        "before": BEFORE,
        "correctness": prefer("mpo", CORRECTNESS),
        "a quarter": prefer("mpo", f"{DROPOUT} 0.25"),
        "half": prefer("mpo", f"{DROPOUT} 0.5"),
        "three quarters": prefer("mpo", f"{DROPOUT} 0.75"),
    },
}
