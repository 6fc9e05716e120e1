"""support.plots: moved here; to be rewritten."""

import json
import math

from PIL import Image, ImageDraw

from support.io import write_whole



def draw_curve(path, log, width=800, height=460):
    """loss.png: the loss of each step, the mean of the steps around it, and the held-out loss as dots, on a logarithmic axis."""
    lines = [json.loads(line) for line in open(log)]
    train, val = ([(r["step"], max(r[key], 1e-4)) for r in lines if r.get(key) is not None] for key in ("loss", "val_loss"))
    if not train:
        return
    losses, w = [loss for _, loss in train], len(train) // 50 + 1
    mean = [sum(near) / len(near) for near in (losses[max(0, i - w) : i + w + 1] for i in range(len(losses)))]
    left, right, top, bottom = 64, width - 24, 44, height - 52              # the frame, in pixels
    values, last = [v for _, v in train + val], max(train[-1][0], 2)
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    x = lambda step: left + (right - left) * (step - 1) / (last - 1)
    y = lambda loss: top + (bottom - top) * (high - math.log(loss)) / (high - low)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    write = lambda at, text, anchor, fill="#555555": draw.text(at, text, fill=fill, anchor=anchor, font_size=14)
    for tick in (t for t in (t * 10.0**e for e in range(-4, 4) for t in (1, 1.5, 2, 3, 4, 5, 7)) if low < math.log(t) < high):
        draw.line([(left, y(tick)), (right, y(tick))], fill="#e6e6e6")
        write((left - 8, y(tick)), f"{tick:g}", "rm")
    apart = next(a for a in (t * 10**e for e in range(9) for t in (1, 2, 5)) if last / a <= 8)
    for tick in range(apart, last + 1, apart):
        draw.line([(x(tick), bottom), (x(tick), bottom + 5)], fill="#999999")
        write((x(tick), bottom + 8), f"{tick:,}", "mt")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill="#999999")
    draw.line([(x(s), y(v)) for s, v in train], fill="#b9d2ea")
    draw.line([(x(s), y(v)) for (s, _), v in zip(train, mean)], fill="#1f6fb5", width=2)
    for s, v in val:
        draw.ellipse([x(s) - 4, y(v) - 4, x(s) + 4, y(v) + 4], fill="#d6502b")
    write((left, 14), "loss per supervised token", "lt", "#222222")
    write((right, height - 12), "step", "rb")
    write((right, 14), f"step {train[-1][0]:,}: training {mean[-1]:.3f} (mean of the last steps)", "rt", "#1f6fb5")
    if val:
        write((right, 32), f"held-out {val[-1][1]:.3f}", "rt", "#d6502b")
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))



def draw_rewards(path, log, width=800, height=760):
    """mpo.png: rewards and their margin; share of pairs told apart; delta; NLL. Each line is the mean of the steps around it."""
    lines = [line for line in map(json.loads, open(log)) if line.get("margin") is not None]
    if not lines:
        return
    panels = {"rewards, beta (s - s_ref)": ["reward_chosen", "reward_rejected", "margin"],
              "share of pairs with the chosen answer ahead": ["accuracy"],
              "delta, the mean of all rewards so far": ["delta"],
              "NLL of the chosen answer per token": ["nll"]}
    colors, tall, w = ("#1f6fb5", "#d6502b", "#3a9a4a"), (height - 30) // len(panels), len(lines) // 50
    image = Image.new("RGB", (width, height), "white")
    pen, steps = ImageDraw.Draw(image), [line["step"] for line in lines]
    write = lambda at, text, anchor, fill="#555555": pen.text(at, text, fill=fill, anchor=anchor, font_size=13)
    x = lambda step: 70 + (width - 94) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
    near = [lines[max(0, i - w) : i + w + 1] for i in range(len(lines))]
    for k, (title, names) in enumerate(panels.items()):
        curves = {name: [sum(line[name] for line in some) / len(some) for some in near] for name in names}
        values = [v for curve in curves.values() for v in curve] + ([0.0, 1.0] if "accuracy" in names else [])
        low, high, top = min(values), max(values), k * tall + 30
        low, high = (low - 0.05, high + 0.05) if high - low < 1e-6 else (low, high)
        y = lambda v: top + (tall - 44) * (high - v) / (high - low)
        for v in (low, 0.0 if low < 0 < high else (low + high) / 2, high):
            pen.line([(70, y(v)), (width - 24, y(v))], fill="#e6e6e6")
            write((62, y(v)), f"{v:.3g}", "rm")
        write((70, top - 18), title, "lt", "#222222")
        for j, (name, curve) in enumerate(curves.items()):
            pen.line([(x(s), y(v)) for s, v in zip(steps, curve)], fill=colors[j], width=2)
            write((width - 24 - 170 * (len(names) - 1 - j), top - 18), f"{name.replace('_', ' ')} {curve[-1]:.3f}", "rt", colors[j])
    write((70, height - 18), f"step {steps[0]:,} to {steps[-1]:,}", "lt")
    write_whole(path, lambda tmp: image.save(tmp, format="PNG"))
