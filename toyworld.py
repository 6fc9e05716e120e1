"""The toy world: small drawn pictures and every kind of question the papers ask, with nothing to download.

A scene is a soft background, one to four things and sometimes a sign with a word on it. A thing has a kind,
a color, a size and a place in a 3x3 grid. As the scene is known, so is the right answer to any question:
    picture = draw_scene(scene)         # any size: all coordinates are fractions of the side
    caption(scene), describe(scene)     # "A red cat, a blue ball and a sign that says OPEN."
    ask_all(scene, rng)                 # [(category, question with its format prompt, answer), ...]

The eight (kind, color) pairs of UNSEEN never occur in training, and every validation picture shows one: a
model that learned the pairs by heart fails there, one that learned kinds and colors apart does not.

Each category stands for a benchmark: existence POPE, count TallyQA, attribute GQA, spatial VSR, box RefCOCO,
choice MMBench, reading TextVQA, unanswerable VizWiz, reasoning and cot M3CoT. The format prompts are those of
LLaVA-1.5 (arXiv:2310.03744v2) and InternVL-2.5-MPO (arXiv:2411.10442). A twelfth category, chat, asks as
people do, without one.

    python toyworld.py                  # toyworld/: 6000 training and 240 validation pictures, 6 s
    python toyworld.py --hello cat.jpg  # one large picture to ask about; with --seed 1, 2, ... another one
    python toyworld.py --out small --size 192 --words 0.5     # signs that only a look from close by can read
"""

import functools
import itertools
import os
import random
import re
import shutil
import signal
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw

from benchmarks.common import COT, INSUFFICIENT, LETTER, SHORT, iou
from support.cli import Bar, UserError, arg, parse, run_program
from support.io import read_json, write_json, write_json_lines


@dataclass
class WorldConfig:
    out: str = arg("toyworld", "folder to write; must not exist yet, unless it holds this very world")
    train: int = arg(6000, "number of training pictures", at_least=1)
    val: int = arg(240, "number of validation pictures, each with an UNSEEN thing", at_least=1)
    size: int = arg(96, "side of a picture in pixels", at_least=1)
    seed: int = arg(0, "another seed, another world")
    words: float = arg(1.0, "size of the signs: 0.5 draws them half as large", above=0, at_most=1)
    hello: str = arg("", "write one 480-pixel picture to this file, and nothing else; --seed N: another one")


VERSION = 4                              # of pictures and questions: raise it when either changes
COLORS = {
    "red": "#d8282a",
    "orange": "#fa8a18",
    "yellow": "#fade32",
    "green": "#2c9e44",
    "blue": "#265cde",
    "purple": "#923aba",
    "white": "#fcfcfc",
    "black": "#222228",
}
GRID = 20                                # in steps of a box: 1/20 of the side, so two decimals say it exactly
KINDS = tuple("cat fish bird tree house car ball star".split())
SQUARE = ((4, 4), (6, 6))                # width and height in grid steps, small and big
WIDE = ((4, 3), (7, 5))
TALL = ((3, 4), (5, 7))
SIDES = dict.fromkeys(KINDS, SQUARE) | {"fish": WIDE, "tree": TALL, "car": WIDE}
SIZES = ("small", "big")
LEGS = {"cat": 4, "bird": 2, "fish": 0}
PLACES = "top left, top, top right, left, middle, right, bottom left, bottom, bottom right".split(", ")
BACKGROUNDS = "meadow beach night room snow".split()
WORDS = "STOP OPEN TAXI CAFE PARK SALE BUS ZOO INN GYM EXIT SHOP".split()
UNSEEN = set(zip(KINDS, "blue red white orange purple green black yellow".split()))  # of each kind one color

# ---- what is said around a question ----
DETAIL = "Give a detailed description of the image."
CAPTION = "Provide a one-sentence caption for the provided image."
LOOK = (
    "What is in the picture?",
    "What do you see?",
    "What does the picture show?",
    "Describe the picture.",
    "What is in this image?",
)
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "


# ---- scenes ----


@dataclass(frozen=True)
class Thing:
    kind: str
    color: str
    size: str                            # small or big
    place: str
    box: tuple                           # x1, y1, x2, y2 as fractions of the side


@dataclass(frozen=True)
class Sign:
    word: str
    place: str
    box: tuple


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple                        # in reading order: row by row, left to right
    sign: Sign | None = None

    @property
    def parts(self):
        """The things and the sign, in reading order."""
        return reading_order([*self.things, self.sign] if self.sign else self.things)


