"""support.lora: moved here; to be rewritten."""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F



LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")



class LoRALinear(nn.Linear):
    """y = W x + alpha/r B A dropout(x), Eq. 3 of the paper: W stays, A (r, in) and B (out, r) learn, and B begins at zero, so y begins as it was."""

    def __init__(self, linear, r, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = linear.in_features, linear.out_features, linear.weight, linear.bias
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, self.in_features, device=self.weight.device), a=5**0.5))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.weight.device))
        self.scale, self.dropout, self.on = alpha / r, nn.Dropout(dropout), True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return y + self.scale * F.linear(low, self.lora_B.to(low.dtype))



def add_lora(vlm, r, alpha, dropout=0.0, targets=LORA_TARGETS):
    """Put a LoRA on the decoder's linear layers of these names; of the decoder nothing else trains from here on."""
    vlm.decoder.requires_grad_(False)
    for block in vlm.decoder.layers:
        for owner in (block.self_attn, block.mlp):
            for name, linear in list(owner.named_children()):
                if name in targets:
                    setattr(owner, name, LoRALinear(linear, r, alpha, dropout))
    vlm.lora = {"base": None, "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "targets": list(targets)}



@contextmanager
def lora_off(vlm):
    """Inside, the model is its base: the reference of preference learning, without a second copy of the weights."""
    def switch(on):
        for m in vlm.modules():
            if isinstance(m, LoRALinear):
                m.on = on
    switch(False)
    try:
        yield
    finally:
        switch(True)



def merged_state(vlm):
    """The weights without LoRA, W + alpha/r B A in its place: {our name: tensor}."""
    state = {name: t for name, t in vlm.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, m in vlm.named_modules():
        if isinstance(m, LoRALinear):
            state[f"{name}.weight"] = (m.weight.float() + m.scale * m.lora_B.detach().float() @ m.lora_A.detach().float()).to(m.weight.dtype)
    return state
