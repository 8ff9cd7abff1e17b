"""The fine-tuning presets held to the released scripts: rates, weight decay and drop path of every parameter.

The numbers in fixtures/released_finetune_rates.json were read out of the scripts' own optimiser, 1,000 steps in all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core.model import NEPA
from nepa_core.runtime.config import differences, load_config, save_config
from nepa_core.runtime.fit import plan
from nepa_core.runtime.optim import Duration, make_optimizer, set_rates
from nepa_core.runtime.released import PREFIX, head_name, released_names
from recipes import vision
from recipes.configs import FinetuneConfig
from recipes.networks.goals import numbered
from recipes.training.finetuning import Classifier, build_head
from recipes.training.train import head, height

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "released_finetune_rates.json").read_text())
PRESETS = {"base": vision.base_in1k_finetune, "large": vision.large_in1k_finetune}


def narrow(config: FinetuneConfig) -> FinetuneConfig:
    """The preset with its depth, a width that takes no time, and the length of the golden run."""
    size = {"dim": 8, "heads": 2, "mlp_dim": 16}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=size),
            "train": config.train.model_copy(update={"length": Duration(steps=1000)}),
        }
    )


def network(config: FinetuneConfig) -> Classifier:
    goal = numbered(4)
    backbone = NEPA(config.model, config.data.embedder(config.model.dim))
    backbone.embed.requires_grad_(not config.freeze_embedder)
    return Classifier(backbone, build_head(config, goal), goal)


def their_names(name: str) -> tuple[str, ...]:
    """What the release calls a parameter of a `Classifier`, by the one table of names."""
    kind, _, inner = name.partition(".")
    names = released_names(inner) if kind == "backbone" else (head_name(inner),)
    return tuple(each.removeprefix(PREFIX) for each in names)


def optimizer_of(config: FinetuneConfig) -> tuple[torch.optim.Optimizer, dict[torch.Tensor, tuple[str, ...]]]:
    model = network(config)
    names = {value: their_names(name) for name, value in model.named_parameters() if value.requires_grad}
    return make_optimizer(model, config.optim, height(config), head(config)), names


def key(name: str) -> str:
    """The golden file's key of a parameter: that of its block, else its own name."""
    found = re.match(r"encoder\.layer\.(\d+)\.", name)
    return f"block {found[1]}" if found else name


@pytest.mark.parametrize("size", PRESETS)
def test_every_rate_is_that_of_the_released_scripts(size: str) -> None:
    config = narrow(PRESETS[size]())
    optimizer, names = optimizer_of(config)
    steps = plan(config.train, config.optim, samples=10_000, ranks=1)
    assert steps.total == 1000
    for step, expected in GOLDEN[size]["rates"].items():
        top = set_rates(
            optimizer, config.optim, peak=steps.peak_lr, step=int(step), total=steps.total, warmup=steps.warmup
        )
        found: dict[str, set[float]] = {}
        for group in optimizer.param_groups:
            for value in group["params"]:
                for name in names[value]:
                    found.setdefault(key(name), set()).add(group["lr"])
        assert found.keys() == expected.keys()
        for name, rates in found.items():
            assert list(rates) == pytest.approx([expected[name]], rel=1e-6, abs=0), f"{name} at step {step}"
        assert top == pytest.approx(expected["fc_norm.weight"], rel=1e-6, abs=0), "what metrics.jsonl has as lr"


@pytest.mark.parametrize("size", PRESETS)
def test_exactly_the_released_parameters_decay(size: str) -> None:
    config = narrow(PRESETS[size]())
    optimizer, names = optimizer_of(config)
    found: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        for value in group["params"]:
            starred = {re.sub(r"layer\.\d+", "layer.*", name) for name in names[value]}
            found.setdefault(group["weight_decay"], set()).update(starred)
    assert found == {0.0: set(GOLDEN[size]["weight_decay_0"]), 0.05: set(GOLDEN[size]["weight_decay_0.05"])}


@pytest.mark.parametrize("size", PRESETS)
def test_drop_path_rises_as_in_the_released_networks(size: str) -> None:
    """The golden file has both sizes at 0.1; large trains at 0.2, which its config.json and command line say."""
    config = narrow(PRESETS[size]())
    expected = GOLDEN[size]["drop_path_at_rate_0.1"]
    scale = config.model.drop_path / 0.1
    assert scale == pytest.approx({"base": 1.0, "large": 2.0}[size])
    rates: list[Any] = [block.drop_path for block in network(config).backbone.predictor.blocks]
    assert rates == pytest.approx([scale * rate for rate in expected], abs=scale * 6e-7)


def test_a_run_of_before_opens_and_keeps_its_rates(tmp_path: Path) -> None:
    """Its config.json lacks the new keys: heads at the body's rate, and the numbering that it was trained with."""
    config = vision.base_in1k_finetune()
    save_config(config, tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    for group, key in (("data", "interpolation"), ("data", "squash"), ("optim", "head_lr")):
        del saved[group][key]
    del saved["optim"]["layer_decay"]["head_counts"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = load_config(FinetuneConfig, tmp_path / "config.json")
    changed = differences(again, config)
    assert changed == {"optim.layer_decay.head_counts": (True, False), "optim.head_lr": (None, 1e-3)}
