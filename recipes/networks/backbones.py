"""Other networks, to stand beside ours: models of timm, and a user's function from a batch to features.

`timm:NAME` has timm's weights for that name, from the local cache or the hub; `timm:NAME@FILE.safetensors` those of a
file. No other kind of file is read: a pickle may hold code.

Shapes: B samples, N tokens, C x H x W pixels, D width of a feature.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from modalities.data.hub import ANSWER, offline, one_line
from nepa_core.basics import Batch, UserError, call
from nepa_core.runtime.config import load_object
from nepa_core.runtime.data import fold_seed
from nepa_core.runtime.released import mismatch
from nepa_core.tokens import LARGEST_VALUE, Tokens
from recipes.networks.goals import Goal

TIMM = "timm:"


def check_beside(beside: Sequence[str], *, pretrained: bool) -> None:
    """The options `beside=` and `pretrained=`.

    Raises:
        ValueError: a network has no name, or none would have random weights by `pretrained=false`.
    """
    if any(name.partition("@")[0] in ("", TIMM) for name in beside):
        raise ValueError("name each network: timm:NAME, timm:NAME@FILE.safetensors or module:function")
    if not pretrained and not any(name.startswith(TIMM) and "@" not in name for name in beside):
        raise ValueError("pretrained=false is for beside=timm:NAME: name one without @FILE, or leave it out")


VIEW = "seen by "
"""What the keys of a sample begin with that hold a backbone's own view of it."""
HIDDEN = ("label", "target")
"""Keys of a batch that a function does not get: what it is to be probed for."""
_AT_ONCE = 64  # images in a forward pass, all of whose layers are kept

View = Callable[[Dataset[Batch], int, Batch], Tensor]
"""(data set, index, the sample there) -> what a backbone reads of it."""


class Backbone(NamedTuple):
    """A network that stands beside ours.

    Attributes:
        name: in the table and the verdict.
        about: what it is, and how it reads its samples.
        key: what its features depend on beside the data and the weights of `model`; plain values.
        model: None of a function.
        view: what it reads of a sample, under the key `VIEW` + `name` of a batch; None: the batch as it is.
        rows: batch -> name of a row -> features, [B, D] float32; of a function [B, N, D] where tokens have classes.
    """

    name: str
    about: str
    key: dict[str, Any]
    model: nn.Module | None
    view: View | None
    rows: Callable[[Batch], dict[str, Tensor]]


class Viewed(Dataset[Batch]):
    """The same samples with the views of backbones, under their keys."""

    def __init__(self, dataset: Dataset[Batch], views: Mapping[str, View]) -> None:
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> Batch:
        sample = self.dataset[index]
        return sample | {key: view(self.dataset, index, sample) for key, view in self.views.items()}

    def name(self, index: int) -> str:
        """What a message calls that sample."""
        name = getattr(self.dataset, "name", None)
        return f"sample {index}" if name is None else str(name(index))


# ------------------------------------------------------------------------------------------------------ of a user


def function_backbone(path: str) -> Backbone:
    """`module:function` from a batch, without its labels, to features [B, D] or a dictionary of several such rows.

    The batch is on the device, and gradients are off. Features may depend on nothing but their own sample.

    Raises:
        UserError: there is no such function; or, from `rows`, it fails or gives something else.
    """
    function = load_object(path)
    if not callable(function):
        raise UserError(f"beside={path} is no function: make it one from a batch to features [B, D]")

    def rows(batch: Batch) -> dict[str, Tensor]:
        shown = {key: x for key, x in batch.items() if key not in HIDDEN and not key.startswith(VIEW)}
        found = call(f"beside={path} called with a batch", function, shown)
        named = found if isinstance(found, dict) else {"features": found}
        for name, x in named.items():
            if not re.fullmatch(r"(?!labels$|sample$|mask$)[\w.-]+", str(name)):
                raise UserError(f"beside={path}: {name!r} can't name a row; take letters, digits, '_', '-' and '.'")
            if not isinstance(x, Tensor):
                raise UserError(f"beside={path} gives {type(x).__name__} for a batch; return a tensor [B, D]")
            if x.is_complex():
                raise UserError(f"beside={path} gives complex numbers; return real ones, such as both parts")
        return {name: x.detach().float() for name, x in named.items()}

    file = getattr(sys.modules[function.__module__], "__file__", None) if hasattr(function, "__module__") else None
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Backbone(path, "your function of the batch", {"function": path, "source": source}, None, None, rows)


def check_rows(
    name: str, rows: Mapping[str, Tensor], wanted: Sequence[int], names: Sequence[str] | None = None
) -> None:
    """Whether features are one vector for each of what has a class.

    Args:
        wanted: [B], or [B, N] where tokens have the classes.
        names: the rows of the batches before.

    Raises:
        UserError: they are not, or distances between them would not be finite.
    """
    if not rows or (names is not None and list(rows) != list(names)):
        raise UserError(f"beside={name} gives the rows {list(rows)} for a batch, and {names or 'some'} are wanted")
    for row, x in rows.items():
        if tuple(x.shape[:-1]) != tuple(wanted) or not x.shape[-1:].numel():
            form = f"[{', '.join(map(str, wanted))}, D]"
            raise UserError(
                f"beside={name}: {row} has shape {list(x.shape)} for a batch of {wanted[0]}; make it {form}"
            )
        if not (x.abs() <= LARGEST_VALUE).all():
            raise UserError(f"beside={name}: {row} holds NaN, infinity or numbers above {LARGEST_VALUE:.0e}; scale it")


