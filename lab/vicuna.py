"""toy-vicuna: a Llama that has never seen a picture, trained on pictures that are spelled.

Its tokenizer is learned from what the toy world says (toyworld.py), in 896 pieces. A picture is 64
patches in reading order, each the sum of the embeddings of the words that are true of it (column "c", row
"5", "red", "cat", "small", "top", "left"); then come questions and answers. So it knows words, counting
and space, and all that is left for the connector is to turn patches into such words. (A real Vicuna
learned from text alone, and LLaVA shows it 1.2 million pictures before it reads them well.)

It has read of blue cats, as any language model has: without that it took them for impossible and did not
find them even when told.
"""

import math
import random
import re
import statistics
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F

import toyworld
from benchmarks.own import is_right
from conversation import encode_conversation
from data import pad_rows
from lab.common import bfloat16, fit_part, spell, sum_of_words, write_half
from model import IGNORE, PRESETS, Decoder
from support.export import TO_LLAMA, llama_json
from support.start import init_weights
from support.templates import SYSTEM_VICUNA

# LLaVA's requests for a caption (arXiv:2304.08485).
BRIEF = (
    "Provide a brief description of the given image.",
    "Give a short and clear explanation of the image.",
    "Describe the image concisely.",
    "Write a terse but informative summary of the picture.",
)
HARD = ("choice", "count", "box")                # categories that are asked about more often


def sayings(n_scenes=2000):
    """What is said of training scenes, in lines for train_tokenizer.

    At 896 pieces every word of ask_all() is one piece, and so is every coordinate: a box is always 8.
    """
    numbers = [f"{x / toyworld.GRID:.2f}" for x in range(toyworld.GRID + 1)]
    lines = []
    for i in range(n_scenes):
        rng = random.Random(f"tokenizer {i}")
        scene = toyworld.random_scene(rng)
        pairs = [(question, answer) for _, question, answer in toyworld.ask_all(scene, rng)]
        pairs.append((rng.choice(BRIEF), toyworld.caption(scene)))
        pairs.append(("", toyworld.describe(scene, boxes=False)))

        texts = [f"{SYSTEM_VICUNA} USER: {question} ASSISTANT: {answer}" for question, answer in pairs]
        texts += [f"[{n}, {n}" for n in numbers]         # all of them alike: in boxes some would be rare
        # Split where a piece must end: "5," or "3." as one piece would break the numbers up.
        lines += re.split(r"[\n,\]]|\.(?!\d)", "\n".join(texts))
    return lines


def make_vicuna(out, tok, cfg):
    fit_decoder(out, tok, cfg, make_lesson, ask_held_out)


def fit_decoder(out, tok, cfg, make_lesson, ask):
    """make_lesson(tok, rng, progress) -> tokens, labels, spelled

    ask(tok, scene, rng) -> [(category, a lesson of one answer, the answer), ...], for answers_found.
    """
    decoder = init_weights(Decoder(replace(PRESETS["toy"].decoder, vocab_size=tok.n_text)))

    def lr_at(step):
        return 1e-3 * min(1, step / 100, (cfg.steps - step) / (0.4 * cfg.steps))

    def loss_at(step):
        rngs = [random.Random(f"{cfg.seed} {step} {i}") for i in range(32)]
        lessons = [make_lesson(tok, rng, step / cfg.steps) for rng in rngs]
        with bfloat16():
            loss, _ = text_loss(decoder, tok, lessons, noise=0.2)
        return loss

    def look():
        config = llama_json(decoder.cfg) | {"architectures": ["LlamaForCausalLM"]}
        write_half(out, decoder.state_dict(), TO_LLAMA, config)
        return answers_found(decoder, tok, ask)

    fit_part(out, cfg, decoder, lr_at, loss_at, look)


