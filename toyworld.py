"""The toy world: small drawn pictures and every kind of question the papers ask, with nothing to download.

A scene is a soft background, one to four things and sometimes a sign with a word on it. A thing has a kind, a color, a size and
a place in a 3x3 grid. As the scene is known, so is the right answer to any question about it:
    picture = draw(scene)                       # any size: all coordinates are fractions of the side
    caption(scene), describe(scene)             # "A red cat, a blue ball and a sign that says OPEN."
    questions(scene, rng)                       # [(category, question with its format prompt, answer), ...]
Eight (kind, color) pairs, UNSEEN, never occur in a training picture, and every validation picture shows at least one: a model
that only learned whole pairs by heart fails there, one that learned kinds and colors apart does not.
The categories follow the papers' data: caption, existence (POPE), count (TallyQA), attribute (VQAv2, GQA), spatial (VSR),
box (RefCOCO), choice (MMBench), reading (TextVQA), unanswerable (VizWiz), reasoning and cot (M3CoT); the format prompts are
those of LLaVA-1.5 (arXiv:2310.03744v2, Table 7) and of InternVL-2.5-MPO (arXiv:2411.10442). Answers are balanced as far as the world allows.

    python toyworld.py                          # toyworld/: 6000 training and 240 validation pictures, SECONDS s on two cores
    python toyworld.py --hello cat.jpg          # one large picture to ask about
"""
import argparse
import difflib
import functools
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import sentencepiece
from PIL import Image, ImageDraw
from tqdm import tqdm


def arg(default, help):
    return field(default=default, metadata={"help": help})

@dataclass
class Config:
    out: str = arg("toyworld", "folder to write; must not exist yet, unless it holds this very world")
    train: int = arg(6000, "number of training pictures")
    val: int = arg(240, "number of validation pictures, each with an UNSEEN thing")
    size: int = arg(96, "side of a picture in pixels")
    seed: int = arg(0, "another seed, another world")
    hello: str = arg("", "write one 480-pixel picture to this file, and nothing else")

VERSION = 1                                      # of the drawing and the questions; a folder written by another version is another world
COLORS = {"red": (216, 40, 42), "orange": (250, 138, 24), "yellow": (250, 222, 50), "green": (44, 158, 68), "blue": (38, 92, 222),
          "purple": (146, 58, 186), "white": (252, 252, 252), "black": (34, 34, 40)}
SIZES = {"cat": ((4, 4), (6, 6)), "fish": ((4, 3), (7, 5)), "bird": ((4, 4), (6, 6)), "tree": ((3, 4), (5, 7)),  # kind -> small, big:
         "house": ((4, 4), (6, 6)), "car": ((4, 3), (7, 5)), "ball": ((4, 4), (6, 6)), "star": ((4, 4), (6, 6))}  # width, height
GRID = 20                                        # in steps of 1/20 of the side, so two decimals say a box exactly
KINDS = tuple(SIZES)
LEGS = {"cat": 4, "bird": 2, "fish": 0}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("meadow", "beach", "night", "room", "snow")
WORDS = ("STOP", "OPEN", "TAXI", "CAFE", "PARK", "SALE", "BUS", "ZOO", "INN", "GYM", "EXIT", "SHOP")
UNSEEN = {("cat", "blue"), ("fish", "red"), ("bird", "white"), ("tree", "orange"), ("house", "purple"), ("car", "green"),
          ("ball", "black"), ("star", "yellow")}

CAPTION = "Provide a one-sentence caption for the provided image."
BRIEF = ("Provide a brief description of the given image.", "Give a short and clear explanation of the image.",
         "Describe the image concisely.", "What is in the image?")
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "
COT = ("Your task is to answer the question below. Give step by step reasoning before you answer, and when you're ready to answer, "
       'please use the format "Final answer: .."\n\nQuestion:\n\n')


# -- scenes ------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Thing:
    kind: str
    color: str
    size: str                                    # small or big
    place: str
    box: tuple                                   # x1, y1, x2, y2 as fractions of the side, multiples of 1/20

@dataclass(frozen=True)
class Sign:
    word: str
    place: str
    box: tuple

@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple                                # in reading order: row by row, left to right
    sign: Sign | None = None

    @property
    def parts(self):                             # the things and the sign, in reading order
        return sorted(self.things + ((self.sign,) if self.sign else ()), key=lambda part: PLACES.index(part.place))

