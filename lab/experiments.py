"""The papers' findings in miniature, as rows of commands. lab/run.py trains, scores and writes the page.

A row is a list of commands, of which the last makes the model that is scored. In a command {name} is a file
of FILES, {0}, {1} what the row's earlier commands made. Unless it says otherwise, train.py shows each of the
1,280 records of {base} once, in 80 steps.
"""

import re
from dataclasses import dataclass

from benchmarks.common import COT, INSUFFICIENT, LETTER, SHORT
from toyworld import BOX, CAPTION, COLORS, KINDS, llava_record, without_format


@dataclass
class Experiment:
    paper: str                       # what is repeated
    says: str                        # what it says of this, with its own figures
    setup: str                       # what is done here instead
    rows: dict                       # {row: [command, ...]}
    columns: dict                    # {column: function of the judged answers -> share}
    claims: dict                     # {claim: (cell, ">" or "=", cell)}, a cell being (row, column)
    minutes: int                     # of one seed, one core
    note: str = ""                   # what explains it, and what does not carry over


# ---- what is scored: functions of the judged answers to the held-out questions ----


def score(*categories):
    """The share of right answers, of some categories or of all."""
    def measure(records):
        scores = [r["score"] for r in records if not categories or set(categories) & set(r["category"])]
        return sum(scores) / len(scores)
    return measure


def made_up(records):
    """The share of the things in captions that are not in the picture (CHAIR_i, arXiv:1809.02156)."""
    n_wrong, n_named = 0, 0
    for record in records:
        if "caption" in record["category"]:
            named = things_named(record["answer"])
            n_named += len(named)
            n_wrong += len(named - things_named(record["truth"]))
    return n_wrong / max(1, n_named)


def things_named(text):
    return set(re.findall(rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(KINDS)})\b|says \w+", text))


def no_final_answer(records):
    """The share of worked answers without one."""
    worked = [record["answer"] for record in records if "cot" in record["category"]]
    return sum("Final answer:" not in answer for answer in worked) / len(worked)


def one_word(records):
    """The share of answers to people's own questions that are a single word."""
    said = [record["answer"] for record in records if "chat" in record["category"]]
    return sum(" " not in answer.strip() for answer in said) / len(said)


# ---- what is trained on ----


def keep_pairs(wanted):
    """Rewrite a record of train.json: only the (question, answer) that are wanted."""
    def rewrite(record):
        pairs = [(q, a) for q, a in pairs_of(record) if wanted(q)]
        return [llava_record(record["id"], record["image"], pairs)] if pairs else []
    return rewrite


def pairs_of(record):
    texts = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    return list(zip(texts[::2], texts[1::2]))


def is_talk(question):
    """As people ask, or a request for a description."""
    return not any(prompt in question for prompt in (SHORT, LETTER, COT, BOX)) and question != CAPTION


def strip_formats(record):
    pairs = [(without_format(question), answer) for question, answer in pairs_of(record)]
    return [llava_record(record["id"], record["image"], pairs)]


def add_texts(record):
    """Beside every fifth record the same without its picture, which is described in words instead."""
    pairs = pairs_of(record)
    if int(record["id"].split("-")[1]) % 5:
        return [record]
    text = llava_record(record["id"] + "-text", None, pairs[:-1])
    first = text["conversations"][0]
    first["value"] = first["value"].replace("<image>", pairs[-1][1])
    del text["image"]
    return [record, text]


TWO_STEPS = re.compile("How many .* (together|than|left)")
WORLD = (1280, 240, 96, 1.0)         # pictures to train on, held-out ones; their side in pixels; signs' size
MANY = (1280, 660, 96, 1.0)
FILES = {                            # name -> its world, what it is made of, and how
    "base": (WORLD, "train.json", lambda record: [record]),
    "captions": (WORLD, "pretrain.json", lambda record: [record]),
    "bare": (WORLD, "train.json", strip_formats),
    "talk": (WORLD, "train.json", keep_pairs(is_talk)),
    "short": (WORLD, "train.json", keep_pairs(lambda q: is_talk(q) or SHORT in q and INSUFFICIENT not in q)),
    "noletters": (WORLD, "train.json", keep_pairs(lambda q: LETTER not in q)),
    "noabsent": (WORLD, "train.json", keep_pairs(lambda q: INSUFFICIENT not in q)),
    "texts": (WORLD, "train.json", add_texts),
    "coarse": ((1280, 240, 24, 1.0), "train.json", lambda record: [record]),
    "middling": ((1280, 240, 48, 1.0), "train.json", lambda record: [record]),
    # For pairs: two-step questions and captions; to judge them, as many of each as there are pictures for.
    "steps": (MANY, "train.json", keep_pairs(lambda q: TWO_STEPS.search(q) and SHORT in q)),
    "describe": (MANY, "train.json", keep_pairs(lambda q: q == CAPTION)),
    "many": (MANY, "val.jsonl", lambda q: [q] if q["category"] in ("reasoning", "cot", "caption") else []),
    "manytexts": (MANY, "train.json", add_texts),
}