# -------------------------------------------------------------------------------------------------------- of timm


class Pixels(NamedTuple):
    """What a timm model wants of an image, by its data config.

    Attributes:
        size: (height, width). mean, std: of each channel, pixels being between 0 and 1.
        interpolation: to bring it to that size. crop_ratio: share of the scaled image that the centre crop keeps.
        squash: scale it to a square whatever its own shape.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_ratio: float
    squash: bool

    def standardised(self, images: Tensor) -> Tensor:
        """Pixels of 0 to 255, [B, C, H, W], as the model reads them: [B, 3, H, W] float32."""
        mean, std = (images.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std))
        return (images.expand(-1, 3, -1, -1) / 255 - mean) / std


def pixels_of(model: nn.Module) -> Pixels:
    """By timm's `resolve_model_data_config`."""
    from timm.data.config import resolve_model_data_config

    found = resolve_model_data_config(model)
    height, width = found["input_size"][1:]
    squash = found["crop_mode"] == "squash"
    return Pixels((height, width), found["mean"], found["std"], found["interpolation"], found["crop_pct"], squash)


def timm_backbone(
    asked: str,
    samples: Dataset[Batch],
    first: Batch,
    *,
    pretrained: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Backbone:
    """A model of timm, which reads the stored images as its own data config says.

    Its rows are the mean over the places of each of its layers and of its final norm, the CLS token of each where it
    has one, and the pooled features that its own classifier would read ("head input").

    Args:
        samples, first: of the data, and a batch of them.
        pretrained: False keeps random weights, by the seed, where no file is named.
        dtype: of autocast; None for float32 throughout.

    Raises:
        UserError: there is no such model, its weights can't be had, or samples are no images.
    """
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model = timm_model(asked, pretrained=pretrained, seed=seed).to(device).eval()
    pixels = pixels_of(model)
    transform = create_transform(**resolve_model_data_config(model), is_training=False, normalize=False)
    image = first.get("image")
    if image is None or image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] not in (1, 3):
        raise UserError(
            f"beside={asked} reads images, and samples here have no 'image' of uint8 [C, H, W] with C 1 or 3; give a "
            "function of your own by beside=module:function"
        )
    name = shown_name(asked, pretrained=pretrained)
    key = f"{VIEW}{name}"

    def rows(batch: Batch) -> dict[str, Tensor]:
        parts = []
        for images in batch[key].split(_AT_ONCE):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                parts.append(timm_rows(model, pixels.standardised(images)))
        return {row: torch.cat([part[row] for part in parts]) for row in parts[0]}

    (height, width), (rows_, columns) = pixels.size, image.shape[-2:]
    source = "the stored images" if hasattr(samples, STORED) else f"the {rows_} x {columns} pixels of ours"
    grey = ", grey repeated in three channels" if image.shape[1] == 1 else ""
    about = (
        f"{sum(x.numel() for x in model.parameters()):,} parameters; {height} x {width} pixels from {source}, "
        f"{pixels.interpolation}, crop {pixels.crop_ratio:g}, own mean and std{grey}"
    )
    facts = {"timm": asked.partition("@")[0], "pixels": pixels._asdict(), "dtype": str(dtype or torch.float32)}
    return Backbone(name, about, facts, model, partial(_view, transform), rows)


def _view(transform: Callable[[Any], Tensor], dataset: Dataset[Batch], index: int, sample: Batch) -> Tensor:
    """An image, uint8 [3, H, W], as a timm model's transform makes it."""
    from torchvision.transforms.v2.functional import to_pil_image

    stored = getattr(dataset, STORED, None)
    image: Tensor = sample["image"] if stored is None else stored(index)
    return transform(to_pil_image(image.expand(3, -1, -1)))


STORED = "decoded"
"""The method of a data set that gives an image as it is stored, uint8 [C, h, w]."""


