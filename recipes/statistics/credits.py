"""What each held-out sample added to a score, packed into one short string of a JSON file.

A credit is one number a sample; the mean of a row's credits is its score. Of an accuracy it is 1 where the answer is
right and else 0 (one bit each); of an R2 it is 1 minus the sample's squared error over the data's variance, and of mAP
what `recipes.networks.average_precision` says (float16 both).
Two rows that were read on the same samples can be compared sample by sample, over seeds too, from their credits.
"""

import base64
import binascii

import numpy as np
import torch
from torch import Tensor

_LARGEST = float(torch.finfo(torch.float16).max)


def pack_credits(credits: Tensor) -> str:
    """`credits` [S] (floating, bool or integer, S >= 1) as "bits:S:BASE64" where all are 0 or 1, else "half:S:BASE64".

    "bits" holds eight samples a byte, the first in the highest bit, and is exact. "half" holds little-endian float16:
    relative error up to 2**-11, and values past ±65504 are cut to it. Raises ValueError unless `credits` is [S] with
    S >= 1 and all finite.
    """
    values = credits.detach().to("cpu", torch.float32)
    if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"credits must be [S] with S >= 1 and finite, not of shape {list(values.shape)}")
    if bool(((values == 0) | (values == 1)).all()):
        kind, raw = "bits", np.packbits(values.numpy().astype(np.uint8)).tobytes()
    else:
        kind, raw = "half", values.clamp(-_LARGEST, _LARGEST).numpy().astype("<f2").tobytes()
    return f"{kind}:{len(values)}:{base64.b64encode(raw).decode('ascii')}"


def unpack_credits(packed: str) -> Tensor:
    """The float32 credits [S] of a string that `pack_credits` made. Raises ValueError where it is not one."""
    kind, _, rest = packed.partition(":")
    count, _, text = rest.partition(":")
    try:
        samples, raw = int(count), base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"not packed credits: {packed[:40]!r}") from error
    if kind == "bits" and samples >= 1 and len(raw) == (samples + 7) // 8:
        values = np.unpackbits(np.frombuffer(raw, np.uint8))[:samples].astype(np.float32)
    elif kind == "half" and samples >= 1 and len(raw) == 2 * samples:
        values = np.frombuffer(raw, "<f2").astype(np.float32)
    else:
        raise ValueError(f"not packed credits: {packed[:40]!r}")
    return torch.from_numpy(values)