def random_scene(rng, held_out=False):
    """A training scene holds no UNSEEN pair, a held-out one at least one. No pair stands twice in a scene."""
    chosen = random_pairs(rng, held_out)
    sizes = [rng.randrange(2) for _ in chosen]
    word = rng.choice(WORDS) if rng.random() < 0.4 else None

    # Things and sign, each in a cell of its own, without overlap.
    sides = [SIDES[kind][size] for (kind, _), size in zip(chosen, sizes)]
    if word:
        sides.append((len(word) + 4, 4))
    spots = random_spots(rng, sides)

    things = [Thing(*pair, SIZES[size], *spot) for pair, size, spot in zip(chosen, sizes, spots)]
    background = rng.choice(BACKGROUNDS)
    sign = Sign(word, *spots[-1]) if word else None
    return Scene(background, tuple(reading_order(things)), sign)


def random_pairs(rng, held_out):
    """One to four different (kind, color) pairs, often alike in kind or color."""
    pairs = all_pairs(held_out)
    chosen = [rng.choice(sorted(UNSEEN) if held_out else pairs)]
    first_kind, first_color = chosen[0]
    # Left to chance, nearly every count would be 0 or 1.
    alike = rng.choice(("kind", "kind", "color", "neither"))
    n = rng.choices((1, 2, 3, 4), (1, 2, 3, 4))[0]
    while len(chosen) < n:
        kind, color = rng.choice(pairs)
        if rng.random() < 0.75:
            kind = first_kind if alike == "kind" else kind
            color = first_color if alike == "color" else color
        if (kind, color) in pairs and (kind, color) not in chosen:
            chosen.append((kind, color))
    return chosen


def all_pairs(held_out):
    return [(kind, color) for kind in KINDS for color in COLORS if held_out or (kind, color) not in UNSEEN]


