"""Maps against slow formulas written out, and the command on runs of every kind."""

from __future__ import annotations

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from modalities.data.images import open_images
from nepa_core.basics import Batch, UserError
from nepa_core.modality import Modality
from nepa_core.model import NEPA
from nepa_core.predictor import PredictorConfig, Trace
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.data import plain_batches
from nepa_core.runtime.weights import read_weights
from nepa_core.tokens import Sketch, Tokens
from recipes.cli import main
from recipes.configs import PretrainConfig, SegmentConfig
from recipes.readout.inspecting import InspectOptions as Options
from recipes.readout.inspecting import chosen_samples, inspect, load_network, worst_predicted
from recipes.report.inspect import report
from recipes.report.plots import Panel, inside, line_plot, panel_plot
from recipes.report.plots import spread_out as spread
from recipes.report.segment import palette
from recipes.statistics.maps import (
    attention_figures,
    chosen_attention,
    grid_positions,
    next_rank,
    next_similarity,
    pca_colours,
    uniform_attention,
)
from recipes.tasks.inspect import read_config
from recipes.training.segmentation import load_segmenter, predict_image
from tests import tiny
from tests.modalities.test_image import adapter, encoded, picture
from tests.modalities.test_timeseries import adapter as series_adapter
from tests.modalities.test_timeseries import walk, write_csv
from tests.tiny import CPU, Waves
from tests.tiny_scenes import scene, write_scenes

pytestmark = pytest.mark.pictures

RAGGED = torch.tensor([[True] * 5, [True, True, True, False, False]])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _weights(samples: int, heads: int, places: int) -> Tensor:
    return (3 * _random(samples, heads, places, places)).softmax(-1)


# ----------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("bos", [0, 1])
@pytest.mark.parametrize("mask", [None, RAGGED], ids=["whole", "masked"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_attention_figures_are_what_their_names_say(bos: int, mask: Tensor | None, per_sample: bool) -> None:
    weights, positions = _weights(2, 3, 5 + bos), _random(2, 5, 2) if per_sample else _random(5, 2)
    found = attention_figures(weights, positions, mask)
    for b in range(2):
        at = positions[b] if per_sample else positions
        real = [i for i in range(5) if mask is None or mask[b, i]]
        for h in range(3):
            row = [[float(weights[b, h, bos + i, j]) for j in range(5 + bos)] for i in range(5)]
            far = [
                sum(row[i][bos + j] * math.dist(at[i].tolist(), at[j].tolist()) for j in range(5)) / sum(row[i][bos:])
                for i in real
            ]
            entropy = [-sum(w * math.log(w) for w in row[i]) for i in real]
            on_bos = [sum(row[i][:bos]) for i in real]
            for values, slow in zip(found, (far, entropy, on_bos), strict=True):
                assert float(values[b, h]) == pytest.approx(sum(slow) / len(real), abs=1e-5)


def test_attention_on_one_token_only_has_its_distance_and_no_entropy() -> None:
    weights = torch.zeros(1, 1, 7, 7)
    weights[..., 1] = 1.0  # BOS first: all look at the first token of a grid of 2 x 3
    figures = attention_figures(weights, grid_positions((2, 3)))
    assert float(figures.distance) == pytest.approx((0 + 1 + 2 + 1 + 2**0.5 + 5**0.5) / 6)
    assert float(figures.entropy) == float(figures.on_bos) == 0


def test_uniform_attention_is_equal_over_what_may_be_seen() -> None:
    found = uniform_attention(torch.tensor([[True, False, True]]), causal=True)[0, 0]
    assert torch.allclose(found, torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]]))
    found = uniform_attention(torch.ones(1, 4, dtype=torch.bool), causal=False)
    assert torch.equal(found, torch.full((1, 1, 4, 4), 0.25))


def test_layers_and_heads_are_counted_from_one() -> None:
    attention = [_weights(1, 2, 3), _weights(1, 2, 3).flip(-1)]
    assert torch.equal(chosen_attention(attention, layer=2, head=1), attention[1][:, 0])
    assert torch.allclose(chosen_attention(attention, layer=1), attention[0].mean(1))
    assert torch.allclose(chosen_attention(attention, head=2), (attention[0][:, 1] + attention[1][:, 1]) / 2)
    assert torch.allclose(chosen_attention(attention), (attention[0] + attention[1]).mean(1) / 2)


