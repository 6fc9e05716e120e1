"""AdamW: a learning rate for each part of the model; a variant for bfloat16 weights, losing no small step."""

from collections import defaultdict

import torch
from torch.optim.adamw import adamw

PARTS = ("connector", "llm", "vision")


def part_of(name):
    """A parameter's name -> its part, as --train calls it."""
    first = name.split(".")[0]
    return {"decoder": "llm", "vision2": "vision"}.get(first, first)


def lr_of(part, cfg):
    own = {"connector": cfg.lr_connector, "vision": cfg.lr_vision}
    return own.get(part) or cfg.lr


def make_optimizer(vlm, cfg):
    """AdamW over what trains; weight decay on matrices only. Each part has its own peak of the rate."""
    alike = defaultdict(list)
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            decay = cfg.weight_decay if p.ndim >= 2 else 0.0
            alike[lr_of(part_of(name), cfg), decay].append(p)
    groups = [
        {"params": params, "weight_decay": decay, "peak_lr": lr}
        for (lr, decay), params in alike.items()
    ]
    if cfg.weights == "float32":
        return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)

    if cfg.token_budget or cfg.micro_batch_size:  # many small gradients are added up in float32
        for p in vlm.parameters():
            if p.requires_grad and p.dtype == torch.bfloat16:
                p.grad_dtype = torch.float32
    return SplitAdamW(groups, lr=cfg.lr)


class SplitAdamW(torch.optim.AdamW):
    """AdamW over bfloat16 weights, each with the lower 16 bits of its float32 value kept here.

        float32 weight = upper * 2^16 + lower, as bits; the upper half, rounded, is the bfloat16 of the model

    A bfloat16 of 1.0 moves by 2^-8 at least, 200 times a step of 2e-5: alone it would stand still. Weights in
    float32, such as a LoRA's, are stepped as ever.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_one(p, group)

    def step_one(self, p, group):
        state = self.state[p]
        is_split = p.dtype == torch.bfloat16
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if is_split:
                state["lower"] = torch.zeros_like(p, dtype=torch.int16)

        weight = p
        if is_split:
            upper = p.view(torch.int16).int()
            weight = ((upper << 16) + state["lower"]).view(torch.float32)
        adamw([weight], [p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
              lr=group["lr"], weight_decay=group["weight_decay"], beta1=0.9, beta2=0.999, eps=1e-8,
              fused=True, amsgrad=False, maximize=False)
        if is_split:
            bits = weight.view(torch.int32)
            upper = (bits + 2**15) >> 16  # to the nearest: the lower half is from -2^15 to 2^15 - 1
            state["lower"].copy_(bits - (upper << 16))
            p.copy_(upper.to(torch.int16).view(torch.bfloat16))
