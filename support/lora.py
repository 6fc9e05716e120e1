"""LoRA (arXiv:2106.09685): train a few rows and columns beside each frozen matrix of the decoder.

    y = W x + alpha/r B A dropout(x)    Eq. 3; A is (r, in), B is (out, r) and begins at zero: y begins as W x
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.cli import UserError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """What a linear layer becomes, its weight as it was: layer.__class__ = LoRALinear, then begin_lora."""

    is_on = True                         # of all layers at once: see lora_off

    def begin_lora(self, r, alpha, dropout):
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as PyTorch starts a linear layer
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        y = super().forward(x)
        if not self.is_on:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))            # (..., r)
        return y + self.scale * F.linear(low, self.lora_B.to(low.dtype))


def merge_weight(weight, A, B, scale):
    """W + alpha/r B A"""
    A, B = A.to(weight.device).float(), B.to(weight.device).float()
    return (weight.float() + scale * (B @ A)).to(weight.dtype)


def add_lora(vlm, r, alpha, dropout=0.0, targets=LORA_TARGETS):
    """Put a LoRA on the decoder's linear layers of these names. Of the decoder nothing else trains then.

    vlm.lora is what PEFT's adapter_config.json says of it.
    """
    vlm.decoder.requires_grad_(False)
    for name, layer in vlm.decoder.layers.named_modules():
        if name.rpartition(".")[2] in targets:
            layer.__class__ = LoRALinear
            layer.begin_lora(r, alpha, dropout)
    vlm.lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(targets)})",
    }


def add_lora_of_flags(vlm, cfg):
    """The LoRA that --lora-r asks for, if it does."""
    if cfg.lora_r:
        if not any(p.requires_grad for p in vlm.decoder.parameters()):
            raise UserError(f"--train {cfg.train}: --lora-r trains in the decoder; add llm to --train")
        targets = cfg.lora_target.split(",") if cfg.lora_target else LORA_TARGETS
        add_lora(vlm, cfg.lora_r, cfg.lora_alpha or 2 * cfg.lora_r, cfg.lora_dropout, targets)
    elif cfg.lora_alpha or cfg.lora_dropout or cfg.lora_target:
        raise UserError("--lora-alpha, --lora-dropout and --lora-target are of a LoRA: give --lora-r, too")


@contextmanager
def lora_off():
    """Inside, a model is its base: the reference of preference learning, without a copy of the weights."""
    LoRALinear.is_on = False
    try:
        yield
    finally:
        LoRALinear.is_on = True


@torch.no_grad()
def merged_state(vlm):
    """{name: tensor} of a model without LoRA that computes the same."""
    state = {name: t for name, t in vlm.state_dict().items() if ".lora_" not in name}
    for name, layer in vlm.named_modules():
        if isinstance(layer, LoRALinear):
            state[f"{name}.weight"] = merge_weight(layer.weight, layer.lora_A, layer.lora_B, layer.scale)
    return state