@pytest.mark.parametrize("bos", [0, 1])
@pytest.mark.parametrize("mask", [None, RAGGED], ids=["whole", "masked"])
def test_the_next_token_is_ranked_among_the_real_tokens_of_its_sample(bos: int, mask: Tensor | None) -> None:
    places = 5 + bos
    predictions, embeddings = _random(2, places, 4), _random(2, places, 4, seed=1)
    embeddings[:, bos + 1] = 2 * embeddings[:, bos]  # tokens 0 and 1 point one way
    similarity = next_similarity(predictions, embeddings, bos=bool(bos))
    ranks = next_rank(similarity, mask)
    assert ranks.shape == (2, places - 1)
    for b in range(2):
        real = [i for i in range(5) if mask is None or mask[b, i]]
        for place in range(places - 1):
            cosine = [
                float(torch.cosine_similarity(predictions[b, place], embeddings[b, bos + i], 0)) for i in range(5)
            ]
            assert similarity[b, place].tolist() == pytest.approx(cosine, abs=1e-6)
            target = place + 1 - bos
            if target not in real or place - bos not in [-1, *real]:
                assert ranks[b, place].isnan()
                continue
            tied = [i for i in real if abs(cosine[i] - cosine[target]) < 1e-5]
            better = [i for i in real if cosine[i] > cosine[target] and i not in tied]
            assert float(ranks[b, place]) == len(better) + (len(tied) + 1) / 2