def random_spots(rng, sides):
    """(place, box) for each (width, height) in grid steps: all are thrown again until none overlap."""
    while True:
        cells = rng.sample(range(9), len(sides))
        boxes = []
        for cell, (w, h) in zip(cells, sides):
            x = random_offset(rng, cell % 3, w)
            y = random_offset(rng, cell // 3, h)
            boxes.append((x, y, x + w, y + h))
        if not any(iou(a, b) for a, b in itertools.combinations(boxes, 2)):
            return [(PLACES[cell], tuple(v / GRID for v in box)) for cell, box in zip(cells, boxes)]


def random_offset(rng, cell, side):
    """Where a side of that length may begin, in grid steps: its middle well inside its cell (0, 1 or 2)."""
    low = cell * GRID / 3 + 1
    high = (cell + 1) * GRID / 3 - 1
    fitting = [x for x in range(GRID - side + 1) if low <= x + side / 2 <= high]
    return rng.choice(fitting)


def shrink_sign(scene, scale):
    """The sign smaller, its middle where it was: all that is said of the scene stays true."""
    sign = scene.sign
    if sign is None or scale == 1:
        return scene
    x1, y1, x2, y2 = sign.box
    w, h = (x2 - x1) * scale / 2, (y2 - y1) * scale / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return replace(scene, sign=replace(sign, box=(x - w, y - h, x + w, y + h)))


def reading_order(parts):
    return sorted(parts, key=lambda part: PLACES.index(part.place))


# ---- drawing ----
# ART lists paints and the shapes they fill, in percent of a box; four numbers are an oval, more a polygon.

SUPER = 4                                # drawn this much larger, then averaged down: PIL has no antialiasing
OUTLINE = 0.011                          # of the picture's side
ART = {
    "cat": """
        body: 60 99 74 99 86 94 94 84 97 70 96 60 100 50 98 43 92 42 87 48 85 60 86 70 83 79 76 85 64
        88, 10 44 72 100, 6 40 2 0 34 14, 72 40 78 0 46 14, 0 8 80 62; shade: 10 22 9 10 20 16, 70 22 71
        10 60 16, 20 86 38 100, 44 86 62 100; white: 15 24 35 44, 45 24 65 44; #1e1c24: 22 26 31 43, 49
        26 58 43; #ec8c96: 35 45 45 45 40 51; line ink: 30 49 4 46, 30 49 4 53, 50 49 76 46, 50 49 76 53
    """,
    "fish": """
        body: 0 12 74 94, 62 53 100 8 92 53 100 100, 28 18 44 0 62 6 60 26; shade: 90 52 72 50 95 22, 90
        56 72 58 95 84, 40 52 60 42 58 68; line edge: 30 22 34 38 34 66 30 84; white: 10 32 26 54;
        #1e1c24: 13 37 22 50; line ink: 7 68 14 73 21 70
    """,
    "bird": """
        #966432: 38 82 41 82 41 96 49 96 49 101 38 101, 52 82 55 82 55 96 63 96 63 101 52 101, 82 14 100
        27 82 36; #e8a846: 84 18 97 27 84 32; body: 20 44 0 30 2 52 16 70, 8 32 78 88, 46 0 90 50;
        shade: 18 46 58 42 54 66 36 74; line edge: 18 46 36 74 54 66 58 42; white: 62 12 78 28; #1e1c24:
        67 15 76 25
    """,
    "tree": """
        #604634: 38 60 62 60 68 101 32 101; #84644c: 43 60 55 60 58 98 42 98; body: 0 30 56 74, 44 30
        100 74, 14 0 86 56, 24 40 76 80; light: 26 10 46 20, 10 40 24 47, 60 38 74 45; shade: 54 20 68
        27, 30 60 46 67, 74 58 88 65, 38 36 50 42
    """,
    "house": """
        body: 72 30 72 6 88 6 88 44, 9 42 91 42 91 100 9 100, 0 50 50 0 100 50; shade: 4 48 50 3 96 48;
        line edge: 4 50 96 50; edge: 16 58 38 58 38 80 16 80, 62 58 84 58 84 80 62 80; #604634: 42 66 58
        66 58 99 42 99; #faf0c4: 19 61 35 61 35 77 19 77, 65 61 81 61 81 77 65 77, 43 22 57 36, 52 80 56
        85; line edge: 27 60 27 78, 73 60 73 78
    """,
    "car": """
        body: 20 42 30 0 66 0 82 42, 0 52 6 42 90 42 100 56 100 80 0 80; #deecf2: 28 38 35 10 46 10 46
        38, 51 38 51 10 62 10 72 38; shade: 2 66 98 66 98 78 2 78; line edge: 48.5 10 48.5 66; #fff4be:
        91 50 99 62; #28282e: 12 58 37 102, 64 58 89 102; #c4c6ce: 19.5 71 29.5 89, 71.5 71 81.5 89
    """,
    "ball": """
        body: 0 0 100 100; shade: 30 1 70 99; plain: 40 1 60 99; shade: 42 2 58 12; light: 12 20 28 40
    """,
    "star": """
        body: 50 0 64 34 100 38.2 73 62.6 80.9 100 50 81.5 19.1 100 27 62.6 0 38.2 36 34; ink: 36 42 44
        55, 56 42 64 55; light: 26 52 35 59, 65 52 74 59; line ink: 42 62 46 66 54 66 58 62
    """,
    "sign": """
        #5c4230: 47 50 53 50 53 102 47 102, 3 -2 97 -2 101 4 101 76 97 81 3 81 -1 76 -1 4; #faf0d6: 4 7
        96 7 96 72 4 72
    """,
    "meadow": """
        #d0e5f0: -1 -1 101 -1 101 101 -1 101; #deecf2: 10 10 34 20, 20 6 44 19, 62 20 90 29; #cae0c4:
        -30 50 80 140, 30 54 150 140; line #b8d2b2: 8 79 10 82 12 78, 28 65 30 68 32 64, 48 87 50 90 52
        86, 68 69 70 72 72 68, 88 83 90 86 92 82
    """,
    "beach": """
        #d6e8f0: -1 -1 101 -1 101 50 -1 50; #bad6dc: -1 45 101 45 101 70 -1 70; #eee4cc: -1 66 101 66
        101 101 -1 101, -20 61 60 76; line #cce2e6: 9 51 12 50 15 51 18 50 21 51, 49 56 52 55 55 56 58
        55 61 56, 74 50 77 49 80 50 83 49 86 50
    """,
    "night": """
        #707690: -1 -1 101 -1 101 101 -1 101; #7c829a: 70 6 90 26; #707690: 65 4 84 22; #8e94aa: 8 10 9
        11, 25 30 26 31, 45 8 46 9, 60 33 61 34, 90 42 91 43, 14 50 15 51, 38 48 39 49; #626a78: -40 66
        80 150, 20 72 150 150
    """,
    "room": """
        #e6dcd4: -1 -1 101 -1 101 71 -1 71; #d0beac: -1 70 101 70 101 101 -1 101; #dccec2: -1 68 101 68
        101 71 -1 71; line #c6b4a2: -1 80 101 80, -1 91 101 91, 20 71 20 80, 60 71 60 80, 40 80 40 91,
        85 80 85 91, 25 91 25 101
    """,
    "snow": """
        #ced8e6: -1 -1 101 -1 101 101 -1 101; #e4eaf1: -40 55 90 150, 30 50 160 150, 10 10 12 12, 30 22
        32 24, 55 7 57 9, 80 16 82 18, 93 36 95 38, 16 40 18 42
    """,
}
# A letter's strokes on a grid 4 wide and 6 high; a point is two digits, x y.
STROKES = """
    A 06 02 20 42 46,04 44
    B 00 30 41 42 33 03,33 44 45 36 06 00
    C 41 30 10 01 05 16 36 45
    E 40 00 06 46,03 33
    F 40 00 06,03 33
    G 41 30 10 01 05 16 36 45 43 23
    H 00 06,40 46,03 43
    I 10 30,20 26,16 36
    K 00 06,40 03 46
    L 00 06 46
    M 06 00 23 40 46
    N 06 00 46 40
    O 10 30 41 45 36 16 05 01 10
    P 06 00 30 41 43 34 04
    R 06 00 30 41 42 33 03,23 46
    S 41 30 10 01 02 13 33 44 45 36 16 05
    T 00 40,20 26
    U 00 05 16 36 45 40
    X 00 46,40 06
    Y 00 23 40,23 26
    Z 00 40 06 46
"""
LETTERS = dict(line.split(maxsplit=1) for line in STROKES.strip().splitlines())


def draw_scene(scene, size=96):
    """The picture, size x size RGB. Nothing is random: the same scene always gives the same pixels."""
    px = SUPER * size
    image = draw_background(scene.background, px).copy()

    pen = ImageDraw.Draw(image, "RGBA")          # RGBA only for the soft shadows
    for thing in scene.things:
        left, right = on_canvas(thing.box, px, [(0.08, 1), (0.92, 1)])
        oval = (left[0], left[1] - 0.025 * px, *right)
        pen.ellipse(oval, fill=(40, 40, 60, 70))

    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        paint_art(pen, px, thing.box, thing.kind, palette(thing.color))
    if scene.sign:
        paint_art(pen, px, scene.sign.box, "sign", {})
        paint_word(pen, px, scene.sign)
    return image.reduce(SUPER)


@functools.cache
def draw_background(name, px):
    """Pale and soft, so that all eight colors stand out. The night is grey: a black cat must show, too."""
    image = Image.new("RGB", (px, px))
    paint_art(ImageDraw.Draw(image), px, (0, 0, 1, 1), name, {})
    return image


def paint_art(pen, px, box, name, colors):
    half = OUTLINE / 2 * px
    for how, shapes in parse_art(ART[name]):
        paint = how.split()[-1]
        color = colors.get(paint, paint)
        shapes = [on_canvas(box, px, shape) for shape in shapes]
        if how == "body":
            # First all edges, then all insides: one silhouette without edges within.
            for points in shapes:
                paint_edge(pen, points, colors["edge"], half)
        for points in shapes:
            if how.startswith("line"):
                pen.line(points, color, max(1, round(half)))
            elif len(points) == 2:
                pen.ellipse(points, color)
            else:
                pen.polygon(points, color)


def paint_edge(pen, points, color, half):
    if len(points) == 2:
        (x1, y1), (x2, y2) = points
        pen.ellipse((x1 - half, y1 - half, x2 + half, y2 + half), color)
    else:
        thick_line(pen, points + points[:1], color, 2 * half)


def paint_word(pen, px, sign):
    """The letters of a sign: each is 4 steps wide, and 2 steps apart."""
    step = 0.82 / (6 * len(sign.word) - 2)
    height = sign.box[3] - sign.box[1]           # usually 4 steps of the grid
    thick = 0.016 * px * round(height * GRID / 4, 6)
    for i, letter in enumerate(sign.word):
        for line in LETTERS[letter].split(","):
            points = []
            for column, row in line.split():
                x = 0.09 + step * (6 * i + int(column))
                y = 0.175 + 0.075 * int(row)
                points.append((x, y))
            thick_line(pen, on_canvas(sign.box, px, points), "#342622", thick)


def thick_line(pen, points, color, width):
    """A thick line with round ends and corners."""
    pen.line(points, color, round(width))
    r = width / 2
    for x, y in points:
        pen.ellipse((x - r, y - r, x + r, y + r), color)


def on_canvas(box, px, points):
    """Fractions of the box -> pixels of the large picture, with room for the outer half of the outline."""
    x1, y1, x2, y2 = box
    x = x1 + OUTLINE / 2
    y = y1 + OUTLINE / 2
    w = x2 - x1 - OUTLINE
    h = y2 - y1 - OUTLINE
    return [((x + w * u) * px, (y + h * v) * px) for u, v in points]


@functools.cache
def parse_art(art):
    """[(paint, [[(x, y), ...] of each shape]), ...]"""
    found = []
    for row in art.split(";"):
        paint, shapes = row.split(":")
        found.append((paint.strip(), [parse_points(shape) for shape in shapes.split(",")]))
    return found


def parse_points(shape):
    numbers = [float(number) / 100 for number in shape.split()]
    return list(zip(numbers[::2], numbers[1::2]))


def palette(name):
    """The paints of a thing: its own color, one of COLORS or any "#rrggbb", and what goes with it."""
    color = ImageColor.getrgb(COLORS.get(name, name))

    def mix(other, share):
        return tuple(round(a + (b - a) * share) for a, b in zip(color, other))

    paints = {
        "body": color,
        "plain": color,
        "edge": mix((0, 0, 0), 0.55),
        "shade": mix((40, 40, 70), 0.18),
        "light": mix((255, 255, 255), 0.45),
        "ink": "#1e1c24",
    }
    if max(color) < 100:                         # dark
        paints |= {"edge": (206, 206, 214), "shade": mix((255, 255, 255), 0.2), "ink": "#f0f0f4"}
    elif min(color) > 195:                       # pale
        paints["edge"] = (104, 104, 118)
    return paints


HELLO = Scene(                                   # the picture of the README's first question
    "meadow",
    (
        Thing("ball", "blue", "small", "top right", (0.70, 0.10, 0.90, 0.30)),
        Thing("cat", "red", "big", "left", (0.10, 0.35, 0.40, 0.65)),
    ),
    Sign("EXIT", "bottom right", (0.55, 0.70, 0.95, 0.90)),
)


# ---- what is said of a scene ----


def caption(scene):
    """A red cat, a blue ball and a sign that says OPEN."""
    *others, last = [name_part(part) for part in scene.parts]
    text = f"{', '.join(others)} and {last}" if others else last
    return f"A{text[1:]}."                       # it begins with a or an


def name_part(part):
    if isinstance(part, Sign):
        return f"a sign that says {part.word}"
    return f"{with_article(part.color)} {part.kind}"


def describe(scene, boxes=True):
    """LLaVA's detailed descriptions: all there is to say, boxes as in Shikra (arXiv:2306.15195)."""
    said = []
    for part in scene.parts:
        if isinstance(part, Thing):
            text = f"a {part.size} {part.color} {part.kind} {at_place(part)}"
        else:
            text = f"a sign {at_place(part)} that says {part.word}"
        said.append(f"{text} {coordinates(part.box)}" if boxes else text)
    return "; ".join(said)


def with_article(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def at_place(part):
    return f"{'in' if part.place == 'middle' else 'at'} the {part.place}"


def coordinates(box):
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"


def plural(kind):
    return kind if kind == "fish" else kind + "s"


def count_noun(n, kind):
    """1 cat, 2 cats, 2 fish, no cats."""
    return f"{n} {kind if n == 1 else plural(kind)}"


def there_are(n, kind):
    return f"There {'is' if n == 1 else 'are'} {count_noun(n, kind)}"


def short_phrase(thing, scene):
    """The shortest phrase that means this thing only."""
    if count_things(scene, thing.kind) == 1:
        return f"the {thing.kind}"
    return f"the {thing.color} {thing.kind}"


def count_things(scene, kind=None, color=None):
    return sum(kind in (None, thing.kind) and color in (None, thing.color) for thing in scene.things)


def nameable_pairs(scene):
    """Pairs a question may name: all, but a training scene must not teach that UNSEEN ones do not exist."""
    return all_pairs(any((thing.kind, thing.color) in UNSEEN for thing in scene.things))


# ---- questions: each function asks one and answers it, or returns None where the scene allows none ----


def ask_caption(scene, rng):
    return CAPTION, caption(scene)


def ask_existence(scene, rng):
    """Is there a red cat in the image? -> yes"""
    shown = [(thing.kind, thing.color) for thing in scene.things]
    kinds, colors = zip(*shown)
    answer = rng.choice(("yes", "no"))
    if rng.random() < 0.3:
        name = rng.choice([kind for kind in KINDS if (kind in kinds) == (answer == "yes")])
    else:
        absent = [pair for pair in nameable_pairs(scene) if pair not in shown]
        if rng.random() < 0.5:                   # half right is harder
            absent = [(kind, color) for kind, color in absent if kind in kinds or color in colors]
        kind, color = rng.choice(shown if answer == "yes" else absent)
        name = f"{color} {kind}"
    return f"Is there {with_article(name)} in the image?\n{SHORT}", answer


def ask_count(scene, rng):
    """How many blue things are there? -> 2"""
    found = [(f"How many {plural(kind)} are there?", count_things(scene, kind)) for kind in KINDS]
    found += [(f"How many {color} things are there?", count_things(scene, color=color)) for color in COLORS]
    if not scene.sign:                           # is a sign a thing? Better not ask
        found.append(("How many things are there?", len(scene.things)))
    weights = {0: 1, 1: 1, 2: 2, 3: 4, 4: 5}
    question, answer = pick_answer(found, rng, weights)
    return f"{question}\n{SHORT}", str(answer)


def ask_attribute(scene, rng):
    """Is the cat small or big? -> big"""
    thing = rng.choice(scene.things)
    question, answer, _ = ask_about(thing, rng.choice(("kind", "color", "size")), scene)
    return f"{question}\n{SHORT}", answer


def ask_about(thing, what, scene):
    """A question about one thing: (question, answer, what one could answer)."""
    name = short_phrase(thing, scene)
    if what == "kind":
        return f"What is the thing {at_place(thing)}?", thing.kind, KINDS
    if what == "color":
        # The question must not tell the color.
        name = name.replace(f"{thing.color} {thing.kind}", f"{thing.kind} {at_place(thing)}")
        colors = [color for kind, color in nameable_pairs(scene) if kind == thing.kind]
        return f"What color is {name}?", thing.color, colors
    if what == "size":
        return f"Is {name} small or big?", thing.size, SIZES
    return f"Where is {name}?", thing.place, PLACES


RELATIONS = (                                    # words, axis, direction along it
    ("to the left of", 0, -1),
    ("to the right of", 0, 1),
    ("above", 1, -1),
    ("below", 1, 1),
)


def ask_spatial(scene, rng):
    """Is the cat to the left of the ball? -> yes"""
    answer = rng.choice(("yes", "no"))
    found = []
    for words, axis, direction in RELATIONS:
        if answer == "no":
            direction = -direction
        for a, b in itertools.permutations(scene.things, 2):
            ends_a = a.box[axis] + a.box[axis + 2]
            gap = direction * (ends_a - b.box[axis] - b.box[axis + 2]) / 2
            if gap > 0.19:                       # clearly so, or clearly the other way (grid: 0.2 or more)
                found.append(f"Is {short_phrase(a, scene)} {words} {short_phrase(b, scene)}?\n{SHORT}")
    return (rng.choice(found), answer) if found else None


def ask_box(scene, rng):
    """... the region this sentence describes: the cat. -> [0.10, 0.35, 0.40, 0.65]"""
    thing = rng.choice(scene.things)
    return f"{BOX}{short_phrase(thing, scene)}.", coordinates(thing.box)


def ask_choice(scene, rng):
    """What color is the cat?  A. red  B. blue  C. green  D. white -> A"""
    what = rng.choice(("kind", "color", "place"))
    question, right, names = ask_about(rng.choice(scene.things), what, scene)
    # What is true of another thing comes first: a harder choice.
    others = [getattr(thing, what) for thing in scene.things]
    names = [name for name in others if name in names] + rng.sample(names, len(names))
    wrong = [name for name in dict.fromkeys(names) if name != right]
    options, letter = give_letters(right, wrong[:3], rng)
    return "\n".join([question, *options, LETTER]), letter


def give_letters(right, wrong, rng):
    """-> the right choice among three wrong ones, as ["A. red", ...]; its letter"""
    choices = rng.sample(wrong, 3)
    place = rng.randrange(4)
    choices.insert(place, right)
    return [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)], "ABCD"[place]


def ask_reading(scene, rng):
    return (f"What word is on the sign?\n{SHORT}", scene.sign.word) if scene.sign else None


def ask_unanswerable(scene, rng):
    """What color is the fish? (there is none) -> Unanswerable"""
    known = rng.random() < 0.5
    what = rng.choice(("color", "color", "size"))
    question, answer, _ = ask_about(rng.choice(scene.things), what, scene)
    share = 0.5 if known else 0.33               # signs are the rarer case
    if known == bool(scene.sign) and rng.random() < share:
        question = "What word is on the sign?"
        answer = scene.sign and scene.sign.word
    elif not known:
        absent = rng.choice([kind for kind in KINDS if not count_things(scene, kind)])
        question = f"What color is the {absent}?" if what == "color" else f"Is the {absent} small or big?"
    return f"{question}\n{INSUFFICIENT}\n{SHORT}", answer if known else "Unanswerable"


def ask_reasoning(scene, rng):
    """How many cats and balls are there together? -> 3"""
    question, answer, _ = two_step_question(scene, rng)
    return f"{question}\n{SHORT}", str(answer)


def ask_cot(scene, rng):
    """The same, with its steps: There are 2 cats. There is 1 ball. 2 + 1 = 3. Final answer: 3"""
    question, answer, steps = two_step_question(scene, rng)
    return f"{COT}{question}", f"{steps}\nFinal answer: {answer}"


def two_step_question(scene, rng):
    """(question, answer, the steps in words)"""
    kinds = {kind: n for kind in KINDS if (n := count_things(scene, kind))}
    found = [*add_or_compare(kinds), *count_legs(kinds), *take_away(scene)]
    return pick_answer(found, rng, {0: 2, 1: 2, 2: 1, 3: 2})


def add_or_compare(kinds):
    for a, n_a in kinds.items():
        for b, n_b in kinds.items():
            steps = f"{there_are(n_a, a)}. {there_are(n_b, b)}. {n_a}"
            if a != b:
                question = f"How many {plural(a)} and {plural(b)} are there together?"
                yield question, n_a + n_b, f"{steps} + {n_b} = {n_a + n_b}."
            if n_a > n_b:
                question = f"How many more {plural(a)} than {plural(b)} are there?"
                yield question, n_a - n_b, f"{steps} - {n_b} = {n_a - n_b}."


def count_legs(kinds):
    counts = []
    steps = []
    for kind, n_leg in LEGS.items():
        if kind in kinds:
            n = kinds[kind]
            counts.append(n * n_leg)
            verb = "has" if n == 1 else "have"
            steps.append(f"{count_noun(n, kind)} {verb} {n * n_leg} legs.")
    total = sum(counts)
    if len(counts) > 1:
        steps.append(f"{' + '.join(map(str, counts))} = {total}.")
    if counts:
        yield "How many legs do the animals have together?", total, " ".join(steps)


def take_away(scene):
    n = len(scene.things)
    besides = " besides the sign" if scene.sign else ""
    for color in sorted({thing.color for thing in scene.things}):
        gone = count_things(scene, color=color)
        verb = "is" if gone == 1 else "are"
        steps = f"{there_are(n, 'thing')}{besides}. {count_noun(gone, 'thing')} {verb} {color}."
        question = f"How many things{besides} would be left if every {color} thing were taken away?"
        yield question, n - gone, f"{steps} {n} - {gone} = {n - gone}."


def pick_answer(found, rng, weights):
    """One of the (question, answer, ...): first an answer, by weight (else 3), then a question with it."""
    answers = sorted({answer for _, answer, *_ in found})
    answer = rng.choices(answers, [weights.get(answer, 3) for answer in answers])[0]
    return rng.choice([item for item in found if item[1] == answer])


def ask_chat(scene, rng):
    """As people ask, without a format prompt, and answered in a sentence.

    toy-vicuna has read such questions, answered in a word, but no such answers. The finetune teaches them.
    """
    what = rng.choice("picture picture place color size spot count sign existence spatial".split())
    thing = rng.choice(scene.things)
    if what == "picture":
        return rng.choice(LOOK), caption(scene)
    if what in ("place", "color", "size"):
        question, answer, _ = ask_about(thing, what, scene)
        return question, f"It is {at_place(thing) if what == 'place' else answer}."
    if what == "spot":
        spot = rng.choice((thing, thing, replace(thing, place=rng.choice(PLACES))))
        found = [part for part in scene.parts if part.place == spot.place]
        return f"What is {at_place(spot)}?", f"It is {name_part(found[0])}." if found else "There is nothing."
    if what == "count":
        kind = rng.choice((thing.kind, thing.kind, rng.choice(KINDS)))
        n = count_things(scene, kind)
        return f"How many {plural(kind)} are there?", there_are(n or "no", kind) + "."
    if what == "sign":
        question = rng.choice(("What does the sign say?", "What word is on the sign?", "Where is the sign?"))
        if not scene.sign:
            return question, "There is no sign."
        if "Where" in question:
            return question, f"It is {at_place(scene.sign)}."
        return question, f"It says {scene.sign.word}."
    asked = ask_spatial(scene, rng) if what == "spatial" else None
    question, answer = asked or ask_existence(scene, rng)
    return without_format(question).replace(" in the image", ""), answer.capitalize() + "."


def without_format(question):
    """The question without the format prompt that follows it. That of cot stands before it, and stays."""
    for prompt in (LETTER, SHORT, INSUFFICIENT):
        question = question.removesuffix(f"\n{prompt}")
    return question


ASK = {
    "caption": ask_caption,
    "existence": ask_existence,
    "count": ask_count,
    "attribute": ask_attribute,
    "spatial": ask_spatial,
    "box": ask_box,
    "choice": ask_choice,
    "reading": ask_reading,
    "unanswerable": ask_unanswerable,
    "reasoning": ask_reasoning,
    "cot": ask_cot,
}
CATEGORIES = (*ASK, "chat")


def ask_all(scene, rng):
    """One (category, question with its format prompt, answer) of each category the scene allows."""
    return [(category, *pair) for category, ask in ASK.items() if (pair := ask(scene, rng))]


# ---- files ----


def write_world(out="toyworld", n_train=6000, n_val=240, size=96, seed=0, words=1.0):
    """Write pictures, train.json and pretrain.json (LLaVA's format), val.jsonl, world.json to a new folder.

    All is written into a hidden folder beside it, renamed at the end: a world that can be seen is complete.
    """
    out = Path(out).absolute()
    world = {"version": VERSION, "train": n_train, "val": n_val, "size": size, "seed": seed}
    if words != 1:
        world["words"] = words
    if read_json(out / "world.json", {}) == world:
        print(f"{out} already holds this world")
        return
    if out.is_file() or out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not this world {world}: remove it or give another --out")

    hidden = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        (hidden / "images").mkdir(parents=True)
        jobs = [("train", i) for i in range(n_train)] + [("val", i) for i in range(n_val)]
        draw = functools.partial(make_picture, hidden, size, seed, words)
        with ProcessPoolExecutor(initializer=leave_ctrl_c_to_parent) as pool:  # Pool waits for one that died
            made = pool.map(draw, jobs, chunksize=32)
            made = list(Bar(made, f"drawing {out.name}", len(jobs), unit=" pictures", leave=False))

        for k, name in enumerate(("train.json", "pretrain.json")):
            write_json(hidden / name, [records[k] for records in made[:n_train]], indent=1)
        lines = pick_val(sum(made[n_train:], []), max(1, round(0.3 * n_val)))
        write_json_lines(hidden / "val.jsonl", lines)
        write_json(hidden / "world.json", world, indent=1)
        print(f"{out}: {n_train} training and {n_val} validation pictures, {len(lines)} validation questions")
        hidden.rename(out)
    except (OSError, BrokenProcessPool) as error:  # full disk, folder not writable or taken, no memory
        if read_json(out / "world.json", {}) != world:  # else another process was faster
            raise UserError(f"the toy world could not be drawn: {error}") from None
    finally:                                     # gone already unless something went wrong, Ctrl-C included
        shutil.rmtree(hidden, ignore_errors=True)


def make_picture(folder, size, seed, words, job):
    """Draw and save picture i and ask about it. All depends on (seed, split, i): any process may do it."""
    split, i = job
    rng = random.Random(f"{seed} {split} {i}")
    scene = random_scene(rng, held_out=split == "val")
    name = f"images/{split}_{i:05d}.png"
    draw_scene(shrink_sign(scene, words), size).save(folder / name, compress_level=1)
    asked = ask_all(scene, rng)
    if split == "val":
        asked.append(("chat", *ask_chat(scene, rng)))
        return val_lines(i, name, asked)

    # Few pictures have a sign: always ask what it says. Five more questions, and up to three of chat.
    pairs = [pair for category, *pair in asked if category == "reading"]
    pairs += rng.sample([pair for category, *pair in asked if category != "reading"], 5)
    pairs += dict(ask_chat(scene, rng) for _ in range(3)).items()
    rng.shuffle(pairs)
    pairs.append((DETAIL, describe(scene)))      # last, so that no answer can be copied from it
    if i % 2:                                    # a box's phrase in quotes, as Prismatic's evaluation asks
        quoted = f'{BOX}"\\1"'
        pairs = [(re.sub(f"{BOX}(.*).", quoted, question), answer) for question, answer in pairs]
    return llava_record(f"train-{i}", name, pairs), llava_record(f"pretrain-{i}", name, pairs[-1:])


def llava_record(id, image, pairs):
    turns = []
    for question, answer in pairs:
        turns += {"from": "human", "value": question}, {"from": "gpt", "value": answer}
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": id, "image": image, "conversations": turns}


def val_lines(i, image, asked):
    """The questions about held-out picture i, as train.py's --val takes them."""
    lines = []
    for k, (category, question, answer) in enumerate(asked):
        place = {"question_id": f"val-{i}-{k}", "image": image}
        lines.append(place | {"text": question, "answer": answer, "category": category})
    return lines


def pick_val(lines, limit):
    """Up to `limit` questions of each category, the answers taken in turn, so that none is frequent."""
    groups = {category: defaultdict(list) for category in CATEGORIES}  # {category: {answer: its lines}}
    for n, line in enumerate(lines):
        key = line["answer"].split("Final answer: ")[-1]
        if line["category"] == "unanswerable":
            key = key == "Unanswerable"
        groups[line["category"]][key].append(n)

    picked = []
    for answers in groups.values():
        rounds = itertools.zip_longest(*answers.values())
        picked += [n for some in rounds for n in some if n is not None][:limit]
    return [lines[n] for n in sorted(picked)]


def leave_ctrl_c_to_parent():
    """In a drawing process: Ctrl-C is for the parent, which cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv=None):
    cfg = parse(WorldConfig, argv, description=__doc__)
    # Through the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated, nothing written"))
    if not cfg.hello:
        write_world(cfg.out, cfg.train, cfg.val, cfg.size, cfg.seed, cfg.words)
        return 0
    try:
        scene = random_scene(random.Random(cfg.seed)) if cfg.seed else HELLO
        draw_scene(scene, 480).save(cfg.hello)
    except (OSError, ValueError) as error:
        raise UserError(f"--hello {cfg.hello}: cannot be written ({error}); end it in .jpg") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
