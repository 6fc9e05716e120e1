"""lab.losses: moved here; to be rewritten."""

import torch
import torch.nn.functional as F



def cdpo_loss(r_c, r_r, epsilon):
    """-(1 - e) log s(r_c - r_r) - e log s(r_r - r_c)                ericmitchell.ai/cdpo.pdf: a label is wrong with probability e"""
    return -((1 - epsilon) * F.logsigmoid(r_c - r_r) + epsilon * F.logsigmoid(r_r - r_c)).mean()



def robust_dpo_loss(r_c, r_r, epsilon):
    """(-(1 - e) log s(r_c - r_r) + e log s(r_r - r_c)) / (1 - 2e)   arXiv:2403.00409, Eq. 12: unbiased under such labels"""
    return (epsilon * F.logsigmoid(r_r - r_c) - (1 - epsilon) * F.logsigmoid(r_c - r_r)).mean() / (1 - 2 * epsilon)



def hinge_loss(r_c, r_r):
    """max(0, 1 - (r_c - r_r))                                       RSO, arXiv:2309.06657, Eq. 8"""
    return F.relu(1 - (r_c - r_r)).mean()



def ipo_loss(d_c, d_r, n_c, n_r, beta):
    """(d_c / |y_c| - d_r / |y_r| - 1 / 2 beta)^2, d = s - s_ref      arXiv:2310.12036, Eq. 17; means over tokens, as in the ablation"""
    return (d_c / n_c - d_r / n_r - 1 / (2 * beta)).square().mean()



def sppo_loss(d_c, d_r, beta):
    """(d_c - 1 / 2 beta)^2 + (d_r + 1 / 2 beta)^2                   arXiv:2405.00675, Eq. 4.7, the winner winning surely"""
    return ((d_c - 0.5 / beta).square() + (d_r + 0.5 / beta).square()).mean()



def aot_loss(gap, gap_ref, beta):
    """-log s(beta (sort(gap) - sort(gap_ref))), gap = s_c - s_r     arXiv:2406.05882, paired; sorted over the batch: of one pair it is DPO"""
    return -F.logsigmoid(beta * (gap.sort().values - gap_ref.sort().values)).mean()



def orpo_loss(s_c, s_r, n_c, n_r):
    """-log s(log odds_c - log odds_r), odds = p / (1 - p), p = exp(s / |y|)         arXiv:2403.07691, Eq. 7; no reference"""
    odds = lambda mean: mean - torch.log(-torch.expm1(mean))               # log p - log(1 - p), p so near 1 that 1 - p must not be rounded
    return -F.logsigmoid(odds(s_c / n_c) - odds(s_r / n_r)).mean()