def test_the_first_component_is_red_and_rises_with_its_largest_weight() -> None:
    rows = _random(200, 6) * torch.tensor([1.0, 9.0, 0.1, 3.0, 0.1, 0.1]) + 5
    colours = pca_colours(rows)
    assert colours.shape == (200, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    for colour, column in enumerate((1, 3, 0)):
        assert torch.corrcoef(torch.stack((colours[:, colour], rows[:, column])))[0, 1] > 0.97
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(pca_colours(rows[shuffled]), colours[shuffled], atol=1e-5)


def test_components_without_variance_are_grey() -> None:
    line = torch.linspace(0, 1, 50)[:, None] * torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert (pca_colours(line)[:, 1:] == 0.5).all()
    assert pca_colours(line)[:, 0].diff().min() >= 0
    assert (pca_colours(torch.ones(4, 8)) == 0.5).all()
    assert pca_colours(_random(9, 2))[:, 2].eq(0.5).all()


# -------------------------------------------------------------------------------------------------- sketches


@pytest.mark.parametrize("patch_order", ["raster", "hilbert", "random"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_drawn_as_it_is_whatever_the_order(channels: Any, patch_order: str) -> None:
    data = adapter(channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels, patch_order=patch_order)
    image = torch.stack([data.dataset("test")[i]["image"] for i in range(3)])
    sketch = data.describe(data.read({"image": image}))
    expected = image[:, 0] if channels == 1 else image.permute(0, 2, 3, 1)
    assert torch.allclose(sketch.canvas, expected / 255, atol=1e-5)
    assert sketch.grid == (2, 4)


def test_any_tokens_are_drawn_side_by_side_in_canonical_order_without_their_padding() -> None:
    values = _random(2, 5, 3)
    values[1, 3:] = 1000.0
    tokens = Tokens(values, torch.arange(5.0)[:, None], RAGGED)
    sketch = Waves().describe(tokens)
    assert sketch.grid == (1, 5)
    assert sketch.canvas.shape == (2, 3, 5)
    assert (sketch.canvas[1, :, 3:] == 0).all()
    for row, real in zip(sketch.canvas, (values[0], values[1, :3]), strict=True):
        shown = row[:, : len(real)].T
        assert torch.allclose(shown, (real - real.min()) / (real.max() - real.min()), atol=1e-6)
    order = torch.stack([torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 2, 0, 4, 3])])
    assert torch.equal(Waves().describe(tokens.reordered(order)).canvas, sketch.canvas)


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def _green(pixels: np.ndarray) -> np.ndarray:
    return (pixels == (0, 255, 0)).all(-1)


@pytest.mark.parametrize("token", [0, 5])
def test_what_belongs_to_a_token_is_drawn_in_its_cell(token: int) -> None:
    sketch = Sketch(torch.zeros(1, 20, 30), grid=(2, 3))
    colours = torch.full((6, 3), torch.nan)
    colours[token] = torch.tensor([0.0, 1.0, 0.0])
    (y, x) = _green(_pixels(panel_plot([("a", [Panel("", sketch, colours=colours)])], across=1))).nonzero()
    (_, _, high, wide) = (y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1)
    assert len(y) > 0.95 * high * wide  # a full rectangle, 990 pixels to three columns
    assert wide == pytest.approx(990 / 3, rel=0.05)
    assert (x.mean() < 330) == (token == 0)


def test_a_canvas_that_is_drawn_smaller_keeps_its_thin_strokes() -> None:
    """Lines of one pixel in twenty: every pixel of the picture is a little darker, none is a line alone."""
    canvas = torch.ones(1, 900, 3000)
    canvas[..., ::20] = 0
    pixels = _pixels(panel_plot([("", [Panel("", Sketch(canvas, grid=(1, 1)))])], across=4))
    row = pixels[pixels.shape[0] // 2].mean(-1)
    inside = row[10 : len(row) // 2]
    assert inside.min() > 200
    assert inside.max() < 255


@pytest.mark.parametrize("grid", [(1, 4), (2, 4)])
def test_curves_with_gaps_and_maps_over_them_are_drawn(grid: tuple[int, int]) -> None:
    curves = _random(1, 12, 2)
    curves[0, 3:5] = torch.nan
    sketch, count = Sketch(curves, grid, curves=True), grid[0] * grid[1]
    plain = _pixels(panel_plot([("", [Panel("", sketch)])], across=2))
    mapped = _pixels(
        panel_plot([("", [Panel("", sketch, heat=torch.arange(float(count)), marks={"red": 1})])], across=2)
    )
    blue = (31, 119, 180)  # the first curve, under a map as without one
    assert (plain == blue).all(-1).any()
    assert (mapped == blue).all(-1).any()
    assert (mapped == (255, 0, 0)).all(-1).any()


@pytest.mark.parametrize("values", [[55.0, 20.0], [0.76, 0.74], [0.0, 0.0], []])
def test_lines_that_start_at_zero_do_not_touch_the_frame(values: list[float]) -> None:
    pixels = _pixels(line_plot({"a": (list(range(len(values))), values)}, x="x", y="y", from_zero=True))
    plot = pixels[:, : pixels.shape[1] * 3 // 4]  # without the legend
    rows = (abs(plot - (31, 119, 180)).sum(-1) < 30).any(1).nonzero()[0]
    top = ((plot.sum(-1) < 60).sum(1) > 200).nonzero()[0].min()
    if any(values):
        assert rows.min() > top + 15


def test_a_path_is_drawn_where_its_tokens_lie() -> None:
    """Four corners that are drawn in one row: the line goes round, not along the row."""
    sketch = Sketch(torch.ones(1, 4, 4), grid=(1, 4))
    corners = torch.tensor([[0.0, 0.0], [0.0, 9.0], [9.0, 9.0], [9.0, 0.0]])
    flat, round_ = (
        _pixels(panel_plot([("", [Panel("", sketch, path=torch.arange(4), at=at)])], across=4))
        for at in (None, corners)
    )
    padded, far = Sketch(torch.ones(1, 4, 5), grid=(1, 5)), torch.cat((corners, torch.full((1, 2), 900.0)))
    short = _pixels(panel_plot([("", [Panel("", padded, path=torch.arange(4), at=far)])], across=4))
    for pixels, least, most in ((flat, 0, 20), (round_, 100, 400), (short, 100, 400)):
        drawn = (abs(pixels - (255, 127, 14)).sum(-1) < 60).any(1).nonzero()[0]
        assert least < np.ptp(drawn) < most


def test_a_line_ends_where_there_are_no_more_values() -> None:
    short, whole, padded = (
        line_plot({"a": (list(range(len(values))), values)}, x="x", y="y", markers=True)
        for values in ([-0.5, None, -0.7], [-0.5, -0.6, -0.7], [-0.5, None, -0.7, None, None])
    )
    assert short == padded != whole


@pytest.mark.parametrize("markers", [False, True])
def test_a_line_of_one_point_is_seen(markers: bool) -> None:
    pixels = _pixels(line_plot({"a": ([200], [1.5])}, x="x", y="y", markers=markers))
    plot = pixels[:, : pixels.shape[1] * 3 // 4]  # without the legend
    assert (abs(plot - (31, 119, 180)).sum(-1) < 30).sum() > 9


@pytest.mark.parametrize(
    ("mean", "half", "metric", "arms"),
    [
        (0.9, 0.2, "accuracy", [0.2, 0.1]),
        (0.05, 0.2, "accuracy", [0.05, 0.2]),
        (0.9, 0.2, "r2", [0.2, 0.1]),
        (-0.3, 0.2, "skill", [0.2, 0.2]),
    ],
)
def test_error_bars_end_where_the_metric_does(mean: float, half: float, metric: str, arms: list[float]) -> None:
    found = inside(mean, half, metric)
    assert found is not None
    assert [arm for (arm,) in found] == pytest.approx(arms)
    assert inside(mean, None, metric) is None


# --------------------------------------------------------------------------------------------------- reading


class Backwards(Waves):
    """Predicted from the last token to the first; padding, where there is any, comes last."""

    def order(self, tokens: Tokens) -> Tensor:
        real = torch.ones_like(tokens.values[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask
        return torch.where(real, -torch.arange(real.shape[1]), 1).argsort(dim=1, stable=True)


class Pair(Waves):
    """Tokens on two rows."""

    def describe(self, tokens: Tokens) -> Sketch:
        return replace(super().describe(tokens), grid=(2, self.tokens // 2))


def backwards() -> PretrainConfig:
    recipe = tiny.recipe()
    return recipe.model_copy(update={"data": Backwards(ragged=True)})


def _network(data: Modality, **changes: Any) -> NEPA:
    torch.manual_seed(0)
    config = tiny.recipe().model.model_copy(update={"attention": "eager", **changes})
    model = NEPA(PredictorConfig.model_validate(config.model_dump()), data.embedder(config.dim)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bos", [True, False])
@torch.no_grad()
def test_maps_are_canonical_and_the_target_is_the_next_in_the_order_of_prediction(bos: bool, ragged: bool) -> None:
    data = Backwards(ragged=ragged)
    model = _network(data, bos=bos)
    options = Options(samples=48, query=None if ragged else (2,), layer=2, head=1)
    readings = inspect(model, data, options, causal=True)
    for reading, batch in zip(readings, plain_batches(data.dataset("test"), batch=1, device=CPU), strict=True):
        tokens, trace = data.read(batch), Trace()
        out = model(tokens, causal=True, trace=trace)
        count = int(batch["length"])
        place = {token: count - 1 - token + bos for token in range(count)}  # of every token, written out
        assert reading.query == (count // 2 if ragged else 2)
        query = place[reading.query]
        assert reading.real.tolist() == [token < count for token in range(6)]
        assert reading.next == (reading.query - 1 if reading.query else None)
        for token in range(6):
            seen = token in place and token >= reading.query
            assert reading.attention[token].isnan() == (not seen)
            if seen:
                expected = trace.attention[1][0, 0, query, place[token]]
                assert float(reading.attention[token]) == pytest.approx(float(expected), abs=1e-6)
            if token in place:
                cosine = torch.cosine_similarity(out.predictions[0, query], out.embeddings[0, place[token]], 0)
                assert float(reading.similarity[token]) == pytest.approx(float(cosine), abs=1e-6)
                for hidden, traced in zip(reading.hidden, trace.hidden, strict=True):
                    assert torch.equal(hidden[token], traced[0, place[token]])
        total = float(reading.attention.nansum()) + reading.on_bos
        assert total == pytest.approx(1, abs=1e-5)
        if reading.next is not None:
            real = reading.similarity[reading.real]
            assert reading.rank == 1 + int((real > reading.similarity[reading.next] + 1e-6).sum())
        assert len(reading.ranks) == count - 1 + bos
    assert len({int(reading.real.sum()) for reading in readings}) > (2 if ragged else 0)


def test_the_order_is_drawn_through_the_real_tokens_of_each_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, drawn = Backwards(ragged=True), []
    readings = inspect(_network(data), data, Options(samples=8), causal=True)
    monkeypatch.setattr(
        "recipes.report.inspect.panel_plot", lambda rows, **_: drawn.append([each for _, row in rows for each in row])
    )
    page = report(tmp_path, readings, data, None, None, causal=True, silent="", pictures=(), classes=())
    *_, order = (drawn[-1] for part in page.parts() if getattr(part, "name", "") == "order.png")
    lengths = [int(reading.real.sum()) for reading in readings]
    assert min(lengths) < 6
    assert [panel.path.tolist() for panel in order] == [[*range(n)][::-1] for n in dict.fromkeys(lengths)]


def test_distances_are_in_units_of_the_grid() -> None:
    """A row down is one unit, not half the sequence."""
    data, flat = Pair(), Waves()
    near, far = (inspect(_network(flat), each, Options(samples=2), causal=False) for each in (data, flat))
    apart = attention_figures(torch.full((1, 1, 6, 6), 1 / 6), grid_positions((2, 3))).distance
    for reading in near:
        assert float(reading.layers[-1].distance) == pytest.approx(float(apart))
    assert float(far[0].layers[-1].distance) == pytest.approx(35 / 18)  # of six tokens in a line


class Odd(Waves):
    """Every other token of one held-out sample points the other way."""

    def dataset(self, split: str) -> Dataset[Batch]:
        series = super().dataset(split)
        assert isinstance(series, tiny.Series)
        series.values = series.values.clone()
        series.values[8, 1::2] *= -1
        return series


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.slow
def test_the_sample_that_was_made_odd_is_the_worst_predicted(tmp_path: Path, bos: bool) -> None:
    changes = {"train.length.steps": 120, "model.bos": bos, "train.ema": None, "data.samples": 400}
    config = override(tiny.recipe(), changes)
    model, _, _ = tiny.training(config, tmp_path / "run", evaluate=lambda _: {})
    found = worst_predicted(model.eval(), Odd(ragged=False), Options(worst=2))
    assert (found.searched, len(found.samples), len(found.tokens)) == (48, 2, 2)
    assert found.samples[0].name.startswith("test 8,")
    with torch.no_grad():
        tokens = Odd().read(default_collate([Odd().dataset("test")[i] for i in range(48)]))
        out = model(tokens, causal=True)
    slow = torch.full((48, 6), torch.nan)
    for token in range(1 - bos, 6):
        target = out.embeddings[:, token + bos]
        slow[:, token] = -torch.cosine_similarity(out.predictions[:, token + bos - 1], target, -1)
    assert found.mean == pytest.approx(float(slow.nanmean()), abs=1e-5)
    by_sample, by_token = slow.nanmean(1), slow[:, 1:].amax(1)
    for each, scores in ((found.samples, by_sample), (found.tokens, by_token)):
        numbers = scores.argsort(descending=True)[:2].tolist()
        assert [failure.name.split(",")[0] for failure in each] == [f"test {number}" for number in numbers]
        for failure, number in zip(each, numbers, strict=True):
            assert torch.allclose(failure.losses, slow[number], atol=1e-5, equal_nan=True)
            assert failure.token == int(slow[number, 1:].argmax()) + 1, "the first token is as hard in any sample"


def test_losses_stand_at_their_tokens_in_any_order_and_windows_of_one_stretch_are_one_case(tmp_path: Path) -> None:
    data = Backwards(ragged=True)
    found = worst_predicted(_network(data), data, Options(worst=48))
    assert len(found.samples) == 48
    for each in found.samples:
        length = int((~each.losses.isnan()).sum())
        assert not each.losses[:length].isnan().any()
        assert each.token < length - 1, "the last token is the first that is predicted"
    series = series_adapter(write_csv(tmp_path, walk()))
    found = worst_predicted(_network(series), series, Options(worst=48))
    assert found.searched == 29
    assert len(found.samples) == len(series.dataset("test").spans().cluster.unique()) < 29  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: of whole sequences, of ragged ones backwards, of images, and a fine-tuned one."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["pretrain", "tests.tiny:recipe", f"out={folder / 'recipe'}"]) == 0
    for config in (backwards(), images()):
        tiny.training(config, folder / type(config.data).__name__.lower(), evaluate=lambda _: {})
    assert main(["finetune", str(folder / "recipe"), f"out={folder / 'tuned'}", "train.length.steps=2"]) == 0
    return folder


def images() -> PretrainConfig:
    recipe = tiny.recipe()
    update = {
        "data": adapter(source="noise", patch_order="hilbert"),
        "train": recipe.train.model_copy(update={"ema": None}),
    }
    return recipe.model_copy(update=update)


@pytest.mark.parametrize("name", ["recipe", pytest.param("backwards", marks=pytest.mark.slow), "images", "tuned"])
def test_inspect_writes_pictures_and_one_page(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = {path: path.read_bytes() for path in (runs / name / "report").rglob("*")}
    assert main(["inspect", str(runs / name), "samples=2"]) == 0
    shown = capsys.readouterr().out
    folder = runs / name / "inspect"
    pictures = {"maps.png", "layers.png"} | ({"order.png"} if name in ("backwards", "images") else set())
    assert {path.name for path in folder.iterdir()} == {"index.html", *pictures}
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "http" not in page
    assert shown.splitlines()[-1] == f"Report: {folder / 'index.html'}"
    for word in ("layer 1", "layer 2", "uniform attention"):
        assert word in page
        assert word in shown
    for word in ("mean rank", "Similarity:"):
        assert (word in page) == (name != "tuned"), word
    assert ("was trained on labels" in page) == ("was trained on labels" in shown) == (name == "tuned")
    assert {path: path.read_bytes() for path in report} == report


@pytest.mark.parametrize("name", [pytest.param("backwards", marks=pytest.mark.slow), "images"])
def test_failure_cases_stand_on_the_page(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(runs / name), "samples=1"]
    assert main([*words, "worst=2"]) == 0
    shown, folder = capsys.readouterr().out, runs / name / "inspect"
    page = (folder / "index.html").read_text()
    for text in (shown, page):
        assert "worst at" in text
        assert "Predicted worst" in text
    assert {"worst_samples.png", "worst_tokens.png"} < {path.name for path in folder.iterdir()}
    assert main(words) == 0
    assert not list(folder.glob("worst_*.png"))
    assert "worst at" not in capsys.readouterr().out


def test_what_predicts_no_next_token_is_not_asked_for_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {}
    for words in ((), ("causal=false",)):
        assert main(["inspect", str(runs / "images"), "samples=1", *words]) == 0
        shown = capsys.readouterr().out
        with Image.open(runs / "images/inspect/maps.png") as picture:
            wide[words] = picture.width
        assert ("attention is bidirectional" in shown) == bool(words)
        assert ("mean rank" in shown) != bool(words)
    assert wide[("causal=false",)] == pytest.approx(wide[()] * 2 / 3, abs=1), "no panel with the similarity map"


def test_samples_are_drawn_from_the_whole_split_and_named_by_place_class_and_file(tmp_path: Path) -> None:
    assert [spread(9, most) for most in (1, 3, 20)] == [[0], [0, 4, 8], list(range(9))]
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                (tmp_path / split / name / f"{name}{k}.png").write_bytes(encoded(picture(k)))
    (tmp_path / "val/ant/ant2.png").write_bytes(b"torn")
    data = adapter(source="folder", root=str(tmp_path))
    found = dict(chosen_samples(data, Options(samples=6), CPU))
    assert list(found) == [
        "test 0, ant, ant0.png", "test 1, ant, ant1.png",
        "test 3, bee, bee0.png", "test 4, bee, bee1.png", "test 5, bee, bee2.png",
    ]  # fmt: skip
    for name, batch in found.items():
        assert torch.equal(batch["image"][0], data.dataset("test")[int(name.split()[1].strip(","))]["image"])
    names = [name for name, _ in chosen_samples(Waves(), Options(samples=12), CPU)]
    places = [int(name.split()[1].strip(",")) for name in names]
    assert places == sorted(set(places))  # of 48, not the first
    assert 36 < places[-1] < 48
    label = int(Waves().dataset("test")[places[-1]]["label"])
    assert names[-1] == f"test {places[-1]}, class {label}"


@pytest.mark.slow
def test_a_segmentation_run_colours_the_pixels_of_our_own_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run = write_scenes(tmp_path / "scenes"), tmp_path / "run"
    words = ["segment", "tests.tiny_scenes:recipe", f"data.root={root}", f"out={run}", "train.length.steps=2"]
    assert main(words) == 0
    assert main(["inspect", str(run), "samples=2"]) == 0
    files = {path.name for path in (run / "inspect").iterdir()}
    assert files == {"classes.png", "index.html", "layers.png", "maps.png"}
    with Image.open(run / "inspect/classes.png") as picture:
        wide, high = picture.size
    image, _ = scene(7, (12, 40))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(image).save(tmp_path / folder / "own.png")
    (tmp_path / "torn.png").write_bytes(b"torn")
    own = f"images=[{tmp_path / 'a/own.png'},{tmp_path / 'b/own.png'}]"
    assert main(["inspect", str(run), own]) == 0
    config = load_config(SegmentConfig, run / "config.json")
    model = load_segmenter(config, read_weights(str(run)))
    expected = predict_image(config, model, torch.from_numpy(image).permute(2, 0, 1))
    for name in ("own_0.png", "own_1.png"):
        with Image.open(run / "inspect/masks" / name) as mask:
            assert mask.mode == "P"
            assert (np.asarray(mask) == expected.numpy() + config.data.first_label).all()
            first = int(expected[0, 0])
            assert np.asarray(mask.convert("RGB"))[0, 0].tolist() == palette(3)[first].tolist()
    capsys.readouterr()
    assert main(["inspect", str(run), f"images={tmp_path / 'torn.png'}"]) == 2
    assert "name image files" in capsys.readouterr().err
    with Image.open(run / "inspect/classes.png") as picture:
        assert picture.width == wide
        assert picture.height != high, "no truth: two pictures in a row"


def test_files_are_brought_to_the_size_of_the_run(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0, width=40, height=20)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(1), "jpeg"))
    data = images().data
    options = Options(images=f"[{tmp_path / 'a.png'},{tmp_path / 'b.jpg'}]")
    (name, first), (other, _) = chosen_samples(data, options, CPU)
    assert (name, other) == ("a.png", "b.jpg")
    tree = tmp_path / "tree"
    for split in ("train", "val"):
        (tree / split / "x").mkdir(parents=True)
        shutil.copy(tmp_path / "a.png", tree / split / "x/a.png")
    stored = open_images("folder", "test", size=(8, 12), channels=3, root=str(tree))[0]
    assert torch.equal(first["image"][0], stored["image"])
    assert (
        main(["inspect", str(runs / "images"), f"images={tmp_path / 'a.png'}", "query=[1,3]", "layer=1", "head=2"]) == 0
    )
    assert "layer 1, head 2" in (runs / "images/inspect/index.html").read_text()


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("recipe", ["images=a.png"], "files= and images= are for adapters that read files: "),
        ("images", ["images=nowhere.png"], "nowhere.png"),
        ("images", ["images=__file__"], "not an image"),
        ("recipe", ["query=6"], "query=6: the tokens lie on 1 rows and 6 columns"),
        ("recipe", ["query=-1"], "query=-1: each should be greater than or equal to 0"),
        ("recipe", ["query=[]"], "query"),
        ("recipe", ["query=[0,1,2]"], "query="),
        ("recipe", ["layer=last"], "layer=last: input should be a valid integer"),
        ("images", ["query=[0,4]"], "query=[0,4]: the tokens lie on 2 rows and 4 columns"),
        ("backwards", ["query=5", "samples=20"], "query=5: test"),
        ("recipe", ["worst=-1"], "worst=-1"),
        ("tuned", ["worst=2"], "worst=2: this network was trained on labels"),
        ("recipe", ["worst=2", "causal=false"], "worst=2: attention is bidirectional"),
        ("recipe", ["layer=3"], "layer=3: this network has layers 1 to 2"),
        ("recipe", ["head=0"], "head=0"),
        ("recipe", ["split=val"], "split=val"),
        ("recipe", ["sample=3"], "did you mean samples?"),
        ("recipe", ["data.size=5"], "embed.weight [16, 4] instead of [16, 5]"),
        ("recipe", ["data.token=5"], "did you mean data.tokens?"),
        ("nothing", [], "nothing is not a run folder"),
    ],
)
def test_what_can_not_be_shown_is_one_line(
    runs: Path, name: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("__file__", __file__) for word in words]
    assert main(["inspect", str(runs / name), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_other_data_of_the_same_form_may_be_shown(runs: Path) -> None:
    data = read_config(str(runs / "recipe"), {"data.tokens": 9}).data
    readings = inspect(
        load_network(read_weights(str(runs / "recipe")), data, CPU), data, Options(samples=1), causal=True
    )
    assert len(readings[0].similarity) == 9


def test_too_many_tokens_for_learned_positions_are_one_line() -> None:
    data, model = Waves(tokens=9), _network(Waves(), learned_positions=6)
    with pytest.raises(UserError, match=r"^9 tokens are more than model\.learned_positions=6$"):
        inspect(model, data, Options(samples=1), causal=True)


def test_the_help_of_a_run_of_any_task_lists_the_keys_that_may_change(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(runs / "tuned"), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "data.tokens=6" in shown
    assert "optim." not in shown
