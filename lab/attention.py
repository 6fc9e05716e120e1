"""Does the decoder look at what it is asked about? 200 questions about one thing each, in held-out pictures.

    python -m lab.attention                  # --model DIR

The heat of an answer (support/attention.py; the mean over its words) against the patches of the thing: is
its peak there, and what share of it? Beside it chance, the share of the patches that are the thing's, and the
mean of all heats, which knows where things often are and nothing of this picture.
"""

import random
import sys

import torch

import toyworld
from benchmarks.common import SHORT
from lab.common import patch_owners
from sample import open_asked
from support.attention import Look
from support.chat import Chat
from support.cli import Bar, parse, run_program
from support.flags import AskConfig

N_QUESTION = 200


def main(argv=None):
    cfg = parse(AskConfig, argv, __doc__)
    chat = Chat(*open_asked(cfg), cfg)
    asked, heats, is_thing = [], [], []
    for i in Bar(range(N_QUESTION), "looking"):
        rng = random.Random(f"attention {i}")
        scene = toyworld.random_scene(rng, held_out=True)
        thing = rng.choice(scene.things)
        what = rng.choice(("color", "kind", "size", "place"))
        question, *_ = toyworld.ask_about(thing, what, scene)
        chat.reset()
        chat.show(["scene"], [toyworld.draw_scene(scene, 96)])
        for _ in chat.ask(f"{question}\n{SHORT}"):
            pass
        asked.append(what)
        heats.append(Look(chat).heat.mean(0))
        is_thing.append(torch.tensor(patch_owners(scene)) == scene.things.index(thing))

    heats = torch.stack(heats)                                              # (N_QUESTION, 64)
    is_thing = torch.stack(is_thing)
    mean_map = heats.mean(0).expand_as(heats)
    print(f"{'':20}peak on the thing   share on the thing")
    print(f"{'chance':20}{is_thing.float().mean():17.1%}{is_thing.float().mean():21.1%}")
    tell("mean of all", mean_map, is_thing)
    tell("its own", heats, is_thing)
    for what in sorted(set(asked)):
        rows = torch.tensor([other == what for other in asked])
        tell(f"  asked for {what}", heats[rows], is_thing[rows])
    return 0


def tell(name, heats, is_thing):
    peaks = is_thing.gather(1, heats.argmax(1, keepdim=True)).float().mean()
    shares = ((heats * is_thing).sum(1) / heats.sum(1)).mean()
    print(f"{name:20}{peaks:17.1%}{shares:21.1%}")


if __name__ == "__main__":
    sys.exit(run_program(main))