def timm_rows(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The rows that `timm_backbone` names, of standardised images [B, 3, H, W]: [B, D] float32 each."""
    layers_of: Any = getattr(model, "forward_intermediates", None)
    found: dict[str, Tensor] = {}
    if layers_of is None:
        final = model.forward_features(images)  # type: ignore[operator]
    else:
        prefixes = "return_prefix_tokens" in inspect.signature(layers_of).parameters
        final, layers = layers_of(images, **({"return_prefix_tokens": True} if prefixes else {}))
        cls = getattr(model, "cls_token", None) is not None
        for number, layer in enumerate(layers, 1):
            grid, prefix = layer if isinstance(layer, tuple) else (layer, None)
            found[f"layer {number}, mean"] = grid.float().mean((2, 3))
            if prefix is not None and cls:
                found[f"layer {number}, CLS"] = prefix[:, 0].float()
        if prefixes and prefix is not None and final.ndim == 3:
            found["final norm, mean"] = final[:, prefix.shape[1] :].float().mean(1)
            found |= {"final norm, CLS": final[:, 0].float()} if cls else {}
    found["head input"] = model.forward_head(final, pre_logits=True).float()  # type: ignore[operator]
    return found


def shown_name(asked: str, *, pretrained: bool) -> str:
    """What tables and verdicts call a timm model."""
    return asked if pretrained or "@" in asked else f"{asked} with random weights"


class TimmClassifier(nn.Module):
    """A timm model with a new classifier, which starts at zero as those on our networks do.

    Args:
        backbone: as `timm_model` gives it. size: (height, width) of its images.
    """

    predictor = None

    def __init__(self, backbone: nn.Module, size: tuple[int, int], goal: Goal) -> None:
        super().__init__()
        backbone.reset_classifier(goal.outputs)  # type: ignore[operator]
        for module in self._heads(backbone):
            for value in module.parameters():
                nn.init.zeros_(value)
        self.backbone, self.size, self.goal = backbone, size, goal

    @staticmethod
    def _heads(backbone: nn.Module) -> list[nn.Module]:
        found = backbone.get_classifier()  # type: ignore[operator]
        return list(found) if isinstance(found, tuple) else [found]

    def forward(self, tokens: Tokens, *, causal: bool, coord_scale: float = 1.0) -> Tensor:
        """Logits [B, C] of images, one token each; the other arguments are those of `Classifier`, without effect."""
        logits: Tensor = self.backbone(tokens.values.unflatten(-1, (-1, *self.size))[:, 0].expand(-1, 3, -1, -1))
        return logits

    def heights(self, *, head_counts: bool) -> dict[str, int]:
        """Parameter -> layers above it, as timm groups them for layer decay; empty where it does not."""
        from timm.models import group_parameters

        matcher: Any = getattr(self.backbone, "group_matcher", None)
        layers = {} if matcher is None else group_parameters(self.backbone, matcher(coarse=False), reverse=True)
        top = max(layers.values(), default=0) - (not head_counts)
        return {f"backbone.{name}": max(top - layer, 0) for name, layer in layers.items()}

    def head_names(self) -> set[str]:
        """The parameters of the classifier."""
        heads = {id(value) for module in self._heads(self.backbone) for value in module.parameters()}
        return {name for name, value in self.named_parameters() if id(value) in heads}


def timm_model(asked: str, *, pretrained: bool, seed: int) -> nn.Module:
    """The model of `timm:NAME` or `timm:NAME@FILE`, without a classifier; nothing is drawn from the global generators.

    Args:
        pretrained: False keeps the random weights of the seed where no file is named.

    Raises:
        UserError: timm has no such model, or its weights can't be had.
    """
    import timm

    name, _, file = asked.removeprefix(TIMM).partition("@")
    known = {*timm.list_models(), *timm.list_pretrained()}
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise UserError(f"beside={asked}: timm {timm.__version__} has no model {name}; the nearest: {near}")
    if pretrained and not file and not timm.models.is_model_pretrained(name):
        raise UserError(
            f"beside={asked}: timm has no weights for it; name those of a file by timm:{name}@FILE.safetensors, or "
            "give pretrained=false"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, "weights"))
        if pretrained and not file:
            return _with_weights(name, asked)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    if file:
        _load(model, Path(file), asked)
    return model


def _with_weights(name: str, asked: str) -> nn.Module:
    """With those that are cached; else the hub is asked once whether it is there, for its client tries for long."""
    import huggingface_hub
    import timm

    hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    try:
        try:
            with offline():
                return timm.create_model(name, pretrained=True, num_classes=0)
        except Exception:  # the clients of the hub raise a dozen kinds
            if hub:
                huggingface_hub.HfApi().model_info(hub, timeout=ANSWER)
            return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise UserError(
            f"beside={asked}: its weights are neither in the cache nor to be had ({one_line(error)}); fetch "
            f"model.safetensors of {hub} and give it by timm:{name}@FILE.safetensors, or give pretrained=false"
        ) from error


def _load(model: nn.Module, file: Path, asked: str) -> None:
    """Load a state dict as timm saves it; a classifier in it is left out."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        raise UserError(f"beside={asked}: weights are read from .safetensors alone; save the state dict as such")
    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"beside={asked}: {file} can't be read ({one_line(error)}); give a .safetensors file"
        ) from error
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{each}." for each in ([named] if isinstance(named, str) else named))
    expected = {name: x.shape for name, x in model.state_dict().items()}
    given = {name: x for name, x in given.items() if name in expected or not name.startswith(heads)}
    if complaint := mismatch(expected, given):
        raise UserError(f"beside={asked}: {file} is of another model: {complaint}")
    model.load_state_dict(given)
