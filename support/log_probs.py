"""Log-probabilities of target tokens over a large vocabulary, without ever holding all logits.

    log p(target) = log softmax(h W^T)[target]          h: hidden states (K, D), W: the head's weight (V, D)
"""

import torch


def token_log_probs(h, W, targets):
    """log softmax(h W^T)[target] of each row: (K, D), (V, D), (K,) -> (K,) float32.

    Equal to -F.cross_entropy(h @ W.T, targets, reduction="none"), in less memory. SFT takes minus their mean,
    DPO their sum over each answer.
    """
    device = h.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h, W = h.to(dtype), W.to(dtype)
    return TokenLogProbs.apply(h, W, targets)


class TokenLogProbs(torch.autograd.Function):
    """A slice of rows at a time, so that the logits of all rows, (K, V) in float32, never exist.

    The gradient of a target's log-probability by its logits is onehot(target) - p. The first slices keep it
    for backward, where their logits were. For more there may be no room: they compute it once more.
    """

    slice_size = {"cpu": 2**23, "cuda": 2**26}  # logits: 32 MB in float32 stay in a cache, 256 MB fill a GPU
    n_kept = 8                                  # slices

    @staticmethod
    def forward(ctx, h, W, targets):
        n_rows = max(1, TokenLogProbs.slice_size[h.device.type] // len(W))
        ctx.kept = []
        log_probs = []
        for x, target in zip(h.split(n_rows), targets.split(n_rows), strict=True):
            log_prob, grad = log_prob_and_grad(x, W, target)
            log_probs.append(log_prob)
            if len(ctx.kept) < TokenLogProbs.n_kept:
                ctx.kept.append(grad)
        ctx.n_rows = n_rows
        ctx.save_for_backward(h, W, targets)
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx, upstream):
        h, W, targets = ctx.saved_tensors
        W_learns = ctx.needs_input_grad[1]
        grad_h = torch.empty_like(h)
        grad_W = torch.zeros_like(W, dtype=torch.float32) if W_learns else None
        for start in range(0, len(h), ctx.n_rows):
            rows = slice(start, start + ctx.n_rows)
            grad = ctx.kept.pop(0) if ctx.kept else log_prob_and_grad(h[rows], W, targets[rows])[1]
            factor = upstream[rows, None]                                   # (r, 1)
            grad_h[rows] = (grad @ W) * factor
            x = (h[rows] * factor).to(h.dtype)
            if W_learns and h.dtype == torch.float32:
                grad_W.addmm_(grad.T, x)  # half the memory traffic of +=
            elif W_learns:
                grad_W += grad.T @ x
        return grad_h, grad_W.to(W.dtype) if W_learns else None, None


def log_prob_and_grad(x, W, target):
    """A slice's log-probabilities (r,), and their gradient by its logits (r, V) in the place of these."""
    target = target[:, None]                                                # (r, 1)
    logits = (x @ W.T).float()                                              # (r, V)
    top = logits.amax(-1, keepdim=True)
    of_target = logits.gather(1, target)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    grad = p.div_(-total).scatter_add_(1, target, torch.ones_like(of_target))  # onehot(target) - p
    return (of_target - top - total.log())[:, 0], grad.to(x.dtype)
