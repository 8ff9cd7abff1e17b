"""Average precision of several classes, as a mean over samples.

The mean average precision (mAP) of C classes is (1 / C) sum_c (1 / S_c) sum_{s has c} precision_c(s), where S_c samples
have class c and precision_c(s) is the share that has it among the samples with the score of s or more. The order of the
sums is free, so each sample adds something of its own, and two networks can be compared sample by sample.
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
        score, right = scores[:, place], truth[:, place]
        falling, order = score.sort(descending=True)
        above = torch.searchsorted(-falling, -score, right=True)  # samples with this score or more
        total += right * right[order].cumsum(0)[above - 1] / above / right.sum()
    return total * len(truth) / classes.sum().clamp(min=1)


def ranked(truth: Tensor) -> Tensor:
    """The classes, bool [C], that some samples have and some have not; `truth` [S, C] of 0 and 1."""
    count = truth.sum(0)
    return (count > 0) & (count < len(truth))
