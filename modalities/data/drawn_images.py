"""Images as they are stored, each with what is to be done to it, drawn but not done: augmentation on the device.

A process that loads draws what `image_augment.augmentation` would draw, from the same generators in the same order, and
puts it into the sample under AUGMENT; `device_augment` does it to a whole batch. So the distribution is that of the CPU
by construction, and a resumed run is exact. AUGMENT holds bytes, which stay on the CPU when a batch goes to the device:
what is to be launched there is then known without waiting for it.

Where stored images differ in size, the crop is cut by the process that decodes, and the rest is left to the device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from modalities.data.device_augment import cropped_alone
from modalities.data.image_augment import Augment, Interpolation, RandAugment, seed_libraries
from modalities.data.image_decode import Pixels
from modalities.data.listing import Derived
from nepa_core.basics import Batch

AUGMENT = "augment"
"""Key of what is to be done to an image: the bytes of one RECORD."""
RECORD = np.dtype([("box", "<i4", 4), ("flip", "<i4"), ("ops", "<i4", 2), ("amounts", "<f8", 2), ("turn", "<i4")])
"""Top, left, height and width of the crop; whether it is flipped; two operations of RandAugment, by their place in
timm's list or -1 for none, with the argument of each; the EXIF orientation of what is still to be decoded."""


class Drawing:
    """Draws what `image_augment.augmentation` does to one image of a training split: a RECORD, flat.

    Args:
        augment: "crop", "crop_flip" or "randaugment". size: (H, W) to which crops are scaled.
    """

    def __init__(self, augment: Augment, size: tuple[int, int], mean: Sequence[float]) -> None:
        from torchvision.transforms import v2  # as slow to import as torch

        self.crop = v2.RandomResizedCrop(size)
        self.flips = augment != "crop"
        self.policy = RandAugment(size, mean).transform if augment == "randaugment" else None

    def __call__(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """For an image as it is stored: [1] of RECORD."""
        found = np.zeros(1, RECORD)
        box = self.crop.make_params([torch.empty((1, height, width), device="meta")])
        found["box"] = [box[key] for key in ("top", "left", "height", "width")]
        found["flip"] = self.flips and bool(torch.rand(1) < 0.5)
        found["ops"] = -1
        if self.policy is not None:
            seed_libraries()
            ops = self.policy.ops
            for place, op in enumerate(np.random.choice(len(ops), self.policy.num_layers)):
                if random.random() > ops[op].prob:
                    continue
                strength = min(max(random.gauss(ops[op].magnitude, ops[op].magnitude_std), 0.0), 10.0)
                given = () if ops[op].level_fn is None else ops[op].level_fn(strength, ops[op].hparams)
                found["ops"][0, place] = op
                found["amounts"][0, place] = given[0] if given else 0.0
        return found


class DrawnImages(Derived, Dataset[Batch]):
    """{"image": uint8 [C, h, w], AUGMENT, "label"}, and "erase" where that is asked for.

    Args:
        stored: the images, by `decoded(index)`, or `pixels(indices)` where they have one size.
        one_size: that they do, so that crops are cut on the device.
        size, interpolation: of crops that are cut here.
        erase: draws the rectangle that the sample carries.
    """

    def __init__(
        self,
        stored: Any,
        drawing: Drawing,
        *,
        one_size: bool,
        size: tuple[int, int],
        interpolation: Interpolation,
        erase: Callable[[], Tensor] | None,
    ) -> None:
        self.stored, self.drawing, self.erase = stored, drawing, erase
        self.one_size, self.size, self.interpolation = one_size, size, interpolation
        if hasattr(stored, "raw"):
            self.raw: Callable[[int], bytes | Pixels] = stored.raw
        if one_size:
            self.__getitems__ = self._whole_batch

    def decoded(self, index: int) -> Tensor:
        """See `DecodedImages.decoded`."""
        found: Tensor = self.stored.decoded(index)
        return found

    def __getitem__(self, index: int) -> Batch:
        image = self.stored.pixels([index])[0] if self.one_size else self.decoded(index)
        drawn = self.drawing(*image.shape[-2:])
        image = image if self.one_size else self._cut(image, drawn)
        return {"image": image, **self._beside(index, drawn)}

    def _whole_batch(self, indices: list[int]) -> Batch:
        """Images of one size are read at once, before anything is drawn."""
        image = self.stored.pixels(indices)
        beside = [self._beside(index, self.drawing(*image.shape[-2:])) for index in indices]
        return {"image": image, **default_collate(beside)}

    def _beside(self, index: int, drawn: np.ndarray[Any, Any]) -> Batch:
        sample = {AUGMENT: drawn.tobytes(), "label": self.stored.labels[index]}
        return sample if self.erase is None else sample | {"erase": self.erase()}

    def _cut(self, image: Tensor, drawn: np.ndarray[Any, Any]) -> Tensor:
        """The crop at its size; nothing of it is then left to the device."""
        cut = cropped_alone(image, drawn["box"][0], self.size, self.interpolation)
        drawn["box"] = (0, 0, *self.size)
        return cut


def records(batch: Batch) -> np.ndarray[Any, Any]:
    """What is to be done to every image of a batch: [B] of RECORD."""
    return np.frombuffer(b"".join(batch[AUGMENT]), RECORD)
