"""Linear layers for asking a model on a CPU: weights of 8 bits, of 16, and of 32 joined.

    W ~ scale Q        Q int8 (out, in); scale, one number a row, makes its largest |w| 127

A step, one token a row, waits for memory: int8 is half of what bfloat16 moves. A prompt waits for arithmetic:
its weights become a wider type just before their product. On a CPU without instructions for bfloat16 that is
float32, which is about 7 times as fast there.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CausalAttention, SwiGLU, rotate


class Int8Linear(nn.Module):
    """In the place of a linear layer without a bias. It is neither saved nor moved."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.scale = to_int8(weight)

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
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, Int8Linear(layer.weight.to(device)))


def widen_products(vlm):
    """On a CPU the layers of a 16-bit model become WideLinears; not its head, which has a row a question."""
    head = vlm.decoder.lm_head
    if head.weight.device.type == "cpu" and head.weight.element_size() == 2:
        for layer in vlm.modules():
            if type(layer) is nn.Linear and layer is not head:
                layer.__class__ = WideLinear


class JointAttention(CausalAttention):
    """q, k and v by one product with `joint`, all their rows"""

    def project(self, x, rope):
        heads = F.linear(x, self.joint).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        n_kv = self.v_proj.out_features // self.head_dim
        qk = rotate(heads[:, :-n_kv], *rope)
        return qk[:, :-n_kv], qk[:, -n_kv:], heads[:, -n_kv:]


class JointSwiGLU(SwiGLU):
    """Gate and up by one product with `joint`, the rows of both"""

    def forward(self, x):
        gate, up = F.linear(x, self.joint).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def join_products(vlm):
    """On a CPU in float32: matrices that meet the same input become one, and lie by columns, as which tall
    ones are up to 1.7 times as fast for one row. To be asked and not trained."""
    decoder = vlm.decoder
    weight = decoder.layers[0].mlp.up_proj.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    join_weights(decoder.lm_head)
    for block in decoder.layers:
        attn, mlp = block.self_attn, block.mlp
        attn.joint = join_weights(attn.q_proj, attn.k_proj, attn.v_proj)
        attn.__class__ = JointAttention
        mlp.joint = join_weights(mlp.gate_proj, mlp.up_proj)
        mlp.__class__ = JointSwiGLU


def join_weights(*layers):
    """(out, in) each -> all as one matrix (out of all, in) by columns, of which they become parts."""
    joint = torch.cat([layer.weight.data.T for layer in layers], dim=1).T
    parts = joint.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts):
        layer.weight.data = part
    return joint
