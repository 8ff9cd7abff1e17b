"""The parts of the page of nepa generate that other pages lack."""

from pathlib import Path

import torch

from nepa_core.tokens import Sketch
from recipes.report.generate import Example, panels
from recipes.report.page import Report, Sound

GIVEN = torch.tensor([True, False, True, False])


def example(sketch: Sketch) -> Example:
    return Example("test 0", sketch, GIVEN, sketch, [sketch, sketch], sketch, torch.rand(4))


def test_what_is_not_given_is_left_out() -> None:
    curves = torch.arange(16.0).view(1, 8, 2)
    found = panels(example(Sketch(curves, (1, 4), curves=True)))
    assert [panel.title for panel in found] == ["truth", "given", "mean", "sample", "sample", "nearest", "score"]
    lost = found[1].sketch.canvas.isnan()
    assert lost[0, :, 0].tolist() == [False, False, True, True] * 2
    assert not found[0].sketch.canvas.isnan().any()
    rows = panels(example(Sketch(curves, (2, 2), curves=True)))[1].sketch.canvas.isnan()
    assert rows[0, :, 0].tolist() == [False] * 4 + [True] * 4  # each curve in a row of its own
    assert rows[0, :, 1].tolist() == [False] * 4 + [True] * 4
    picture = panels(example(Sketch(torch.rand(1, 4, 4), (2, 2))))[1]
    assert picture.hidden is not None
    assert picture.hidden.tolist() == (~GIVEN).tolist()


def test_a_sound_is_a_player_and_a_file(tmp_path: Path) -> None:
    made = {"command": "", "commit": None, "device": "", "processes": 1, "threads": 1, "python": "", "torch": ""}
    page = Report("x", "y", made, lambda: [Sound("a.wav", "<b>", b"RIFF")])  # type: ignore[arg-type]
    page.write(tmp_path)
    assert (tmp_path / "a.wav").read_bytes() == b"RIFF"
    text = (tmp_path / "index.html").read_text()
    assert '<p>&lt;b&gt;<br><audio controls src="data:audio/wav;base64,UklGRg=="></audio></p>' in text
