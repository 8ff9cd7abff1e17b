"""The classifiers and regressions of a probe: each is fitted on features of training samples and scored on others.

What comes back is a credit for each sample it was scored on, float64 [S], in their order. Their mean is the score:
accuracy (1 where the answer is right, else 0), mAP (see `recipes.networks.average_precision`), or R2 (1 minus the
squared error over the variance of the labels).

All are deterministic (their random numbers come from generators of their own) and run on the device that their
features lie on.

Shapes: S samples, T tokens, D width of a feature, C classes, K numbers. Features [S, D] float32, labels [S] int64 in
0..C-1, or bool [S, C] for several classes a sample, or [S, K] float32 for a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

from nepa_core.runtime.optim import lr_factor
from recipes.networks.average_precision import average_precision
from recipes.networks.heads import AttentiveHead
from recipes.statistics.ridge import r2, standardised

Classifier = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(features, labels, features to score on, their labels) -> credits [S] whose mean is accuracy, mAP or R2."""

_AT_ONCE = 2**27
"""Numbers in one intermediate matrix: half a gigabyte."""


def knn_regression(
    x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The mean of the numbers [S, K] of the neighbours that `knn` finds, weighted as there; credits of R2."""
    return r2(_mean_of_neighbours(x, y, x_test, k, temperature), y_test)


def knn_multi_label(
    x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The share of the neighbours that `knn` finds with each class, weighted as there; credits of mAP."""
    return average_precision(_mean_of_neighbours(x, y.float(), x_test, k, temperature), y_test)


def _mean_of_neighbours(x: Tensor, y: Tensor, x_test: Tensor, k: int, temperature: float) -> Tensor:
    found = [
        ((similarity / temperature).softmax(1)[..., None] * y[nearest]).sum(1)
        for similarity, nearest in _neighbours(x, x_test, k)
    ]
    return torch.cat(found)


def _neighbours(x: Tensor, x_test: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine similarity and place [s, k] of the nearest of x, for some s of `x_test` after the others."""
    x = F.normalize(x, dim=1)
    for part in F.normalize(x_test, dim=1).split(max(_AT_ONCE // len(x), 1)):
        yield (part @ x.T).topk(min(k, len(x)), dim=1)


def knn(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Weighted nearest neighbours as DINO defines them (arXiv 2104.14294, Appendix F.1).

    Each of the k training samples of the largest cosine similarity s votes for its class with exp(s / temperature).
    """
    classes = int(max(y.max(), y_test.max())) + 1
    named = []
    for similarity, nearest in _neighbours(x, x_test, k):
        votes = similarity.new_zeros(len(nearest), classes)
        named.append(votes.scatter_add_(1, y[nearest], (similarity / temperature).exp()).argmax(1))
    return (torch.cat(named) == y_test).double()


def linear(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    """Logistic regression (L2, C = 1) on features standardised by the training samples, by L-BFGS.

    scikit-learn's `LogisticRegression`, on any device and without a matrix [S, C] at once. 200 iterations, which are
    enough to compare rows.
    """
    x, x_test = standardised(x, x_test)
    classes = int(max(y.max(), y_test.max())) + 1

    def loss_and_error(logits: Tensor, truth: Tensor) -> tuple[float, Tensor]:
        log_p = logits.log_softmax(1)
        loss = -float(log_p.gather(1, truth[:, None]).sum())
        error = log_p.exp_()
        error[torch.arange(len(truth), device=x.device), truth] -= 1
        return loss, error

    weight, bias = _fit_logistic(x, y, classes, loss_and_error)
    return _right(torch.addmm(bias, x_test, weight), y_test)


def linear_multi_label(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    """A logistic regression of each class against the rest, fitted as `linear` is; credits of mAP."""
    x, x_test = standardised(x, x_test)

    def loss_and_error(logits: Tensor, truth: Tensor) -> tuple[float, Tensor]:
        wanted = truth.to(logits)
        loss = float(F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum"))
        return loss, logits.sigmoid() - wanted

    weight, bias = _fit_logistic(x, y, y.shape[1], loss_and_error)
    return average_precision(torch.addmm(bias, x_test, weight), y_test)


def _fit_logistic(
    x: Tensor, y: Tensor, classes: int, loss_and_error: Callable[[Tensor, Tensor], tuple[float, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C] with the least loss, L2 with C = 1, by L-BFGS.

    Args:
        loss_and_error: logits [s, C] and labels of some samples -> the sum of their losses, and its gradient [s, C].
    """
    samples, dim = x.shape
    chunk = max(_AT_ONCE // classes, 1)

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = _unpacked(flat, dim, x)
        loss = 0.5 * float(weight.double().square().sum())
        gradient = torch.cat((weight, torch.zeros_like(bias)[None]))
        for some, truth in zip(x.split(chunk), y.split(chunk), strict=True):
            of_these, error = loss_and_error(torch.addmm(bias, some, weight), truth)
            loss += of_these
            gradient[:-1].addmm_(some.T, error)
            gradient[-1] += error.sum(0)
        return loss / samples, (gradient.double().cpu().numpy() / samples).ravel()

    found = minimize(
        loss_and_gradient,
        np.zeros((dim + 1) * classes),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 200, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps, "maxls": 50},
    )
    return _unpacked(found.x, dim, x)


def _unpacked(flat: np.ndarray, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(flat).to(like).view(dim + 1, -1)
    return both[:-1], both[-1]


class LinearProtocol(NamedTuple):
    """A linear probe trained by LARS."""

    base_lr: float
    batch: int
    epochs: int
    warmup_epochs: int


MAE = LinearProtocol(base_lr=0.1, batch=16_384, epochs=90, warmup_epochs=10)
"""The linear-probe protocol of MAE (arXiv 2111.06377, Appendix A.1, "linear probing setting"): LARS without weight
decay, momentum 0.9, lr 0.1 x batch / 256, cosine decay, BatchNorm without affine before the linear layer. The rate
follows every step, from 0 at the first, as in MAE's code (util/lr_sched.py with a fraction of an epoch). Its random
crops and flips are left out: features are computed once."""


def lars(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, *, protocol: LinearProtocol = MAE) -> Tensor:
    """A linear layer behind a BatchNorm without affine, trained by LARS.

    An epoch is split into even batches, because the statistics of a small rest would be noise. Fewer samples than a
    batch are one batch at the same learning rate; 90 such steps are few, so compare its rows with each other only.
    """
    classes = int(max(y.max(), y_test.max())) + 1
    norm = nn.BatchNorm1d(x.shape[1], eps=1e-6, affine=False).to(x.device)
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # nothing is drawn from the global generator
        head = nn.Linear(x.shape[1], classes)
    head.to_empty(device="cpu")
    nn.init.trunc_normal_(head.weight, std=0.01, generator=draw)
    nn.init.zeros_(head.bias)
    head.to(x.device)
    parts = -(-len(x) // protocol.batch)
    optimizer = lars_optimizer(head)
    lr, steps = protocol.base_lr * protocol.batch / 256, protocol.epochs * parts
    for epoch in range(protocol.epochs):
        for part, indices in enumerate(torch.randperm(len(x), generator=draw).tensor_split(parts)):
            step = epoch * parts + part
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, warmup=protocol.warmup_epochs * parts, total=steps)
            indices = indices.to(x.device)
            loss = F.cross_entropy(head(norm(x[indices])), y[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return _right(head(norm.eval()(x_test)), y_test)


def lars_optimizer(head: nn.Linear) -> torch.optim.Optimizer:
    """LARS as MAE uses it: the trust ratio (coefficient 0.001) scales the matrix, the bias takes the plain lr."""
    from timm.optim.lars import Lars  # importing timm takes longer than a probe of small data

    groups = [{"params": [head.weight], "always_adapt": True}, {"params": [head.bias], "always_adapt": False}]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0)


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features of all tokens, as memory maps: values [S, T, D], mask [S, T] bool (True = a real token)."""

    values: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, samples: slice | np.ndarray) -> TokenFeatures:
        return TokenFeatures(self.values[samples], self.mask[samples])

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values in float32 and mask on the device."""
        values = torch.from_numpy(np.array(self.values, np.float32))
        return values.to(device), torch.from_numpy(np.array(self.mask)).to(device)


class AttentiveProtocol(NamedTuple):
    """The recipe of an attentive probe: AdamW with linear warm-up and cosine decay.

    Attributes:
        lr, most_lr: peak learning rate at width 768, in inverse proportion to the width up to `most_lr`.
        steps: least number of steps; more where `epochs` of the data are more.
        warmup: share of the steps.
    """

    lr: float
    most_lr: float
    weight_decay: float
    batch: int
    epochs: int
    steps: int
    warmup: float


ATTENTIVE = AttentiveProtocol(
    lr=1e-3, most_lr=1e-2, weight_decay=0.05, batch=256, epochs=20, steps=500, warmup=0.1
)  # fmt: skip
"""Chosen here, by validation on digits; the papers sweep over learning rates and decays for every row."""


def attentive(
    x: TokenFeatures, y: Tensor, x_test: TokenFeatures, y_test: Tensor, *, protocol: AttentiveProtocol = ATTENTIVE
) -> Tensor:
    """An `AttentiveHead` on standardised tokens, trained by AdamW. Runs on the labels' device.

    Holds one batch of tokens at a time.
    """
    device = y.device
    classes = int(max(y.max(), y_test.max())) + 1
    mean, std = _token_moments(x, protocol.batch, device)
    draw = torch.Generator().manual_seed(0)
    head = _attentive_head(x.values.shape[-1], classes, draw).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=protocol.weight_decay)
    per_epoch = -(-len(x) // protocol.batch)
    epochs = max(protocol.epochs, -(-protocol.steps // per_epoch))
    steps = epochs * per_epoch
    lr = min(protocol.lr * 768 / x.values.shape[-1], protocol.most_lr)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=draw).tensor_split(per_epoch)
        indices = order[step % per_epoch].sort().values  # sorted: the disk is read forwards
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, warmup=math.ceil(protocol.warmup * steps), total=steps)
        values, mask = x[indices.numpy()].to(device)
        loss = F.cross_entropy(head((values - mean) / std, mask), y[indices.to(device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = []
    with torch.no_grad():
        for start in range(0, len(x_test), protocol.batch):
            values, mask = x_test[start : start + protocol.batch].to(device)
            logits = head((values - mean) / std, mask)
            right.append(_right(logits, y_test[start : start + protocol.batch]))
    return torch.cat(right)


def _attentive_head(dim: int, classes: int, draw: torch.Generator) -> AttentiveHead:
    """Truncated normal weights, zero biases, zero query; a function of this generator alone."""
    with torch.device("meta"):
        head = AttentiveHead(dim, classes)
    head.to_empty(device="cpu")
    for name, parameter in head.named_parameters():
        if name.endswith("weight"):
            nn.init.trunc_normal_(parameter, std=parameter.shape[1] ** -0.5, generator=draw)
        else:
            nn.init.zeros_(parameter)
    return head


def _token_moments(x: TokenFeatures, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] over all real tokens; 1 for a constant feature."""
    sums = torch.zeros(2, x.values.shape[-1], dtype=torch.float64, device=device)
    count = 0
    for start in range(0, len(x), batch):
        values, mask = x[start : start + batch].to(device)
        real = values[mask].double()
        sums += torch.stack((real.sum(0), real.square().sum(0)))
        count += len(real)
    mean = sums[0] / count
    std = (sums[1] / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).double()
