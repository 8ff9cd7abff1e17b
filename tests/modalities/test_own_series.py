"""A series adapter of a user's own, 40 lines outside the package: every task of a series works on it by its methods."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nepa_core import Modality, UserError
from nepa_core.contract import check_forecasts, check_modality
from nepa_core.runtime.config import load_object
from recipes.cli import main
from recipes.comparison import downstream, engine, measures, orders
from recipes.readout.forecasters import check_windows, form_of, series_digest
from recipes.report.forecast import stretches

SOURCE = (Path(__file__).parents[1] / "fixtures" / "my_series.py").read_text()
TINY = ("model.dim=16", "model.depth=1", "model.heads=2", "model.mlp_dim=16", "train.length.steps=3", "train.batch=8")
FEW = ("verdict.fit_samples=64", "verdict.test_samples=64", "verdict.health_samples=64")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, which holds the module and is the working directory."""
    (tmp_path / "my_series.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_series", raising=False)
    return tmp_path


def tides(**changes: Any) -> Any:
    """The adapter, with other methods."""
    kind = load_object("my_series:Tides")
    return type("Other", (kind,), {"__module__": "my_series", **changes})() if changes else kind()


@pytest.mark.slow
def test_forty_lines_outside_the_package_are_pretrained_probed_and_forecast(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(SOURCE.splitlines()) <= 40
    assert main(["pretrain", "my_series:base", "out=run", *TINY, *FEW]) == 0
    check_modality(tides())
    assert main(["probe", "run", "train_samples=200", "test_samples=64"]) == 0
    assert 0.3 < json.loads(Path("run/probe.json").read_text())["best"]["accuracy"] <= 1
    words = ["forecast", "run", "horizons=4", "finetune=4", "steps=2", "fit_samples=300"]
    assert main(words) == 0
    found = json.loads(Path("run/forecast.json").read_text())
    assert (found["windows"], found["stretches"], found["left_out"]) == ({"4": 748}, {"4": 14}, {"4": 0})
    assert (found["look_back"], found["fitted_on"]) == (48, {"4": 300})
    rows = {row["name"]: row["mse"] for row in found["horizons"]["4"]}
    assert len(rows) == 7
    assert rows["linear on the raw window"] < 0.1 * rows["persistence"]
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().err.count("(kept)") == 7, "finished rows are known again by the windows"
    few = ["samples=19", "test_windows=20", "flow_steps=2", "season=12"]
    assert main(["forecast", "run", "horizons=6", "fit_samples=300", *few]) == 0
    assert "6 steps ahead samples of the pre-trained network " in capsys.readouterr().out


@pytest.mark.parametrize("names", [("reverse",), pytest.param(("raster", "reverse"), marks=pytest.mark.slow)])
@pytest.mark.slow
def test_orders_compares_its_orders(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    monkeypatch.setattr(engine, "share", lambda jobs, *, workers: engine.work_through(jobs))
    monkeypatch.setattr(orders, "share", engine.share)
    monkeypatch.setattr(measures, "PROBE", measures.PROBE.model_copy(update={"train_samples": 200, "test_samples": 64}))
    words = [f"orders={','.join(names)}", "seeds=0", "labels=2", "finetune_steps=2", "out=compared"]
    assert main(["orders", "my_series:base", *words, *TINY, *FEW]) == 0
    summary = json.loads(Path("compared/summary.json").read_text())
    assert set(summary["orders"]) == set(names)
    assert summary["metric"] == "accuracy", "samples have a label, which is probed"


def test_without_a_label_it_is_forecast_in_comparisons(elsewhere: Path) -> None:
    config = load_object("my_series:base")()
    assert not downstream.is_forecast(config)
    Path("my_waves.py").write_text(SOURCE.replace('"label"', '"season"'))
    config = load_object("my_waves:base")()
    assert downstream.is_forecast(config)
    downstream.check(config, 8)
    with pytest.raises(UserError, match="Tides: forecasts"):
        downstream.check(config, 5000)


def test_windows_that_say_nothing_begin_one_step_apart(elsewhere: Path) -> None:
    data = tides()
    windows = data.forecasts("test", 4)
    assert torch.equal(stretches(list(windows)), stretches(windows))  # type: ignore[arg-type]
    assert form_of(data, 4) == (48, 2, 12)
    digest = series_digest(check_windows(data, 4))
    assert digest == series_digest(check_windows(tides(), 4))
    windows[3]["future"][0] += 1
    assert digest != series_digest(check_windows(data, 4) | {"test": windows})


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"series": torch.zeros(48, 2)}, "has no 'future': add it, float32"),
        ({"series": torch.zeros(48, 2), "future": torch.zeros(4)}, r"is torch.float32 \[4\]: make it float32"),
        ({"series": torch.zeros(48, 2), "future": torch.zeros(4, 2).double()}, r"is torch.float64 \[4, 2\]: make"),
        ({"series": torch.zeros(48, 2), "future": torch.full((4, 2), torch.nan)}, "holds NaN or infinity"),
        ({"series": torch.zeros(48, 2), "future": torch.zeros(3, 2)}, r"has shape \[3, 2\]: make it \[4, 2\]"),
    ],
)
def test_windows_of_another_form_are_one_line(elsewhere: Path, sample: dict[str, Any], said: str) -> None:
    data = tides(forecasts=lambda self, split, horizon: [sample] * 9)
    with pytest.raises(AssertionError, match=said):
        check_forecasts(data, "train", 4)
    with pytest.raises(UserError, match=said):
        check_windows(data, 4)


def test_what_an_adapter_does_not_offer_names_the_method_to_write() -> None:
    from tests.tiny import Waves

    data = Waves()
    for method, call in {
        "forecasts(split, horizon)": lambda: data.forecasts("train", 4),
        "files(paths)": lambda: data.files(["a.png"]),
        "stored(split)": lambda: data.stored("train"),
        "image_input()": data.image_input,
    }.items():
        name = method.partition("(")[0]
        assert not data.offers(name)
        assert hasattr(Modality, name)
        with pytest.raises(UserError, match="Waves has no") as found:
            call()
        assert method in str(found.value)
