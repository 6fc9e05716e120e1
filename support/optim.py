"""support.optim: moved here; to be rewritten."""

from torch.optim.adamw import adamw
import torch



def part_of(name):
    """A parameter's name -> its part as --train calls it."""
    return {"decoder": "llm", "vision2": "vision"}.get(name.split(".")[0], name.split(".")[0])



class SplitAdamW(torch.optim.Optimizer):
    """AdamW that loses nothing over bfloat16 weights: the lower half of each float32 weight is kept here, in 16 bits.

    weight = upper * 2^16 + lower, as bits; the upper half, rounded, is the bfloat16 that the model works with. Alone it could not follow: a
    step of 2e-5 is 200 times less than what a bfloat16 of 1.0 can move by. Weights in float32 (a LoRA's) are stepped as ever.
    """

    def __init__(self, groups, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                    state |= {"lower": torch.zeros_like(p, dtype=torch.int16)} if p.dtype == torch.bfloat16 else {}
                w = ((p.view(torch.int16).int() << 16) + state["lower"]).view(torch.float32) if "lower" in state else p
                adamw([w], [p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True, amsgrad=False, maximize=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])
                if "lower" in state:
                    bits = w.view(torch.int32)
                    upper = (bits + 2**15) >> 16                            # to the nearest: the lower half is from -2^15 to 2^15 - 1
                    state["lower"].copy_(bits - (upper << 16))
                    p.copy_(upper.to(torch.int16).view(torch.bfloat16))



def lr_of(part, cfg):
    return {"connector": cfg.lr_connector, "vision": cfg.lr_vision}.get(part) or cfg.lr



def make_optimizer(vlm, cfg):
    """AdamW; each part with its learning rate as a share of --lr, weight decay on matrices only."""
    groups = {}
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            groups.setdefault((p.ndim < 2, part_of(name)), []).append(p)
    groups = [{"params": ps, "weight_decay": 0.0 if vector else cfg.weight_decay, "share": lr_of(part, cfg) / cfg.lr}
              for (vector, part), ps in sorted(groups.items(), key=lambda kv: kv[0])]
    if cfg.weights == "bfloat16":
        return SplitAdamW(groups, lr=cfg.lr)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=True)
