"""--trace: the way of a question through the model in numbers, as it goes: shapes, and milliseconds since the
line before."""

import math
import sys
import time
from functools import partial

import torch

N_WORD = 5                           # first tokens of an answer, and likeliest ones for each


class Trace:
    def __init__(self, chat):
        """From now on the parts of the chat's model tell what goes in and what comes out."""
        self.chat = chat
        self.begin()
        vlm = chat.vlm
        parts = {f"tower {i}": tower for i, tower in enumerate(vlm.towers, 1)}
        parts["connector"] = vlm.connector
        parts |= {f"layer {i}": layer for i, layer in enumerate(vlm.decoder.layers, 1)}
        for name, part in parts.items():
            part.register_forward_hook(partial(self.tell_shapes, name))
        vlm.decoder.register_forward_pre_hook(self.tell_prompt)
        vlm.decoder.lm_head.register_forward_hook(self.tell_token)

    def begin(self):
        """A question comes, or the first picture."""
        self.n_token = 0  # of the answer, so far
        self.told = time.perf_counter()

    def tell_picture(self, file, image, tiles, layout):
        cut = f"{tuple(tiles.shape)} by {self.chat.vlm.cfg.image_mode}, {len(layout)} visual tokens"
        self.tell("picture", f"{file}, {image.width} x {image.height} -> {cut}")

    def tell_shapes(self, name, part, inputs, output):
        if self.n_token == 0:
            self.tell(name, f"{tuple(inputs[0].shape)} -> {tuple(output.shape)}")

    def tell_prompt(self, decoder, inputs):
        if self.n_token == 0:
            tokens, _ = self.chat.prompt
            n_visual = tokens.count(self.chat.tok.image)
            new = f"{inputs[0].shape[1]} not read before"
            self.tell("prompt", f"{len(tokens)} tokens, {n_visual} of them visual, {new}")

    def tell_token(self, head, inputs, logits):
        self.n_token += 1
        if self.n_token <= N_WORD:
            logits = logits[0].float().clone()
            logits[self.chat.vlm.cfg.never_generated] = -math.inf
            chances, ids = logits.softmax(-1).topk(N_WORD)
            likeliest = [f"{self.chat.tok.piece(i)} {p:.1%}" for i, p in zip(ids.tolist(), chances.tolist())]
            self.tell(f"token {self.n_token}", "  ".join(likeliest))

    def tell(self, what, text):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        print(f"{what:>10} {1000 * (now - self.told):8.1f} ms  {text}", file=sys.stderr)
        self.told = now
