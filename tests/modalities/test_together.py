"""Several kinds of data in one predictor: samples, tokens, orders, what a file holds, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from modalities.data.parts import Mixed
from modalities.tones import Tones
from nepa_core import NEPA, UserError
from nepa_core.contract import check_modality
from nepa_core.runtime import trust
from nepa_core.runtime.config import differences, imports_of, keys, load_config, override, save_config
from nepa_core.runtime.data import spread_out
from nepa_core.tokens import Spans
from nepa_core.verdict.drawing import draw
from recipes import vision
from recipes.cli import main
from recipes.comparison import engine
from recipes.comparison.transfer import arms
from recipes.configs import PretrainConfig
from recipes.report import card
from recipes.report.summaries import PretrainSummary, TransferSummary
from recipes.training.door import pretrain
from tests.summaries import check_summary
from tests.tiny import Waves
from tests.tiny_parts import mixed, paired, together


@pytest.mark.parametrize(
    "data",
    [
        together("mixed"),
        together("mixed", part="slow"),
        together("paired"),
        together("paired", arrange="interleaved", first="slow"),
        Tones(samples=(20, 10)),
    ],
)
def test_it_keeps_the_contract(data: Any) -> None:
    check_modality(data)


def test_a_part_has_the_same_tokens_and_embeddings_in_a_mix_as_alone() -> None:
    data = together("mixed").plain()
    embed = data.embedder(8)
    samples: Any = data.dataset("test")
    tokens = data.read(samples.__getitems__(list(range(12))))
    for number, (name, part) in enumerate(data.parts.items()):
        rows = (samples.part[:12] == number).nonzero()[:, 0]
        own: Any = part.dataset("test")
        alone = part.read(default_collate([own[int(samples.row[row])] for row in rows]))
        count, size = alone.values.shape[1:]
        assert torch.equal(tokens.values[rows, :count, :size], alone.values)
        assert torch.equal(tokens.real[rows, :count], alone.real)
        assert not tokens.real[rows, count:].any()
        found, wanted = embed(tokens.values)[rows, :count], embed.of(name)(alone.values)
        assert torch.allclose(found, wanted)


def test_the_vector_of_a_part_is_added_to_inputs_and_never_to_targets() -> None:
    config = mixed()
    torch.manual_seed(0)
    model = NEPA(config.model, config.data.embedder(config.model.dim)).eval()
    tokens = config.data.read(default_collate([config.data.dataset("test")[row] for row in range(6)]))
    before = model(tokens, causal=True)
    assert model.parts is not None
    with torch.no_grad():
        model.parts[1] += 1
    after = model(tokens, causal=True)
    assert torch.equal(before.embeddings, after.embeddings)
    changed = (before.predictions != after.predictions).any(-1).any(1)
    assert torch.equal(changed, (tokens.part == 1).any(1)), "only samples of that part"  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"model\.parts=2 is for data of several parts"):
        model(Waves().read(default_collate([Waves().dataset("test")[0]])), causal=True)


def test_recipes_without_parts_are_stored_as_before() -> None:
    assert "parts" not in json.loads(vision.digits().model.model_dump_json())


def test_every_batch_holds_each_part_in_its_share() -> None:
    data = together("mixed", weights={"fast": 3, "slow": 1})
    samples: Any = data.dataset("train")
    part = samples.strata()
    assert part.bincount().tolist() == [192, 64], "all of the smaller part, and the larger one in its share"
    assert set(samples.row[part == 0].tolist()) == set(range(80))
    order = spread_out(torch.randperm(256, generator=torch.Generator().manual_seed(0)), part)
    assert sorted(order.tolist()) == list(range(256))
    assert all(abs(int((part[batch] == 1).sum()) - 4) <= 1 for batch in order.split(16))
    whole: Any = data.plain().dataset("train")
    assert whole.strata().bincount().tolist() == [80, 64], "read without augmentation, every sample counts once"


def test_rivals_are_of_one_part() -> None:
    samples: Any = together("mixed").dataset("test")
    drawn = draw(samples, 144, 0)
    kinds = samples.strata()[drawn.indices]
    assert all(len(set(kinds[drawn.group == group].tolist())) == 1 for group in drawn.group.unique())
    assert sorted(drawn.group.bincount().tolist()) == [16, 64, 64]


def test_overlapping_samples_stay_so_in_a_mix() -> None:
    class Windows(list[Any]):
        def spans(self) -> Spans:
            row = torch.arange(len(self))
            return Spans(row // 2, 0 * row, row, row + 2, chained=True)

    own = [{"x": torch.tensor(row)} for row in range(4)]
    spans = Mixed({"a": Windows(own), "b": own}, None).spans()  # type: ignore[dict-item]
    of_a = spans.track == 0
    assert (int(of_a.sum()), len(spans.track.unique()), len(spans.cluster.unique())) == (4, 5, 6)
    assert (spans.end - spans.first)[of_a].tolist() == [2] * 4
    assert spans.chained


def test_pairs_share_their_class_and_held_out_ones_no_sample() -> None:
    data = together("paired")
    held_out: Any = data.dataset("test")
    sets = {name: part.dataset("test") for name, part in data.parts.items()}
    for row in range(len(held_out)):
        fast, slow = held_out.table[row].tolist()
        assert sets["fast"][fast]["label"] == sets["slow"][slow]["label"] == held_out[row]["label"]
    assert all(len(column.unique()) == len(column) for column in held_out.table.T)
    training: Any = data.dataset("train")
    first, second = (training.__getitems__(list(range(64))) for _ in range(2))
    assert torch.equal(first["fast.values"], second["fast.values"])
    assert not torch.equal(first["slow.values"], second["slow.values"]), "partners are drawn anew"
    assert torch.equal(first["label"], first["slow.label"])
    plain: Any = data.plain().dataset("train")
    assert torch.equal(plain.__getitems__([0, 1])["slow.values"], plain.__getitems__([0, 1])["slow.values"])
    with pytest.raises(UserError, match=r"pair_by=index needs as many samples of every part \(fast 80, slow 64\)"):
        together("paired", pair_by="index").dataset("test")


def test_either_part_leads_in_training_and_a_fixed_one_elsewhere() -> None:
    data = together("paired")
    batch = default_collate([data.dataset("train")[row] for row in range(40)])
    fixed = data.read(batch).part
    assert fixed is not None
    assert (fixed[..., 0] == 0).all()
    torch.manual_seed(0)
    drawn = data.at(0.0).read(batch)
    lead = drawn.part[:, 0]  # type: ignore[index]
    assert 10 < int(lead.sum()) < 30
    behind = (drawn.real[:, 1:] & ~drawn.real[:, :-1]).any()
    assert not behind, "padding stands behind all"
    other = drawn.part.gather(1, drawn.real.sum(1, keepdim=True) - 1)[:, 0]  # type: ignore[union-attr]
    assert torch.equal(other, 1 - lead), "one part after the other"


def test_interleaved_parts_are_merged_by_time() -> None:
    data = together("paired", arrange="interleaved")
    tokens = data.read(default_collate([data.dataset("test")[row] for row in range(8)]))
    time = tokens.coords[..., 0].expand(tokens.real.shape).masked_fill(~tokens.real, torch.inf)
    assert (time.diff().nan_to_num(0.0) >= 0).all()
    assert data.crossings() == {}, "no part lies before the other"


def test_a_file_holds_the_parts_and_code_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, file = mixed(), tmp_path / "run" / "config.json"
    file.parent.mkdir()
    save_config(config, file)
    assert load_config(PretrainConfig, file) == config
    changed = override(config, {"data.parts.fast.samples": 50})
    assert changed.data.parts["fast"].samples == 50  # type: ignore[attr-defined]
    assert differences(config, changed) == {"data.parts.fast.samples": (80, 50)}
    assert keys(config)["data.parts.slow.ragged"] is True
    assert imports_of(config).count("tests.tiny:Waves") == 2
    (tmp_path / "theirs.py").write_text("from tests.tiny import Waves\n\nclass Other(Waves):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(trust, "_given", trust.Trust())
    file.write_text(file.read_text().replace('"adapter": "tests.tiny:Waves"', '"adapter": "theirs:Other"', 1))
    with pytest.raises(UserError, match="it names theirs:Other, code that would be run"):
        load_config(PretrainConfig, file)
    with trust.everything():
        assert type(load_config(PretrainConfig, file).data.parts["fast"]).__name__ == "Other"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mixed part=fats", "data.part=fats: there is no such part; did you mean fast?"),
        ("mixed part=fast data.part=slow", "part= is short for data.part=: give one of them"),
        ('mixed data.weights={"fast":1,"slw":1}', "data.weights.slw: there is no such part; did you mean slow?"),
        ('mixed data.weights={"fast":1}', "data.weights.slow is missing"),
        ('mixed data.weights={"fast":1,"slow":-1}', "data.weights.slow=-1: a share is a number above 0"),
        ('paired data.weights={"fast":1,"slow":1}', "data.weights is of data.mode=mixed"),
        ("paired data.first=x", "data.first=x: there is no such part; known: drawn, fast, slow"),
        ("paired data.first=fsat", "data.first=fsat: there is no such part; did you mean fast?"),
        ("paired data.pair_by=index", "pair_by=index needs as many samples of every part"),
        (
            "paired data.parts.slow.labelled=false",
            "part slow has none: give it class folders or a column label, or set data.pair_by=index",
        ),
        ("paired data.parts.slow.samples=0", "part slow: its"),
        ("mixed data.parts.slw.samples=3", "unknown key data.parts.slw.samples; did you mean slow?"),
        (
            "mixed data.parts.slow.sampels=3",
            "unknown key data.parts.slow.sampels; did you mean data.parts.slow.samples?",
        ),
        ('mixed data.parts={"a":3,"b":4}', "data.parts.a=3 is no adapter"),
        ("mixed model.parts=3", "model.parts=3 and the data have 2 parts"),
    ],
)
def test_bad_input_is_one_line(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, *rest = words.split()
    assert main(["pretrain", f"tests.tiny_parts:{recipe}", "out=run", *rest]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_parts_of_adapters_without_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "recipes.vision:digits", "part=left"]) == 2
    assert "the adapter Images has no parts" in capsys.readouterr().err
    assert main(["pretrain", "recipes.vision:digits", "model.parts=2"]) == 2
    assert "model.parts=2 is for data of several parts" in capsys.readouterr().err
    assert main(["transfer", "recipes.vision:digits"]) == 2
    assert "nepa transfer compares parts that are mixed in one predictor" in capsys.readouterr().err


def test_classes_of_two_parts_must_have_names_in_common() -> None:
    images = vision.digits().data
    data = together("paired").model_copy(update={"parts": {"tone": Tones(kinds=2), "named": _Named()}})
    with pytest.raises(UserError, match="no class is common to all parts"):
        data.dataset("train")
    both = together("paired").model_copy(update={"parts": {"image": images, "tone": Tones(kinds=3, samples=(50, 30))}})
    assert both.classes() == ("0", "1", "2")
    assert set(both.dataset("test").label.tolist()) == {0, 1, 2}


class _Named(Waves):
    def classes(self) -> tuple[str, ...]:
        return "slow", "fast"


def test_the_demos_tones_are_the_same_everywhere() -> None:
    train, test = (Tones().dataset(split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1500, 500)  # type: ignore[arg-type]
    assert train[0]["label"].item() == 5
    sound = Tones().decode(Tones().tokenize(default_collate([test[0]])))
    assert (sound.kind, sound.rate, sound.data.shape) == ("sound", 8000, (1, 8 * (8000 // 6)))


@pytest.mark.slow
def test_a_pair_is_judged_both_ways_and_a_mix_part_by_part(tmp_path: Path) -> None:
    run = pretrain(paired(), tmp_path / "paired", verbose=False)
    check_summary(run.path / "summary.json", PretrainSummary)
    assert set(run.summary["crossings"]) == {"slow from fast", "fast from slow"}
    assert "first token of" in run.verdict
    run = pretrain(mixed(), tmp_path / "mixed", verbose=False)
    strata = card.strata_in(run.summary)
    assert set(strata) == {"fast", "slow"}
    assert run.summary["asked"] == sum(each.asked for each in strata.values())
    assert run.summary["retrieval_top1"] == pytest.approx(
        sum(each.asked * each.retrieval_top1 for each in strata.values()) / run.summary["asked"]
    )
    assert "\nfast: " in run.verdict


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each mode."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"mixed": mixed(), "paired": paired()}
    return {name: pretrain(config, folder / name, verbose=False).path for name, config in made.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "probe {mixed} part=fast layers=final classifiers=linear",
        "probe {paired} layers=final classifiers=linear",
        "finetune {mixed} part=slow out=tuned train.length.steps=2 control=false",
        "finetune {paired} out=tuned train.length.steps=2 control=false",
        "generate {mixed} part=fast samples=64 decoder_steps=2 train_samples=48",
        "generate {paired} samples=64 decoder_steps=2 train_samples=48",
        "embed {mixed} part=slow out=x.npy surprise=true",
        "embed {paired} out=x.npy",
        "inspect {mixed} part=slow samples=2",
        "inspect {paired} samples=2",
        "check {mixed}",
        "objectives tests.tiny_parts:paired objectives=cosine seeds=0 labels=2 learning_rates=1e-3 finetune_steps=2 "
        "finetune_causal=false train.length.steps=2 workers=1 out=objectives",
        "bench tests.tiny_parts:mixed steps=2",
    ],
)
def test_every_task_works_on_it(
    words: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "share", lambda jobs, *, workers: engine.work_through(jobs))
    assert main(words.format(**{name: str(path) for name, path in runs.items()}).split()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["probe", "finetune"])
def test_labels_of_a_mix_are_of_a_part(
    task: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([task, str(runs["mixed"]), f"out={tmp_path / 'out'}"]) == 2
    assert "add part=fast or part=slow" in capsys.readouterr().err


@pytest.mark.slow
def test_transfer_compares_each_part_alone_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "share", lambda jobs, *, workers: engine.work_through(jobs))
    out = tmp_path / "compared"
    words = ["transfer", "tests.tiny_parts:mixed", f"out={out}", "train.length.steps=2"]
    assert main([*words, "seeds=0,1,2"]) == 0
    summary = check_summary(out / "summary.json", TransferSummary)
    assert summary["steps"] == {"fast alone": 2, "slow alone": 2, "together, same cost": 2, "together, own steps": 4}
    assert set(summary["probes"]["fast"]) == {"fast alone", "together, same cost", "together, own steps"}
    assert set(summary["gains"]["slow"]) == {"together, same cost", "together, own steps"}
    assert len(summary["differences"]["slow"]) == 2
    said = capsys.readouterr().out
    assert "minus alone, in points" in said
    assert "Which helps which?" in said
    assert (out / "report" / "index.html").exists()
    shares = arms(override(mixed(), {"data.weights": {"fast": 3, "slow": 1}, "train.length.steps": 12}))
    assert {name: each.config.train.length.steps for name, each in shares.items()} == {
        "fast alone": 12,
        "slow alone": 12,
        "together, same cost": 12,
        "together, own steps of fast": 16,
        "together, own steps of slow": 48,
    }