def text_loss(decoder, tok, lessons, noise=0.0):
    """Mean loss over the answers' tokens, and what was guessed for each: of every lesson the ids."""
    tokens, labels, spelled = zip(*lessons)
    tokens = pad_rows(tokens, tok.pad, 32)               # so that few shapes occur
    labels = pad_rows(labels, IGNORE, 32)[:, 1:]
    spelled = torch.tensor(spelled)

    # The spelled picture takes the rows of the image tokens, as a seen one does.
    table = decoder.embed_tokens.weight
    patches = sum_of_words(spelled, table)
    patches = patches + noise * table.detach().std() * torch.randn_like(patches)
    x = decoder.embed_tokens(tokens.clamp(max=tok.n_text - 1))
    x = x.masked_scatter((tokens == tok.image)[..., None], patches)

    supervised = labels != IGNORE
    logits = decoder.lm_head(decoder(x)[:, :-1][supervised])
    guesses = logits.argmax(-1).split(supervised.sum(1).tolist())
    return F.cross_entropy(logits, labels[supervised]), guesses


@torch.no_grad()
def answers_found(decoder, tok, ask):
    """{category: share of right answers} about held-out pictures in words; ask() as in fit_decoder.

    A token is guessed after the true ones before it.
    """
    asked = defaultdict(list)
    for i in range(64):
        rng = random.Random(f"told {i}")
        scene = toyworld.random_scene(rng, held_out=True)
        for category, *lesson_and_answer in ask(tok, scene, rng):
            asked[category].append(lesson_and_answer)

    found = {}
    for category, pairs in asked.items():
        lessons, answers = zip(*pairs)
        _, guesses = text_loss(decoder, tok, lessons)
        guesses = [tok.decode(ids[:-1]) for ids in guesses]                 # without the end token
        found[category] = statistics.mean(map(is_right, guesses, answers))
    return found


def ask_held_out(tok, scene, rng):
    for category, question, answer in toyworld.ask_all(scene, rng):
        yield category, make_conversation(tok, [(question, answer)], spell(scene, tok)), answer


# ---- a lesson: a picture in words, then what there is to say of it ----


def make_lesson(tok, rng, progress):
    """-> tokens, labels, spelled. In half of the lessons other words stand for some kinds and colors.

    To name what a patch says, whatever that is, is a better habit than to know which kinds have which colors.
    """
    tokens, labels, spelled = plain_lesson(tok, rng, progress)
    asks_for_legs = tok.encode("legs")[-1] in tokens
    if rng.random() < 0.5 or asks_for_legs:              # who could count the legs of a word?
        return tokens, labels, spelled

    # Words that do not occur here, for all the forms of some names.
    names = [tok.encode(toyworld.plural(kind)) + tok.encode(kind) for kind in toyworld.KINDS]
    names += [tok.encode(color) for color in toyworld.COLORS]
    taken = set(tokens).union(*names, *spelled)
    others = set(range(tok.n_text)) - taken
    free = [i for i in sorted(others) if re.fullmatch(r"\u2581[A-Za-z]{3,}", tok.piece(i))]
    other = {}
    for name, new in zip(names, rng.sample(free, len(names))):
        if rng.random() < 0.5:
            other |= dict.fromkeys(name, new)

    def put_others(ids):
        return [other.get(token, token) for token in ids]

    return put_others(tokens), put_others(labels), [put_others(ids) for ids in spelled]


FORMS = ("terse", "bare", "conversation")
SHARES = {                                       # of the forms, until so much of the training is done
    0.15: (1, 0, 0),
    0.3: (0.4, 0.6, 0),
    0.5: (0.2, 0.4, 0.4),
    math.inf: (0.05, 0.2, 0.75),
}


def plain_lesson(tok, rng, progress):
    """First terse questions ("color cat": "red"), then bare ones without a format prompt, then conversations.

    Where the answer follows the word it depends on, finding it is learned within 300 steps; with a format
    prompt between them, not within 1,600.
    """
    scene = toyworld.random_scene(rng, held_out=rng.random() < 0.25)
    shares = next(shares for until, shares in SHARES.items() if progress < until)
    form, = rng.choices(FORMS, shares)
    spelled = spell(scene, tok, rng)
    asked = toyworld.ask_all(scene, rng)
    more = toyworld.ask_all(scene, rng) + toyworld.ask_all(scene, rng)
    asked += [item for item in more if item[0] in HARD and item not in asked]

    if form == "conversation":
        pairs = []
        for _, question, answer in rng.sample(asked, min(5, len(asked))):
            if rng.random() < 0.25:
                question = toyworld.without_format(question)
            pairs.append((question, answer))
        if rng.random() < 0.3:
            pairs.append((toyworld.DETAIL, toyworld.describe(scene)))
        return make_conversation(tok, pairs, spelled)

    if form == "terse":
        pairs = terse_pairs(scene, rng)
    else:
        pairs = [(toyworld.without_format(question), answer) for _, question, answer in asked]
    pairs = list(dict.fromkeys(pairs))
    rng.shuffle(pairs)
    return *encode_lines(tok, pairs, len(spelled)), spelled


