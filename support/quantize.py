"""Linear layers for asking a model on a CPU: weights of 8 bits, of 16, and of 32 by columns.

    W ~ scale Q        Q int8 (out, in); scale, one number a row, makes its largest |w| 127

A step, one token a row, waits for memory: int8 is half of what bfloat16 moves. A prompt waits for arithmetic:
its weights become a wider type just before their product. On a CPU without instructions for bfloat16 that is
float32, which is about 7 times as fast there.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Int8Linear(nn.Module):
    """In the place of a linear layer without a bias."""

    def __init__(self, weight):
        super().__init__()
        Q, scale = to_int8(weight)
        self.register_buffer("weight", Q)
        self.register_buffer("scale", scale)

    def forward(self, x):
        if x.device.type == "cpu" and is_step(x):
            y = torch._weight_int8pack_mm(x[:, 0].bfloat16(), self.weight, self.scale)
            return y[:, None].to(x.dtype)
        return wide_product(x, self.weight) * self.scale.to(x.dtype)


class WideLinear(nn.Linear):
    def forward(self, x):
        if is_step(x):
            return super().forward(x)
        y = wide_product(x, self.weight)
        return y if self.bias is None else y + self.bias


def is_step(x):
    """Whether x is (B, 1, in): of a prompt there are more tokens, or (in the last block) only two axes."""
    return x.ndim == 3 and x.shape[1] == 1


def wide_product(x, weight):
    """(..., in) by (out, in) -> (..., out) in x's type."""
    is_slow = x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = torch.float32 if is_slow else x.dtype
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


def to_int8(weight):
    """(out, in) -> Q, scale"""
    largest = weight.float().abs().amax(1)
    scale = (largest / 127).clamp(min=1e-30).bfloat16()
    steps = weight / scale.float()[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def use_int8(module, device):
    """Every linear layer in a module becomes an Int8Linear, one after the other on its device."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child.weight.to(device)))


def widen_products(vlm):
    """On a CPU the layers of a 16-bit model become WideLinears; not its head, which has a row a question."""
    head = vlm.decoder.lm_head
    if head.weight.device.type == "cpu" and head.weight.element_size() == 2:
        for layer in vlm.modules():
            if type(layer) is nn.Linear and layer is not head:
                layer.__class__ = WideLinear


def lay_out_by_columns(vlm):
    """On a CPU one row meets a tall float32 matrix up to 1.7 times as fast if that lies by columns."""
    for layer in vlm.decoder.modules():
        if type(layer) is nn.Linear and layer.out_features > layer.in_features:
            weight = layer.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                weight.data = weight.data.T.contiguous().T
