"""Curves, drawn as a PNG with Pillow.

    plot("loss.png", lines, {"loss per supervised token": {"training": "loss", "held-out": "val_loss"}})

draws what the lines of log.jsonl say of "loss" and "val_loss". Each title is a panel, each label a curve:
pale as it was measured, strong as the mean of the values around. A vertical axis is logarithmic where all its
values are positive and differ by a factor of ten.
"""

from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from support.io import write_whole

COLORS = ("#1f6fb5", "#d6502b", "#3a9a4a")
GREY, PALE_GREY, BLACK = "#555555", "#e6e6e6", "#222222"
WIDTH = 800
ROUND = np.outer(10.0 ** np.arange(-30, 30), [1, 2, 5]).ravel()  # ..., 0.5, 1, 2, 5, 10, 20, ...


def plot(path, lines, panels):
    """panels: {title: {label: name in the lines}}, one below the other. What has no points is left out."""
    drawn = {}
    for title, names in panels.items():
        for label, name in names.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                drawn.setdefault(title, {})[label] = np.array(points, dtype=float).T

    n = max(1, len(drawn))
    height = max(460 // n, 190)
    image = Image.new("RGB", (WIDTH, height * n), "white")
    pen = ImageDraw.Draw(image, "RGBA")  # with alpha: a pale line lets the one below it through
    for k, (title, curves) in enumerate(drawn.items()):
        draw_panel(pen, k * height + 34, (k + 1) * height - 32, title, curves)
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))


def draw_panel(pen, top, bottom, title, curves):
    """From one row of pixels to another; curves: {label: array (2, n)}."""
    left, right = 70, WIDTH - 24
    xs, ys = np.concatenate(list(curves.values()), axis=1)
    is_log = ys.min() > 0 and ys.max() >= 10 * ys.min()
    x_ticks, across = make_axis(xs, left, right)
    y_ticks, down = make_axis(ys, bottom, top, is_log)
    write = partial(pen.text, fill=GREY, font_size=13)
    for y in y_ticks:
        pen.line([(left, down(y)), (right, down(y))], fill=PALE_GREY)
        write((left - 8, down(y)), f"{y:,g}", anchor="rm")
    for x in x_ticks:
        write((across(x), bottom + 6), f"{x:,g}", anchor="mt")

    # The curves, and above them the title, what each is called and where it ends.
    write((left, top - 24), title, fill=BLACK, anchor="lt")
    words_right = right - 150 * (len(curves) - 1)
    for (label, (x, y)), color in zip(curves.items(), COLORS):
        mean = mean_around(y)
        measured = list(zip(across(x), down(y)))
        pen.line(measured, fill=color + "50")
        pen.line(list(zip(across(x), down(mean))), fill=color, width=2)
        if len(x) <= 30:
            for point in measured:
                pen.circle(point, 3, fill=color)
        write((words_right, top - 24), f"{label} {mean[-1]:.3f}", fill=color, anchor="rt")
        words_right += 150


def make_axis(values, start, end, is_log=False):
    """-> round numbers to write beside the axis; a function that gives the pixel of a value."""
    bend = np.log10 if is_log else np.asarray
    low, high = bend(values.min()), bend(values.max())
    room = 0.03 * (high - low) or 0.5
    low, high = low - room, high + room

    if is_log:
        ticks = ROUND if high - low < 2 else ROUND[::3]
    else:
        step = ROUND[ROUND >= (high - low) / 7][0]
        ticks = step * np.arange(low // step, high // step + 1)
    is_inside = (bend(ticks) >= low) & (bend(ticks) <= high)
    return ticks[is_inside], lambda value: np.interp(bend(value), (low, high), (start, end))


def mean_around(values):
    """The mean of each value and its neighbours, a fiftieth of all on either side."""
    reach = len(values) // 50
    window = np.ones(2 * reach + 1)
    n_around = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / n_around