def make_conversation(tok, pairs, spelled):
    turns = []
    for question, answer in pairs:
        turns += [("human", question), ("gpt", answer)]
    return *encode_conversation(tok, turns, "vicuna_v1", [len(spelled)]), spelled


def encode_lines(tok, pairs, n_visual):
    """-> tokens, labels: a question and its answer a line. A line that does not fit into 256 is left out."""
    tokens = [tok.bos] + [tok.image] * n_visual
    labels = [IGNORE] * len(tokens)
    for question, answer in pairs:
        q = tok.encode("\n" + question, dummy_prefix=False)
        a = tok.encode(" " + answer, dummy_prefix=False)
        if len(tokens) + len(q) + len(a) <= 256:
            tokens += q + a
            labels += [IGNORE] * len(q) + a
    return tokens, labels


# ---- terse questions: a few words, the last of them what is asked about ----


def terse_pairs(scene, rng):
    """-> [(question, answer), ...]"""
    pairs = []
    first = scene.things[0]
    for name in [*rng.sample(toyworld.KINDS, 2), first.kind, rng.choice(list(toyworld.COLORS)), first.color]:
        n = sum(name in (thing.kind, thing.color) for thing in scene.things)
        pairs.append((f"how many {name}", str(n)))

    # A caption, step by step.
    names = [f"{part.color} {part.kind}" if part in scene.things else part.word for part in scene.parts]
    pairs += [(f"after {name}", following) for name, following in zip(names, names[1:] + ["none"])]
    pairs.append(("first", names[0]))

    for thing in scene.things:
        pairs += terse_about(thing, scene, rng)
    for _ in range(3):
        if found := toyworld.ask_spatial(scene, rng):
            question, answer = found
            pairs.append((re.sub(r"^Is | ?\bthe\b|\?\n.*", "", question).strip(), answer))
    pairs.append(("all", toyworld.caption(scene)))
    pairs.append(("sign", scene.sign.word if scene.sign else "none"))
    return pairs


def terse_about(thing, scene, rng):
    """What is asked about one thing."""
    kind, color, place = thing.kind, thing.color, thing.place
    name = toyworld.short_phrase(thing, scene).removeprefix("the ")
    pairs = [(f"color {kind}", color)] if name == kind else []
    pairs += [
        (f"size {name}", thing.size),
        (f"place {name}", place),
        (f"thing {place}", kind),
        (f"box {name}", toyworld.coordinates(thing.box)),
        (f"any {color} {kind}", "yes"),
    ]

    # Something that is not there: any other pair, or one that is half right.
    far = rng.choice(toyworld.KINDS), rng.choice(list(toyworld.COLORS))
    half_right = [(kind, c) for c in toyworld.COLORS] + [(k, color) for k in toyworld.KINDS]
    near = rng.choice(half_right)
    absent = rng.choice((far, near))
    nameable = toyworld.nameable_pairs(scene)
    if not toyworld.count_things(scene, *absent) and absent in nameable:
        pairs.append((f"any {absent[1]} {absent[0]}", "no"))

    # The letter of the right option, and of a given word, too.
    question, right, values = rng.choice((
        (f"thing {place}", kind, toyworld.KINDS),
        (f"place {name}", place, toyworld.PLACES),
        (f"color {kind} {place}", color, [c for k, c in nameable if k == kind]),
    ))
    options, letter = toyworld.give_letters(right, [value for value in values if value != right], rng)
    listed = " ".join(options)
    pairs.append((f"{question} {listed}", letter))
    pairs.append((f"{listed} {right}", letter))
    return pairs