# ---- the experiments ----

FRESH = "--projector= --lr-connector 5e-3"       # a connector of random weights
LLAVA = {
    "formats": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, section 3.2 and Table 2)",
        says="A prompt that names the format of a short answer lets one model answer shortly and talk, too: "
             "MME rises from 1,197 to 1,323.8, and questions of VizWiz without an answer are known for such "
             "67.8% of the time instead of 11.1%.",
        setup="Trained with the format prompts and without; asked with them.",
        rows={"with format prompts": ["train"], "without": ["train --data {bare}"]},
        columns={
            "short answers": score("existence", "count", "attribute", "spatial", "reading", "reasoning"),
            "choice": score("choice"),
            "unanswerable": score("unanswerable"),
            "chat": score("chat"),
            "chat in one word": one_word,
        },
        claims={
            "short answers are better": (("with format prompts", "short answers"), ">",
                                         ("without", "short answers")),
            "what has no answer is known for such": (("with format prompts", "unanswerable"), ">",
                                                     ("without", "unanswerable")),
            "without them, talk becomes short": (("without", "chat in one word"), ">",
                                                 ("with format prompts", "chat in one word")),
        },
        minutes=4,
    ),
    "tasks": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, Table 2)",
        says="Each kind of task that joins the conversations adds: VQAv2 raises MME from 809.6 to 1,197.0, "
             "academic questions from 1,355.2 to 1,377.6, regions to 1,426.5; MM-Vet goes from 25.5 to 30.8.",
        setup="Trained on talk alone, with short questions beside it, and with all.",
        rows={
            "talk alone": ["train --data {talk}"],
            "and short questions": ["train --data {short}"],
            "and boxes, letters, steps": ["train"],
        },
        columns={
            "all": score(),
            "short answers": score("existence", "count", "attribute", "spatial", "reading", "reasoning"),
            "box": score("box"),
            "choice": score("choice"),
            "cot": score("cot"),
            "chat": score("chat"),
        },
        claims={
            "short questions add over all": (("and short questions", "all"), ">", ("talk alone", "all")),
            "so do the other tasks": (("and boxes, letters, steps", "all"), ">",
                                      ("and short questions", "all")),
            "and talk gains, too": (("and boxes, letters, steps", "chat"), ">", ("talk alone", "chat")),
        },
        minutes=6,
    ),
    "connector": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, Table 2)",
        says="Two layers in place of a linear connector: MME 1,323.8 to 1,355.2, GQA 46.8 to 47.3, MM-Vet "
             "26.3 to 27.8.",
        setup="Both connectors from random weights, without a first stage.",
        rows={"linear": [f"train --connector linear {FRESH}"], "two layers": [f"train {FRESH}"]},
        columns={"all": score(), "caption": score("caption"), "chat": score("chat"), "box": score("box")},
        claims={"two layers are better": (("two layers", "all"), ">", ("linear", "all"))},
        minutes=4,
    ),
    "data": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, section 3.5 and Figure 4)",
        says="Half of the records keep more than 98% of the performance.",
        setup="Each share of the records is shown once.",
        rows={f"{share:.0%} of the records": [f"train --epochs 1 --data-fraction {share}"]
              for share in (0.1, 0.25, 0.5, 0.75)} | {"100% of the records": ["train"]},
        columns={"all": score(), "caption": score("caption"), "chat": score("chat"), "box": score("box")},
        claims={
            "all records are no better than three quarters": (("100% of the records", "all"), "=",
                                                              ("75% of the records", "all")),
            "nor than half of them": (("100% of the records", "all"), "=", ("50% of the records", "all")),
        },
        minutes=8,
    ),
    "resolution": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, section 4.2)",
        says="Models make up less where the resolution lets them see what the training's descriptions name; "
             "without figures.",
        setup="Pictures drawn at 24, 48 and 96 pixels and enlarged to the tower's 96; the answers of the "
              "training name all there is.",
        rows={
            "24 px": ["train --data {coarse}"],
            "48 px": ["train --data {middling}"],
            "96 px": ["train"],
        },
        columns={"made up": made_up, "existence": score("existence"), "reading": score("reading"),
                 "all": score()},
        claims={
            "at 24 px more is made up than at 48": (("24 px", "made up"), ">", ("48 px", "made up")),
            "at 48 px more than at 96": (("48 px", "made up"), ">", ("96 px", "made up")),
        },
        minutes=6,
    ),
    "unseen": Experiment(
        paper="LLaVA-1.5 (arXiv:2310.03744v2, section 4.1)",
        says="A format that was never trained is followed: asked to, the model says 'Unanswerable' to 67.8% "
             "of VizWiz's questions that have no answer.",
        setup="Questions of one format are left out of the training. The language model has read both "
              "formats, as a Vicuna has.",
        rows={
            "all formats": ["train"],
            "no letters": ["train --data {noletters}"],
            "no Unanswerable": ["train --data {noabsent}"],
        },
        columns={"choice": score("choice"), "unanswerable": score("unanswerable"), "all": score()},
        claims={
            "letters are chosen as well without training": (("no letters", "choice"), "=",
                                                            ("all formats", "choice")),
            "what has no answer is known as well": (("no Unanswerable", "unanswerable"), "=",
                                                    ("all formats", "unanswerable")),
        },
        minutes=6,
    ),
}

