"""Average precision of several classes, as a mean over samples.

The mean average precision (mAP) of C classes is (1 / C) sum_c AP_c. AP = (1 / P) sum_{s has c} precision(s), where P
samples have class c and precision(s) is the share that has it among the samples with the score of s or more. It is no
mean of independent numbers: a sample without the class lowers the precision of those below it, and P is drawn with the
samples. So each sample is credited with AP + S dAP/dw, its influence: what AP gains where that sample counts a little
more (w is its weight, 1 for all of S samples). The mean of the credits is AP, for AP does not change where all weights
do, and the spread of their mean is that of AP, to first order (the delta method, or infinitesimal jackknife).
"""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """What each sample adds to mAP, float64 [S]; their mean is mAP, 0 where nothing can be ranked.

    Classes that no sample has, or all have, are left out. Samples with one score share the lowest of their ranks, as in
    scikit-learn and torchmetrics.

    Args:
        scores: [S, C], floating. truth: [S, C], bool or 0 and 1.
    """
    truth = truth.double()
    total = truth.new_zeros(len(truth))
    classes = ranked(truth)
    for place in classes.nonzero()[:, 0].tolist():
        total += _influence(scores[:, place], truth[:, place])
    return total / classes.sum().clamp(min=1)


def _influence(score: Tensor, right: Tensor) -> Tensor:
    """AP + S dAP/dw of every sample [S] float64, of one class: scores [S], and who has it [S] float64 of 0 and 1.

    With N samples of the score of s or more, R of them right, and sums over right samples j of the score of s or less:
    dAP/dw = (right (R / N - AP + sum_j 1 / N_j) - sum_j R_j / N_j^2) / P.
    """
    falling, order = score.sort(descending=True)
    first, end = (torch.searchsorted(-falling, -score, right=right) for right in (False, True))
    above = end.double()
    precision = right[order].cumsum(0)[end - 1] / above

    def below(of_each: Tensor) -> Tensor:
        """Sum over the right samples with the score of each sample or less."""
        return (right * of_each)[order].flip(0).cumsum(0).flip(0)[first]

    positives = right.sum()
    mean = (right * precision).sum() / positives
    slope = (right * (precision - mean + below(1 / above)) - below(precision / above)) / positives
    return mean + len(score) * slope


def ranked(truth: Tensor) -> Tensor:
    """The classes, bool [C], that some samples have and some have not; `truth` [S, C] of 0 and 1."""
    count = truth.sum(0)
    return (count > 0) & (count < len(truth))
