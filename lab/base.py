"""toy-base: as large as toy-vicuna, but it has never read a question. It is what Llama-2 is to Vicuna.

It reads pictures that are spelled, as in lab/vicuna.py, and after each a text of true statements, in random
order and number: no question, no template, no format prompt, no letters of options. Some texts are notes,
where what is told follows the word it depends on: that is learned sooner.
"""

import re
import shutil

import toyworld
from benchmarks.common import COT
from lab.common import spell
from lab.vicuna import fit_decoder, terse_pairs
from model import IGNORE

# A question of the toy world and its answer -> a statement; what has none here goes unsaid. The part after
# the "|" follows from the picture and the words before it.
STATEMENTS = {
    toyworld.CAPTION + " (.*)": r"|\1",
    toyworld.DETAIL + " (.*)": r"The picture has| \1.",
    toyworld.BOX + r"(.*)\. (.*)": r"The region of \1 is| \2.",
    re.escape(COT) + r"[^?]*\? (.*) (\d+\D*)\n.*": r"\1| \2",
    r"(?:What color is|Is) the (\w+)\b.* Unanswerable": r"A \1 is| not in the image.",
    r"What word .* Unanswerable": r"A sign is| not in the image.",
    r"Is there (.*) in the image\? yes": r"\1 is| in the image.",
    r"Is there (.*) in the image\? no": r"\1 is| not in the image.",
    r"Is (.*?) (to the \w+ of|above|below) (.*)\? yes": r"That \1 is \2 \3 is| so.",
    r"Is (.*?) (to the \w+ of|above|below) (.*)\? no": r"That \1 is \2 \3 is| not so.",
    r"How many (\w+|\w+ things) are there\? (\d)": r"Of \1 there are| \2.",
    r"What is the thing (.*)\? (\w+)": r"The thing \1 is a| \2.",
    r"What color is (.*)\? (\w+)": r"The color of \1 is| \2.",
    r"Is (.*) small or big\? (\w+)": r"\1 is a| \2 one.",
    r"What word is on the sign\? (\w+)": r"The sign says| \1.",
    # as people talk
    r"(?:What color is|Is) (.*?)(?: small or big)?\? It is (.*)": r"\1 is \2",
    r"Where is (.*)\? It is (.*)": r"\1 can be found| \2",
    r"What is (.*)\? It is (.*)": r"\1 is| \2",
    r"What is (.*)\? There is nothing.": r"\1 is| no thing.",
    r".*\? (There .*)": r"\1",
}


def make_base(out, tok, cfg):
    out.mkdir(exist_ok=True)
    shutil.copy(tok.path, out)
    fit_decoder(out, tok, cfg, make_text, tell_held_out)


def make_text(tok, rng, progress):
    """-> tokens, labels, spelled. Notes at first, later mostly sentences."""
    scene = toyworld.random_scene(rng, held_out=rng.random() < 0.25)
    if rng.random() < max(0.1, 1 - 2 * progress):
        said = make_notes(scene, rng)
    else:
        said = [text for _ in range(2) for _, text in make_statements(scene, rng)]
    rng.shuffle(said)
    said = dict.fromkeys(said[:rng.randint(4, 40)])
    text = "|" + " ".join(said).replace("|", "")
    return encode_text(tok, text, spell(scene, tok, rng))


def make_notes(scene, rng):
    """["color cat red.", "count ball 2.", "any blue fish no.", ...]"""
    pairs = [pair for pair in terse_pairs(scene, rng) if pair[1] not in "ABCD"]
    return [f"{topic.replace('how many', 'count')} {told.rstrip('.')}." for topic, told in pairs]


def tell_held_out(tok, scene, rng):
    """(category, text, its end) of each statement whose end can be told"""
    for category, text in make_statements(scene, rng):
        if "|" in text:
            yield category, encode_text(tok, text, spell(scene, tok)), text.split("|")[1]


def encode_text(tok, text, spelled):
    """-> tokens and labels, at most 256, and spelled. What follows the "|" is supervised."""
    start, end = text.split("|")
    before = [tok.bos] + [tok.image] * len(spelled) + tok.encode(start)
    supervised = [*tok.encode(end, dummy_prefix=not start), tok.eos]
    labels = [IGNORE] * len(before) + supervised
    return (before + supervised)[:256], labels[:256], spelled


def make_statements(scene, rng):
    """[(category, statement), ...], all true"""
    asked = toyworld.ask_all(scene, rng)
    asked += [("chat", *toyworld.ask_chat(scene, rng)) for _ in range(4)]
    asked.append(("description", toyworld.DETAIL, toyworld.describe(scene, boxes=False)))
    said = []
    for category, question, answer in asked:
        both = f"{toyworld.without_format(question)} {answer}"
        for pattern, statement in STATEMENTS.items():
            if found := re.fullmatch(pattern, both):
                text = found.expand(statement)
                said.append((category, text[0].upper() + text[1:]))
                break
    return said