PRISMATIC = {
    "stages": Experiment(
        paper="Prismatic VLMs (arXiv:2402.07865, section 4.1 and Figure 4)",
        says="A first stage for the connector alone can go: one stage is as good or better (p = 0.006) and "
             "20 to 25% cheaper.",
        setup="A connector of random weights is trained on 1,280 captions first, or not.",
        rows={
            "two stages": [
                "train --stage pretrain --max-steps 80 --data {captions}",
                "train --projector {0} --lr-connector 5e-3",
            ],
            "one stage": [f"train {FRESH}"],
        },
        columns={"all": score(), "caption": score("caption"), "chat": score("chat"), "box": score("box")},
        claims={"two stages are no better than one": (("two stages", "all"), "=", ("one stage", "all"))},
        minutes=5,
    ),
    "tower": Experiment(
        paper="Prismatic VLMs (arXiv:2402.07865, section 4.1 and Figure 5)",
        says="Training the tower, too, makes it much worse: RefCOCO falls from 64.1 to 42.6, TextVQA from "
             "44.5 to 38.3.",
        setup="The tower trains at the rate of the rest, at a tenth of it, or not at all.",
        rows={
            "frozen": ["train"],
            "trained": ["train --train connector,llm,vision"],
            "trained, a tenth of the rate": ["train --train connector,llm,vision --lr-vision 4e-5"],
        },
        columns={"all": score(), "box": score("box"), "reading": score("reading"),
                 "caption": score("caption")},
        claims={
            "a frozen tower is better": (("frozen", "all"), ">", ("trained", "all")),
            "for boxes, too": (("frozen", "box"), ">", ("trained", "box")),
            "at a tenth of the rate it is no better either": (("frozen", "all"), "=",
                                                              ("trained, a tenth of the rate", "all")),
        },
        minutes=8,
    ),
    "epochs": Experiment(
        paper="Prismatic VLMs (arXiv:2402.07865, section 4.4 and Figure 10)",
        says="One epoch is too few, two are better (p = 0.005), and three no better than two.",
        setup="",
        rows={f"{n} epoch{'s' * (n > 1)}": [f"train --epochs {n}" if n > 1 else "train"] for n in (1, 2, 3)},
        columns={"all": score(), "caption": score("caption"), "chat": score("chat"), "box": score("box")},
        claims={
            "two epochs are better than one": (("2 epochs", "all"), ">", ("1 epoch", "all")),
            "three are no better than two": (("3 epochs", "all"), "=", ("2 epochs", "all")),
        },
        minutes=10,
    ),
    "texts": Experiment(
        paper="Prismatic VLMs (arXiv:2402.07865, section 4.3 and Figure 8)",
        says="40,000 conversations without pictures beside the others change little (p = 0.14).",
        setup="Beside every fifth record the same conversation about a description in place of the picture.",
        rows={"pictures alone": ["train"], "and texts": ["train --data {texts}"]},
        columns={"all": score(), "unanswerable": score("unanswerable"), "reasoning": score("reasoning"),
                 "chat": score("chat")},
        claims={"texts change nothing": (("and texts", "all"), "=", ("pictures alone", "all"))},
        minutes=4,
    ),
}


