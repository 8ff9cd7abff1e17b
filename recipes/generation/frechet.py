"""The Fréchet inception distance of pictures, by torch-fidelity and weights that the user has."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nepa_core.basics import UserError, needs


class Frechet(NamedTuple):
    """Distances to held-out pictures, lower is better: of drawn ones, and of as many training pictures."""

    drawn: float
    training: float


def check_weights(file: str) -> None:
    """Whether `fid=FILE` can be used, before anything is computed.

    Raises:
        UserError: torch-fidelity is not installed, there is no such file, or it holds code or other weights.
    """
    needs("fid=", "torch_fidelity", extra="fid")
    if not Path(file).is_file():
        raise UserError(f"fid={file}: there is no such file; give the Inception weights of torch-fidelity's releases")
    try:
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity unpickles it whole
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with torch.random.fork_rng(devices=[]):
            FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    except Exception as error:
        first = str(error).splitlines()[0][:80]
        raise UserError(f"fid={file} holds no Inception weights of torch-fidelity ({first}); take its own") from error


def frechet(held_out: Tensor, drawn: Tensor, training: Tensor, weights: str) -> Frechet:
    """FID (Heusel et al. 2017, arXiv 1706.08500) in torch-fidelity's form, of pictures uint8 [n, C, H, W], C 1 or 3.

    Grey pictures are repeated in three channels. It depends on how many there are, so `training` stands beside.
    """
    from torch_fidelity import calculate_metrics

    def distance(pictures: Tensor) -> float:
        found = calculate_metrics(
            input1=_Pictures(pictures),
            input2=_Pictures(held_out),
            fid=True,
            feature_extractor_weights_path=weights,
            cuda=torch.cuda.is_available(),
            batch_size=16,
            cache=False,
            verbose=False,
        )
        return float(found["frechet_inception_distance"])

    return Frechet(distance(drawn), distance(training[: len(drawn)]))


class _Pictures(Dataset[Tensor]):
    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]
