"""The other preference losses that MPO was compared with (arXiv:2411.10442v2, Table 6), but for TR-DPO.

    python -m lab.losses --loss ipo --w-g 0 --data PAIRS.jsonl --image-root DIR     # else as mpo.py
    python -m lab.losses --loss ipo --w-g 1 ...                                     # the paper's IPO+

The loss stands in the place of w_p L_p + w_q L_q, a mean over the pairs. d = s - s_ref, r = beta d,
gap = s_c - s_r, |y| is the number of tokens of y.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import mpo
from support.cli import REQUIRED, arg, run_program

NAMES = ("cdpo", "robust-dpo", "hinge", "ipo", "sppo", "aot", "orpo")


@dataclass
class LossConfig(mpo.MPOConfig):
    loss: str = arg(REQUIRED, "the preference loss", choices=NAMES)
    epsilon: float = arg(0.1, "share of wrong labels that cdpo and robust-dpo assume", below=0.5)
    w_p: float = 0.0                 # no flags here: the loss named is all there is beside SFT
    w_q: float = 0.0


def loss_terms(rewards, s, n_token, delta, cfg):
    """As mpo.mpo_terms. ORPO's weight is its paper's 0.1."""
    e = cfg.epsilon
    beta = cfg.beta
    r_c, r_r = rewards.unbind(1)
    s_c, s_r = s.unbind(1)
    n_c, n_r = n_token.unbind(1)
    d_c, d_r = (rewards / beta).unbind(1)
    margin = r_c - r_r
    right = F.logsigmoid(margin)
    wrong = F.logsigmoid(-margin)
    gap = s_c - s_r
    ahead = gap.sort().values - (gap - (d_c - d_r)).sort().values
    losses = {
        # -(1 - e) log sigma(r_c - r_r) - e log sigma(r_r - r_c)                    ericmitchell.ai/cdpo.pdf
        "cdpo": -((1 - e) * right + e * wrong),
        # (-(1 - e) log sigma(r_c - r_r) + e log sigma(r_r - r_c)) / (1 - 2e)       arXiv:2403.00409, Eq. 12
        "robust-dpo": (e * wrong - (1 - e) * right) / (1 - 2 * e),
        # max(0, 1 - (r_c - r_r))                                               RSO, arXiv:2309.06657, Eq. 8
        "hinge": F.relu(1 - margin),
        # (d_c / |y_c| - d_r / |y_r| - 1 / 2 beta)^2             arXiv:2310.12036, Eq. 17; means over tokens
        "ipo": (d_c / n_c - d_r / n_r - 1 / (2 * beta)).square(),
        # (d_c - 1 / 2 beta)^2 + (d_r + 1 / 2 beta)^2      arXiv:2405.00675, Eq. 4.7, the winner surely wins
        "sppo": (d_c - 0.5 / beta).square() + (d_r + 0.5 / beta).square(),
        # -log sigma(beta (sort(gap) - sort(gap_ref)))             arXiv:2406.05882, paired; of one pair DPO
        "aot": -F.logsigmoid(beta * ahead),
        # -log sigma(log odds_c - log odds_r), odds = p / (1 - p), p = exp(s / |y|)  arXiv:2403.07691, Eq. 7
        "orpo": -F.logsigmoid(log_odds(s_c / n_c) - log_odds(s_r / n_r)),
    }
    weight = 0.1 if cfg.loss == "orpo" else 1.0
    return {cfg.loss: (weight, losses[cfg.loss].mean()), "sft": (cfg.w_g, mpo.sft_loss(s_c, n_c))}


def log_odds(log_p):
    return log_p - torch.log(-torch.expm1(log_p))  # p may be so near 1 that 1 - p must not be rounded


class Comparing(mpo.Preferring):
    terms = staticmethod(loss_terms)


def main(argv=None):
    return mpo.main(argv, LossConfig, Comparing, __doc__)


if __name__ == "__main__":
    sys.exit(run_program(main))