def random_scene(rng, held_out=False):
    """A training scene holds no UNSEEN pair, a held-out one at least one. No scene holds the same (kind, color) twice."""
    pairs = [(kind, color) for kind in KINDS for color in COLORS if held_out or (kind, color) not in UNSEEN]
    chosen = [rng.choice(sorted(UNSEEN) if held_out else pairs)]
    alike = rng.choice(("kind", "kind", "color", "neither"))     # left to chance, nearly every count would be 0 or 1
    n = rng.choices((1, 2, 3, 4), (1, 2, 3, 4))[0]
    while len(chosen) < n:
        kind, color = rng.choice(pairs)
        if rng.random() < 0.75:
            kind, color = chosen[0][0] if alike == "kind" else kind, chosen[0][1] if alike == "color" else color
        if (kind, color) in pairs and (kind, color) not in chosen:
            chosen.append((kind, color))
    big = [rng.randrange(2) for _ in chosen]
    word = rng.choice(WORDS) if rng.random() < 0.4 else None
    sides = [SIZES[kind][b] for (kind, _), b in zip(chosen, big)] + ([(8 if len(word) == 4 else 7, 4)] if word else [])
    while True:                                  # throw all boxes again until none overlap
        cells = rng.sample(range(9), len(sides))
        boxes = [(throw(rng, cell % 3, w), throw(rng, cell // 3, h), w, h) for cell, (w, h) in zip(cells, sides)]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        if not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]):
            break
    boxes = [tuple(v / GRID for v in box) for box in boxes]
    things = [Thing(kind, color, ("small", "big")[b], PLACES[cell], box) for (kind, color), b, cell, box in zip(chosen, big, cells, boxes)]
    things.sort(key=lambda thing: PLACES.index(thing.place))
    return Scene(rng.choice(BACKGROUNDS), tuple(things), Sign(word, PLACES[cells[-1]], boxes[-1]) if word else None)

def throw(rng, cell, side):
    """Where a side of that length may begin (in grid steps) so that its middle is well inside cell 0, 1 or 2 of the row."""
    low, high = cell * GRID / 3 + 1, (cell + 1) * GRID / 3 - 1
    return rng.choice([x for x in range(GRID - side + 1) if low <= x + side / 2 <= high])

def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- drawing -----------------------------------------------------------------------------------------------------------------------
SUPER = 3                                        # drawn this much larger, then averaged down: PIL draws without antialiasing
OUTLINE = 0.011                                  # of the picture's side

def draw(scene, size=96):
    """The picture, size x size RGB. Nothing random: the same scene always gives the same pixels."""
    px = SUPER * size
    image = background(scene.background, px).copy()
    pen = ImageDraw.Draw(image, "RGBA")          # RGBA only for the soft shadows
    for thing in scene.things:
        x1, y1, x2, y2 = (v * px for v in thing.box)
        pen.ellipse((x1 + 0.08 * (x2 - x1), y2 - 0.03 * px, x2 - 0.08 * (x2 - x1), y2 - 1), fill=(40, 40, 60, 70))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        DRAW[thing.kind](Brush(pen, px, thing.box, thing.color))
    if scene.sign:
        draw_sign(Brush(pen, px, scene.sign.box, "white"), scene.sign.word)
    return image.reduce(SUPER)

class Brush:
    """Draws in the coordinates of one box: (0, 0) is its top left corner, (1, 1) its bottom right one.
    A shape is a flat list of numbers: four are an oval x1 y1 x2 y2, more are the corners of a polygon."""
    def __init__(self, pen, px, box, color):
        self.pen, self.px = pen, px
        edge = OUTLINE / 2                       # room for the outer half of the outline
        self.x, self.y = (box[0] + edge) * px, (box[1] + edge) * px
        self.w, self.h = (box[2] - box[0] - 2 * edge) * px, (box[3] - box[1] - 2 * edge) * px
        self.color = COLORS[color]
        dark = color == "black"
        self.edge = {"black": (206, 206, 214), "white": (104, 104, 118)}.get(color, mix(self.color, (0, 0, 0), 0.55))
        self.shade = mix(self.color, (255, 255, 255), 0.2) if dark else mix(self.color, (40, 40, 70), 0.18)
        self.light = mix(self.color, (255, 255, 255), 0.45)
        self.ink = (240, 240, 244) if dark else (30, 28, 36)

    def at(self, shape):
        return [(self.x + self.w * x, self.y + self.h * y) for x, y in zip(shape[::2], shape[1::2])]

    def fill(self, color, *shapes):
        for shape in shapes:
            (self.pen.ellipse if len(shape) == 4 else self.pen.polygon)(self.at(shape), fill=color)

    def line(self, color, shape, width=OUTLINE):
        self.pen.line(self.at(shape), fill=color, width=max(1, round(width * self.px)))

    def body(self, *shapes):
        """One silhouette out of many shapes: first all edges, then all insides, so no edge is left within."""
        half = OUTLINE / 2 * self.px
        for shape in shapes:
            points = self.at(shape)
            if len(shape) == 4:
                (x1, y1), (x2, y2) = points
                self.pen.ellipse((x1 - half, y1 - half, x2 + half, y2 + half), fill=self.edge)
            else:
                self.pen.line(points + points[:1], fill=self.edge, width=round(2 * half))
                for x, y in points:              # round corners
                    self.pen.ellipse((x - half, y - half, x + half, y + half), fill=self.edge)
        self.fill(self.color, *shapes)

def draw_cat(b):
    b.body((.66, .98, .80, .97, .93, .86, .97, .66, 1, .52, .90, .50, .86, .64, .82, .80, .70, .84),         # tail
           (.10, .44, .72, 1), (.06, .40, .02, 0, .34, .14), (.72, .40, .78, 0, .46, .14), (0, .08, .80, .62))
    b.fill(b.shade, (.10, .22, .09, .10, .20, .16), (.70, .22, .71, .10, .60, .16), (.20, .86, .38, 1), (.44, .86, .62, 1))
    b.fill((255, 255, 255), (.15, .24, .35, .44), (.45, .24, .65, .44))
    b.fill((30, 28, 36), (.22, .26, .31, .43), (.49, .26, .58, .43))
    b.fill((236, 140, 150), (.35, .45, .45, .45, .40, .51))
    for y in (.46, .53):
        b.line(b.ink, (.30, .49, .04, y), OUTLINE / 2)
        b.line(b.ink, (.50, .49, .76, y), OUTLINE / 2)

def draw_fish(b):
    b.body((0, .12, .74, .94), (.62, .53, 1, .08, .92, .53, 1, 1), (.28, .18, .44, 0, .62, .06, .60, .26))
    b.fill(b.shade, (.90, .52, .72, .50, .95, .22), (.90, .56, .72, .58, .95, .84), (.40, .52, .60, .42, .58, .68))
    b.line(b.edge, (.30, .22, .34, .38, .34, .66, .30, .84), OUTLINE / 2)
    b.fill((255, 255, 255), (.10, .32, .26, .54))
    b.fill((30, 28, 36), (.13, .37, .22, .50))
    b.line(b.ink, (.07, .68, .14, .73, .21, .70), OUTLINE / 2)

def draw_bird(b):
    for x in (.38, .52):                         # legs
        b.line((150, 100, 50), (x, .82, x + .02, .99, x + .12, .99))
    b.fill((150, 100, 50), (.82, .14, 1, .27, .82, .36))
    b.fill((232, 168, 70), (.84, .18, .97, .27, .84, .32))
    b.body((.20, .44, 0, .30, .02, .52, .16, .70), (.08, .32, .78, .88), (.46, 0, .90, .50))
    b.fill(b.shade, (.18, .46, .58, .42, .54, .66, .36, .74))
    b.line(b.edge, (.18, .46, .36, .74, .54, .66, .58, .42), OUTLINE / 2)
    b.fill((255, 255, 255), (.62, .12, .78, .28))
    b.fill((30, 28, 36), (.67, .15, .76, .25))

def draw_tree(b):
    b.fill((96, 70, 52), (.38, .60, .62, .60, .68, 1, .32, 1))
    b.fill((132, 100, 76), (.43, .60, .55, .60, .58, .98, .42, .98))
    b.body((0, .30, .56, .74), (.44, .30, 1, .74), (.14, 0, .86, .56), (.24, .40, .76, .80))
    b.fill(b.light, (.26, .10, .46, .20), (.10, .40, .24, .47), (.60, .38, .74, .45))
    b.fill(b.shade, (.54, .20, .68, .27), (.30, .60, .46, .67), (.74, .58, .88, .65), (.38, .36, .50, .42))

def draw_house(b):
    b.body((.72, .30, .72, .06, .88, .06, .88, .44), (.09, .42, .91, .42, .91, 1, .09, 1), (0, .50, .50, 0, 1, .50))
    b.fill(b.shade, (.04, .48, .50, .03, .96, .48))
    b.line(b.edge, (.04, .50, .96, .50), OUTLINE / 2)
    for x in (.18, .64):                         # windows
        b.fill(b.edge, (x - .02, .58, x + .20, .58, x + .20, .80, x - .02, .80))
        b.fill((250, 240, 196), (x + .01, .61, x + .17, .61, x + .17, .77, x + .01, .77))
        b.line(b.edge, (x + .09, .60, x + .09, .78), OUTLINE / 2)
    b.fill((96, 70, 52), (.42, .66, .58, .66, .58, .99, .42, .99))
    b.fill((250, 240, 196), (.52, .80, .56, .85))
    b.fill((250, 240, 196), (.43, .22, .57, .36))

def draw_car(b):
    b.body((.20, .42, .30, 0, .66, 0, .82, .42), (0, .52, .06, .42, .90, .42, 1, .56, 1, .80, 0, .80))
    b.fill((222, 236, 242), (.28, .38, .35, .10, .46, .10, .46, .38), (.51, .38, .51, .10, .62, .10, .72, .38))
    b.fill(b.shade, (.02, .66, .98, .66, .98, .78, .02, .78))
    b.line(b.edge, (.485, .10, .485, .66), OUTLINE / 2)
    b.fill((255, 244, 190), (.91, .50, .99, .62))
    for x in (.12, .64):                         # wheels
        b.fill((40, 40, 46), (x, .58, x + .25, 1.02))
        b.fill((196, 198, 206), (x + .075, .71, x + .175, .89))

def draw_ball(b):
    b.body((0, 0, 1, 1))
    b.fill(b.shade, (.30, .01, .70, .99))
    b.fill(b.color, (.40, .01, .60, .99))
    b.fill(b.light, (.12, .20, .28, .40))
    b.fill(b.shade, (.42, .02, .58, .12))

def draw_star(b):
    b.body(STAR)
    b.fill(b.light, [.5 + .55 * (v - .5) for v in STAR])
    b.fill(b.color, [.5 + .48 * (v - .5) for v in STAR])
    b.fill(b.ink, (.36, .42, .44, .55), (.56, .42, .64, .55))
    b.line(b.ink, (.42, .62, .46, .66, .54, .66, .58, .62), OUTLINE / 2)

def star(inner=0.46):
    """The ten corners of a five-pointed star, stretched to touch all four sides of its box."""
    radii = [1 if i % 2 == 0 else inner for i in range(10)]
    xs = [r * math.sin(i * math.pi / 5) for i, r in enumerate(radii)]
    ys = [-r * math.cos(i * math.pi / 5) for i, r in enumerate(radii)]
    unit = lambda values: [(v - min(values)) / (max(values) - min(values)) for v in values]
    return [v for point in zip(unit(xs), unit(ys)) for v in point]

STAR = star()
DRAW = {"cat": draw_cat, "fish": draw_fish, "bird": draw_bird, "tree": draw_tree, "house": draw_house, "car": draw_car,
        "ball": draw_ball, "star": draw_star}
# Capital letters as strokes on a grid 4 wide and 6 high, each point two digits x y; drawn here, so that no font file is needed
LETTERS = {"A": "06 02 20 42 46,04 44", "B": "00 30 41 42 33 03,33 44 45 36 06 00", "C": "41 30 10 01 05 16 36 45", "E": "40 00 06 46,03 33",
           "F": "40 00 06,03 33", "G": "41 30 10 01 05 16 36 45 43 23", "H": "00 06,40 46,03 43", "I": "10 30,20 26,16 36", "K": "00 06,40 03 46",
           "L": "00 06 46", "M": "06 00 23 40 46", "N": "06 00 46 40", "O": "10 30 41 45 36 16 05 01 10", "P": "06 00 30 41 43 34 04",
           "R": "06 00 30 41 42 33 03,23 46", "S": "41 30 10 01 02 13 33 44 45 36 16 05", "T": "00 40,20 26", "U": "00 05 16 36 45 40",
           "X": "00 46,40 06", "Y": "00 23 40,23 26", "Z": "00 40 06 46"}

def draw_sign(b, word):
    border, board, ink = (92, 66, 48), (250, 240, 214), (52, 38, 34)
    b.fill(border, (.47, .5, .53, .5, .53, 1, .47, 1))
    b.fill(border, (.03, 0, .97, 0, 1, .05, 1, .75, .97, .80, .03, .80, 0, .75, 0, .05))
    b.fill(board, (.04, .075, .96, .075, .96, .725, .04, .725))
    step = 0.86 / (4 * len(word) + 1.5 * (len(word) - 1))                    # letters are 4 wide, 1.5 apart
    width = 0.17 * step * b.w / b.px * 6
    for i, letter in enumerate(word):
        for stroke in LETTERS[letter].split(","):
            points = [v for p in stroke.split() for v in (.07 + step * (5.5 * i + int(p[0])), .17 + .46 / 6 * int(p[1]))]
            b.line(ink, points, width)
            r = width * b.px / 2
            for x, y in b.at(points):
                b.pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)

@functools.cache
def background(name, px):
    """Pale and soft, so that all eight colors stand out. The night is a grey one: a black cat must show, too."""
    image = Image.new("RGB", (px, px))
    b = Brush(ImageDraw.Draw(image), px, (0, 0, 1, 1), "white")
    band = lambda color, top, bottom: b.fill(color, (-.1, top, 1.1, top, 1.1, bottom, -.1, bottom))
    if name == "meadow":
        band((208, 229, 240), -.1, 1.1)
        b.fill((222, 236, 242), (.10, .10, .34, .20), (.20, .06, .44, .19), (.62, .20, .90, .29))
        b.fill((202, 224, 196), (-.3, .50, .8, 1.4), (.3, .54, 1.5, 1.4))
        for x, y in ((.1, .82), (.3, .68), (.5, .9), (.7, .72), (.9, .86)):
            b.line((184, 210, 178), (x - .015, y - .03, x, y, x + .012, y - .035), .006)
    elif name == "beach":
        band((214, 232, 240), -.1, .45)
        band((186, 214, 220), .45, .66)
        band((238, 228, 204), .66, 1.1)
        b.fill((238, 228, 204), (-.2, .61, .6, .76))
        for x, y in ((.15, .51), (.55, .56), (.8, .50)):
            b.line((204, 226, 230), (x - .06, y, x - .03, y - .01, x, y, x + .03, y - .01, x + .06, y), .006)
    elif name == "night":
        band((112, 118, 144), -.1, 1.1)
        b.fill((124, 130, 154), (.70, .06, .90, .26))
        b.fill((112, 118, 144), (.65, .04, .84, .22))
        for x, y in ((.08, .1), (.25, .3), (.45, .08), (.6, .33), (.9, .42), (.14, .5), (.38, .48)):
            b.fill((142, 148, 170), (x, y, x + .012, y + .012))
        b.fill((98, 106, 120), (-.4, .66, .8, 1.5), (.2, .72, 1.5, 1.5))
    elif name == "room":
        band((230, 220, 212), -.1, .70)
        band((208, 190, 172), .70, 1.1)
        band((220, 206, 194), .68, .71)
        for y in (.80, .91):
            b.line((198, 180, 162), (0, y, 1, y), .005)
        for x, y in ((.2, .71), (.6, .71), (.4, .80), (.85, .80), (.25, .91), (.65, .91)):
            b.line((198, 180, 162), (x, y, x, y + .10), .005)
    else:
        band((206, 216, 230), -.1, 1.1)
        b.fill((228, 234, 241), (-.4, .55, .9, 1.5), (.3, .50, 1.6, 1.5))
        for x, y in ((.1, .1), (.3, .22), (.55, .07), (.8, .16), (.93, .36), (.16, .4), (.45, .38), (.7, .34)):
            b.fill((224, 231, 240), (x, y, x + .02, y + .02))
    return image

def mix(a, b, share):
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b))

def hello_picture():
    """The picture of the README's first question; a scene as in training."""
    things = (Thing("ball", "blue", "small", "top right", (.70, .10, .90, .30)), Thing("cat", "red", "big", "left", (.10, .35, .40, .65)))
    return draw(Scene("meadow", things, Sign("OPEN", "bottom right", (.55, .70, .95, .90))), 480)
