"""The curves of a run, drawn as a PNG with Pillow.

    plot("loss.png", {"loss per supervised token": {"training": "loss", "held-out": "val_loss"}}, lines)

Each title is a panel, each label a curve: the values of that name in the lines of log.jsonl, pale as they
were measured, strong as the mean of those around. A vertical axis is logarithmic where
all its values are positive and differ by a factor of ten.
"""

import numpy as np
from PIL import Image, ImageDraw

from support.io import write_whole

COLORS = ("#1f6fb5", "#d6502b", "#3a9a4a")
GREY, PALE_GREY, BLACK = "#555555", "#e6e6e6", "#222222"
WIDTH = 800


def plot(path, panels, lines):
    """panels: {title: {label: name}}, drawn one below the other. A curve without points is left out."""
    panel_height = max(460 // len(panels), 190)
    image = Image.new("RGB", (WIDTH, len(panels) * panel_height), "white")
    pen = ImageDraw.Draw(image, "RGBA")  # with alpha: a pale line lets the one below it through
    for k, (title, names) in enumerate(panels.items()):
        curves = {}
        for label, name in names.items():
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                curves[label] = np.array(points, dtype=float).T  # (2, n)
        if curves:
            top = k * panel_height
            draw_panel(pen, (70, top + 34, WIDTH - 24, top + panel_height - 32), title, curves)
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))


def draw_panel(pen, frame, title, curves):
    """frame: (left, top, right, bottom) in pixels; curves: {label: array (2, n)}."""
    left, top, right, bottom = frame
    xs, ys = np.concatenate(list(curves.values()), axis=1)
    is_log = ys.min() > 0 and ys.max() >= 10 * ys.min()
    bend, unbend = (np.log, np.exp) if is_log else (np.asarray, np.asarray)
    low = bend(ys.min()) - 0.01
    high = bend(ys.max()) + 0.01

    def to_pixels(x, y):
        across = left + (right - left) * (x - xs.min()) / max(np.ptp(xs), 1)
        down = bottom - (bottom - top) * (bend(y) - low) / (high - low)
        return list(zip(across, down))

    # Five numbers on either axis.
    for y, down in zip(unbend(np.linspace(low, high, 5)), np.linspace(bottom, top, 5)):
        pen.line([(left, down), (right, down)], fill=PALE_GREY)
        pen.text((left - 8, down), f"{y:.3g}", fill=GREY, anchor="rm", font_size=13)
    for x, across in zip(np.linspace(xs.min(), xs.max(), 5), np.linspace(left, right, 5)):
        pen.text((across, bottom + 6), f"{x:,.0f}", fill=GREY, anchor="mt", font_size=13)

    # The curves, and beside the title what each is called and where it ends.
    pen.text((left, top - 24), title, fill=BLACK, anchor="lt", font_size=14)
    words_left = left + pen.textlength(title, font_size=14)
    for (label, (x, y)), color in zip(curves.items(), COLORS):
        mean = mean_around(y)
        pen.line(to_pixels(x, y), fill=color + "50")
        pen.line(to_pixels(x, mean), fill=color, width=2)
        if len(x) <= 30:
            for point in to_pixels(x, y):
                pen.circle(point, 3, fill=color)
        words = f"{label} {mean[-1]:.3f}"
        pen.text((words_left + 24, top - 24), words, fill=color, anchor="lt", font_size=14)
        words_left += 24 + pen.textlength(words, font_size=14)


def mean_around(values):
    """The mean of each value and its neighbours, a fiftieth of all on either side."""
    reach = len(values) // 50
    window = np.ones(2 * reach + 1)
    n_around = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / n_around
