"""The curves of a run, drawn as a PNG with Pillow.

    plot("loss.png", {"loss per supervised token": {"training": (steps, losses), "held-out": (steps, losses)}})

Each title is a panel, each label a line in it: pale as it was measured, strong as the mean of the points around.
A vertical axis is logarithmic where all its values are positive and differ by a factor of ten.
A run keeps its curves in memory (`add_points`), so that nothing reads its whole log again to draw them.
"""

from PIL import Image, ImageDraw
import numpy as np

from support.io import write_whole

COLORS = ("#1f6fb5", "#d6502b", "#3a9a4a")
GREY, PALE_GREY, BLACK = "#555555", "#e6e6e6", "#222222"


def add_points(curves, line):
    """Add the numbers in one line of the log to curves, {name: (steps, values)}."""
    for name, value in line.items():
        if isinstance(value, (int, float)):
            steps, values = curves.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)


def plot(path, panels, width=800):
    """panels: {title: {label: (xs, ys)}}, drawn one below the other. A curve without points is left out."""
    height = max(460, 190 * len(panels))
    panel_height = height // len(panels)
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image, "RGBA")  # with alpha: a pale line lets the one below it through
    for k, (title, curves) in enumerate(panels.items()):
        frame = (70, k * panel_height + 34, width - 24, (k + 1) * panel_height - 32)
        drawn = {label: np.array(points) for label, points in curves.items() if points[0]}
        if drawn:
            draw_panel(pen, frame, title, drawn)
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
        return list(zip(np.atleast_1d(across), np.atleast_1d(down)))

    # At most five numbers on either axis.
    for y in unbend(np.linspace(low, high, 5)):
        (_, down), = to_pixels(xs.min(), y)
        pen.line([(left, down), (right, down)], fill=PALE_GREY)
        pen.text((left - 8, down), f"{y:.3g}", fill=GREY, anchor="rm", font_size=13)
    for x in np.unique(np.linspace(xs.min(), xs.max(), 5).round()):
        (across, _), = to_pixels(x, ys.min())
        pen.text((across, bottom + 6), f"{x:,.0f}", fill=GREY, anchor="mt", font_size=13)

    # The curves, and beside the title what each is called and where it ends.
    pen.text((left, top - 24), title, fill=BLACK, anchor="lt", font_size=14)
    words_left = left + pen.textlength(title, font_size=14)
    for (label, (x, y)), color in zip(curves.items(), COLORS):
        mean = mean_around(y)
        pen.line(to_pixels(x, y), fill=color + "50")
        pen.line(to_pixels(x, mean), fill=color, width=2)
        if len(x) <= 30:
            for across, down in to_pixels(x, y):
                pen.circle((across, down), 3, fill=color)
        words = f"{label} {mean[-1]:.3f}"
        pen.text((words_left + 24, top - 24), words, fill=color, anchor="lt", font_size=14)
        words_left += 24 + pen.textlength(words, font_size=14)


def mean_around(values):
    """The mean of each value and its neighbours, a fiftieth of all on either side."""
    n, reach = len(values), len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(n) - reach, 0)
    end = np.minimum(np.arange(n) + reach + 1, n)
    return (sums[end] - sums[first]) / (end - first)