# ---- preferences: finetune, let the model make its own pairs, train each variant on them ----

BEFORE = "train --max-steps 200 --data {manytexts} --val {many}"
SOURCES = {
    "correctness": "pairs --method correctness --samples 8 --min-newlines 1 --data {steps}",
    "dropout 0.25": "pairs --method dropout-ntp --ratio 0.25 --data {describe}",
    "dropout 0.5": "pairs --method dropout-ntp --ratio 0.5 --data {describe}",
    "dropout 0.75": "pairs --method dropout-ntp --ratio 0.75 --data {describe}",
}


def prefer(weights, *sources):
    """The commands of a row: 60 steps of 16 pairs."""
    asked = [f"{SOURCES[name]} --model {{0}} --max-new-tokens 96 --limit 300" for name in sources]
    files = ",".join(f"{{{k}}}" for k in range(1, 1 + len(sources)))
    places = f"--model {{0}} --data {files} --image-root {{many.parent}} --val {{many}}"
    return [BEFORE, *asked, f"mpo {places} --max-steps 60 {weights}"]


BOTH = ("correctness", "dropout 0.5")
MPO = {
    "losses": Experiment(
        paper="InternVL-2.5-MPO (arXiv:2411.10442v2, Tables 3 and 6, section 10)",
        says="On M3CoT, asked directly and step by step, MPO is better than SFT on the chosen answers; DPO "
             "alone makes step by step worse than direct and loses the format; SFT beside it mends "
             "both, and BCO beside these adds.",
        setup="200 steps of finetuning, 300 questions for each kind of pairs, 60 steps of 16 pairs.",
        rows={
            "before": [BEFORE],
            "SFT on chosen": prefer("--w-p 0 --w-q 0 --w-g 1", *BOTH),
            "DPO": prefer("--w-p 1 --w-q 0 --w-g 0", *BOTH),
            "BCO": prefer("--w-p 0 --w-q 1 --w-g 0", *BOTH),
            "DPO+SFT": prefer("--w-p 1 --w-q 0 --w-g 1", *BOTH),
            "BCO+SFT": prefer("--w-p 0 --w-q 1 --w-g 1", *BOTH),
            "MPO": prefer("--w-p 0.8 --w-q 0.2 --w-g 1", *BOTH),
        },
        columns={
            "direct": score("reasoning"),
            "step by step": score("cot"),
            "no final answer": no_final_answer,
            "made up": made_up,
        },
        claims={
            "MPO is better than SFT on the chosen answers, step by step":
                (("MPO", "step by step"), ">", ("SFT on chosen", "step by step")),
            "DPO alone makes step by step worse than direct":
                (("DPO", "direct"), ">", ("DPO", "step by step")),
            "DPO alone loses the format": (("DPO", "no final answer"), ">", ("DPO+SFT", "no final answer")),
            "SFT beside it mends step by step": (("DPO+SFT", "step by step"), ">", ("DPO", "step by step")),
            "MPO is better than DPO+SFT, step by step":
                (("MPO", "step by step"), ">", ("DPO+SFT", "step by step")),
        },
        minutes=20,
    ),
    "dropout": Experiment(
        paper="InternVL-2.5-MPO (arXiv:2411.10442v2, Tables 4 and 9)",
        says="Pairs of DropoutNTP lessen hallucination (Object HalBench, mentions): 4.1% where half of an "
             "answer is kept, 4.8% at a quarter, 6.2% at three quarters.",
        setup="MPO on pairs of one kind; the finetuning has met conversations without a picture.",
        rows={
            "before": [BEFORE],
            "correctness alone": prefer("", "correctness"),
            "a quarter kept": prefer("", "dropout 0.25"),
            "half kept": prefer("", "dropout 0.5"),
            "three quarters kept": prefer("", "dropout 0.75"),
        },
        columns={"made up": made_up, "caption": score("caption"), "direct": score("reasoning"),
                 "step by step": score("cot")},
        claims={
            "less is made up than before": (("before", "made up"), ">", ("half kept", "made up")),
            "half is better than a quarter": (("a quarter kept", "made up"), ">", ("half kept", "made up")),
            "or three quarters": (("three quarters kept", "made up"), ">", ("half kept", "made up")),
        },
        minutes=15,
    ),
}

EXPERIMENTS = LLAVA | PRISMATIC | MPO
