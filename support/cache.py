"""What need not be computed again: the KV cache of a prefix that prompts share, and that of a chat.

A cache is a LayerCache for each layer. Where nothing is known yet, prefill(decoder, x, ...) is no more than
decoder(x, wanted=last, cache=cache), last being the flat positions of the prompts' last tokens.
"""

import torch
import torch.nn.functional as F


def prefill(decoder, x, is_image, lengths, cache, history=None):
    """Prompts (B, T, D) into a new cache -> hidden states (B, D) of their last tokens."""
    if history:
        history.reuse_prefix(x, cache)
    else:
        prefill_shared_prefix(decoder, x, is_image, lengths, cache)

    # The rest, of which each token sees what the cache holds, and what is before it.
    B, T, _ = x.shape
    start = cache[0].n_read
    positions = torch.arange(start, T, device=x.device)[None]               # (1, T - start)
    mask = None
    if start:
        mask = torch.arange(T, device=x.device) <= positions.T              # (T - start, T)
        mask = mask[None, None]
    last = torch.arange(B, device=x.device) * (T - start) + lengths - 1 - start
    return decoder(x[:, start:], positions, mask, last, cache)


def prefill_shared_prefix(decoder, x, is_image, lengths, cache):
    """Prompts (B, T, D) about one picture begin alike. Of neighbouring rows that are equal up to where the
    pictures of all rows have ended the first is computed, and its keys and values go to the others, too."""
    place = torch.arange(1, x.shape[1] + 1, device=x.device)
    end = int(torch.minimum((is_image * place).amax(1), lengths - 1).min())
    differs = (x[1:, :end] != x[:-1, :end]).flatten(1).any(1)               # (B - 1,)
    if end == 0 or differs.all():
        return
    is_first = F.pad(differs, (1, 0), value=True)                           # (B,)
    which_first = is_first.cumsum(0) - 1                                    # (B,), each row's among the first
    shared = decoder.new_cache(int(is_first.sum()), end)
    decoder(x[is_first, :end], cache=shared)
    for layer, layer_shared in zip(cache, shared):
        layer.append(*layer_shared.room[:, which_first])


class KVHistory:
    """What a chat has computed so far: its next question costs its own tokens and tiles alone."""

    def __init__(self):
        self.tile_features = []      # (n, N, D_f) each time some tiles were new
        self.x = None                # embeddings (1, L, D) of all tokens read and written
        self.cache = None            # their keys and values

    def features(self, vlm, pixels):
        """All tiles of the chat so far (n, 3, S, S) -> their features (n, N, D_f), or None."""
        n_known = sum(len(features) for features in self.tile_features)
        if pixels is not None and len(pixels) > n_known:
            self.tile_features.append(vlm.features(pixels[n_known:]))
        return torch.cat(self.tile_features) if self.tile_features else None

    def reuse_prefix(self, x, cache):
        """Copy what is known of a prompt (1, T, D), not its last token, into a new cache."""
        if self.x is not None:
            T = min(x.shape[1] - 1, self.x.shape[1])
            is_equal = (x[0, :T] == self.x[0, :T]).all(-1)                  # (T,)
            n_known = int(is_equal.cumprod(0).sum())
            for layer, old in zip(cache, self.cache):
                layer.append(*old.room[:, :, :, :n_known])
        self.x = x
        self.cache = cache
