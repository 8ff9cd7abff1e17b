"""nepa import and nepa export: a released checkpoint becomes a run and comes out again as it was."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modalities.image import Images, patchify
from nepa_core.runtime.config import load_config, override
from nepa_core.runtime.distributed import World
from nepa_core.runtime.released import read_released
from nepa_core.runtime.run import Run
from nepa_core.runtime.weights import read_weights
from nepa_core.tokens import Tokens
from recipes.cli import main
from recipes.configs import FinetuneConfig, PretrainConfig
from recipes.presets import small
from recipes.training.finetuning import load_classifier
from recipes.training.pretraining import load_pretrained, pretrain
from recipes.training.starting import build_model
from tests import tiny
from tests.conftest import ROOT
from tests.pictures import encoded, picture, write_tree
from tests.release import FACTS, FIXTURES, random_release, write_release
from tests.tiny import CPU
from tests.tiny_scenes import scenes, write_scenes

ALONE = World(0, 1, CPU)
LABELS = {"id2label": {"0": "ant", "1": "bee", "2": "cat"}, "label2id": {"ant": "0", "bee": "1", "cat": "2"}}


def convert(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def complaint(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that fails says: one line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nepa: ")
    assert said.count("\n") == 1
    return said


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype).view_as(ours), rtol=0, atol=tolerance)


def tokens(data: Any, pixels: Tensor) -> Tokens:
    """Standardised pixels as the adapter's tokens."""
    plain = data.tokenize({"image": torch.zeros(pixels.shape, dtype=torch.uint8)})
    return Tokens(patchify(pixels, data.patch), plain.coords)


# ------------------------------------------------------------------------------------------------------- there and back


def check_golden(kind: str, run: Path) -> None:
    """The authors' outputs from the run of one of their checkpoints."""
    expected = load_file(FIXTURES / kind / "expected.safetensors")
    pixels = expected["pixel_values"]
    if kind == "classify":
        config = load_config(FinetuneConfig, run / "config.json")
        classifier = load_classifier(config, read_weights(str(run)))
        assert not config.causal
        close(classifier(tokens(config.data, pixels), causal=config.causal), expected["logits"])
        return
    config, model = load_pretrained(Run(run), CPU)
    assert config.objective.causal
    for causal, name in ((True, "causal"), (False, "bidirectional")):
        out = model(tokens(config.data, pixels), causal=causal)
        close(out.embeddings, expected["input_embedding"])
        close(out.predictions, expected[f"{name}.last_hidden_state"])


@pytest.mark.parametrize("kind", ["pretrain", "classify"])
def test_the_authors_outputs_after_import_and_their_files_after_export(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    convert("import", FIXTURES / kind, f"out={run}")
    assert "3 layers of width 64" in capsys.readouterr().out
    check_golden(kind, run)
    convert("export", run, f"out={out}")
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (FIXTURES / kind / name).read_bytes(), name
    assert not (out / "ema.safetensors").exists()
    convert("import", out, f"out={tmp_path / 'again'}")
    check_golden(kind, tmp_path / "again")
    record = json.loads((run / "import.json").read_text())
    assert record["source"] == str(FIXTURES / kind)
    assert set(record["sha256"]) == {"config.json", "model.safetensors"}


def test_folded_scales_give_the_authors_logits(tmp_path: Path) -> None:
    """The same as `check_golden`, without a LayerScale."""
    for kind in ("pretrain", "classify"):
        run, out = tmp_path / kind, tmp_path / f"{kind}-out"
        convert("import", FIXTURES / kind, f"out={run}")
        convert("export", run, f"out={out}", "fold_layer_scale=true")
        assert not any("lambda" in name for name in load_file(out / "model.safetensors"))
        assert json.loads((out / "config.json").read_text())["layerscale_value"] is None
        convert("import", out, f"out={run}-folded")
        assert json.loads((tmp_path / f"{kind}-folded/config.json").read_text())["model"]["layer_scale"] is None
        check_golden(kind, tmp_path / f"{kind}-folded")


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_names_dtypes_shapes_and_bytes_come_out_as_they_went_in(
    dtype: torch.dtype, classes: int, tmp_path: Path
) -> None:
    facts = FACTS | (LABELS if classes else {}) | {"unknown": {"kept": [1, 2.5, None]}, "rope_theta": 100}
    facts |= {"architectures": ["Mine"], "pos_embed_jitter": 1.1, "add_pooling_layer": bool(classes)}
    raw, averaged = (
        {name: value.to(dtype) for name, value in random_release(facts, classes=classes, seed=seed).items()}
        for seed in (0, 1)
    )
    source, out = tmp_path / "source", tmp_path / "out"
    write_release(source, facts, raw, averaged)
    pixels = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "crop_pct": 0.9,
        "size": {"shortest_edge": 6},
        "resample": 2,
    }
    (source / "preprocessor_config.json").write_text(json.dumps(pixels))
    convert("import", source, f"out={tmp_path / 'run'}")
    weights = read_weights(str(tmp_path / "run"))
    assert torch.equal(weights.model["bos"][0], averaged["vit_nepa.embeddings.cls_token"][0, 0]), "averages go first"
    assert weights.data.mean == (0.1, 0.2, 0.3)
    convert("export", tmp_path / "run", f"out={out}")
    for name, state in {"model.safetensors": raw, "ema.safetensors": averaged}.items():
        found = load_file(out / name)
        assert found.keys() == state.keys()
        for key, value in state.items():
            assert found[key].dtype == dtype
            assert torch.equal(found[key], value), key
    assert facts.items() <= json.loads((out / "config.json").read_text()).items()
    assert pixels.items() <= json.loads((out / "preprocessor_config.json").read_text()).items()
    convert("export", tmp_path / "run", f"out={tmp_path / 'ema'}", "weights=ema")
    only = load_file(tmp_path / "ema" / "model.safetensors")
    assert all(torch.equal(only[key], value) for key, value in averaged.items())
    assert not (tmp_path / "ema" / "ema.safetensors").exists()


def test_what_is_folded_in_half_precision_becomes_float32(tmp_path: Path) -> None:
    """Maps of 0.02 times scales of 1e-5 would be zeros in float16."""
    state = random_release(FACTS) | {"vit_nepa.encoder.layer.0.layer_scale.lambda1": torch.full((32,), 1e-6)}
    half = {name: value.half() for name, value in state.items()}
    write_release(tmp_path / "source", FACTS | {"dtype": "float16"}, half)
    convert("import", tmp_path / "source", f"out={tmp_path / 'run'}")
    convert("export", tmp_path / "run", f"out={tmp_path / 'out'}", "fold_layer_scale=true")
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "vit_nepa.encoder.layer.0.attention.output.dense.weight"
    exact = half[name].float() * half["vit_nepa.encoder.layer.0.layer_scale.lambda1"].float()[:, None]
    assert torch.equal(found[name], exact)
    assert found["vit_nepa.layernorm.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def image_recipe(**changes: Any) -> PretrainConfig:
    noise = Images(
        source="noise", size=(8, 8), patch=(4, 4), channels=1, mean=(0.4,), std=(0.3,), limit=64, crop_ratio=0.8
    )
    keys = {"model.dim": 16, "model.mlp_dim": 32, "model.depth": 2, "train.length.steps": 2, "train.batch": 8}
    sizes = {f"verdict.{name}_samples": 80 for name in ("fit", "test", "health")}
    return override(small(noise), keys | sizes | {k.replace("__", "."): v for k, v in changes.items()})


def test_a_run_of_our_own_goes_out_and_comes_back(tmp_path: Path) -> None:
    run, out, back = (Run(tmp_path / name) for name in ("run", "out", "back"))
    config = image_recipe(model__gated=True, model__activation="silu", model__layer_scale=None, model__norm_eps=1e-5)
    pretrain(config, run, ALONE, show=False)
    convert("export", run.path, f"out={out.path}")
    facts = json.loads((out.path / "config.json").read_text())
    assert facts["architectures"] == ["ViTNepaForPreTraining"]
    assert json.loads((out.path / "preprocessor_config.json").read_text())["size"] == {"height": 8, "width": 8}
    assert (facts["image_size"], facts["patch_size"], facts["num_channels"], facts["dtype"]) == (8, 4, 1, "float32")
    assert "id2label" not in facts
    convert("import", out.path, f"out={back.path}")
    again = back.load_config(PretrainConfig)
    assert again.model == config.model
    for name in ("size", "patch", "channels", "mean", "std", "crop_ratio"):
        assert getattr(again.data, name) == getattr(config.data, name)
    for group in ("model", "ema"):
        stored = (next(each.checkpoints.glob("step_*")) / f"{group}.safetensors" for each in (run, back))
        one, other = map(load_file, stored)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), group


def test_a_run_on_scenes_goes_out_as_one_of_images_and_comes_back_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "scenes")
    config = image_recipe().model_copy(update={"data": scenes(tmp_path / "scenes")})
    tiny.training(config, tmp_path / "run", evaluate=lambda _: {})
    convert("export", tmp_path / "run", f"out={tmp_path / 'out'}")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (facts["image_size"], facts["patch_size"], facts["num_channels"]) == ([16, 24], 4, 3)
    capsys.readouterr()
    convert("import", tmp_path / "out", f"out={tmp_path / 'back'}")
    assert "image 16 x 24" in capsys.readouterr().out
    again = Run(tmp_path / "back").load_config(PretrainConfig)
    assert again.model == config.model
    assert isinstance(again.data, Images)
    for name, mine in (("size", "crop"), ("patch", "patch"), ("mean", "mean"), ("std", "std")):
        assert getattr(again.data, name) == getattr(config.data, mine)
    convert("export", tmp_path / "back", f"out={tmp_path / 'again'}")
    files = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_fine_tuned_run_takes_the_names_of_its_classes_along(tmp_path: Path) -> None:
    words = ["train.length.steps=2", "train.batch=32", "model.dim=16", "model.depth=1", "train.ema=null"]
    convert("finetune", "recipes.vision:digits", f"out={tmp_path / 'run'}", "data.patch=[4,4]", *words)
    convert("export", tmp_path / "run", f"out={tmp_path / 'out'}")
    released = read_released(tmp_path / "out")
    assert released.labels == tuple("0123456789")
    assert released.averaged is None
    assert not released.causal


# ------------------------------------------------------------------------------------------------ an imported run


def test_an_imported_run_trains_on_from_its_weights(tmp_path: Path) -> None:
    write_release(tmp_path / "source", FACTS, random_release(FACTS), random_release(FACTS, seed=1))
    run = tmp_path / "run"
    small_run = ["train.length.steps=2", "train.batch=8", "train.workers=0", "optim.lr=1e-30", "data.limit=64"]
    sizes = [f"verdict.{name}_samples=64" for name in ("fit", "test", "health")]
    keys = ["data.source=noise", 'data.augment="none"', *small_run, *sizes]
    convert("import", tmp_path / "source", f"out={run}", *keys)
    convert("pretrain", run)
    assert Run(run).metrics()[-1]["step"] == 2
    first, last = (load_file(run / "checkpoints" / f"step_0000000{step}" / "model.safetensors") for step in (0, 2))
    assert all(torch.equal(first[name], last[name]) for name in first), "at no rate the weights are those imported"
    untrained = build_model(load_config(PretrainConfig, run / "config.json")).state_dict()
    assert not torch.equal(untrained["embed.weight"], last["embed.weight"])


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.slow
def test_tuning_an_imported_run_starts_from_it_and_leaves_it_as_it_came(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = FACTS | (LABELS if classes else {})
    write_release(
        tmp_path / "source",
        facts,
        random_release(facts, classes=classes),
        random_release(facts, classes=classes, seed=1),
    )
    run, tuned = tmp_path / "run", tmp_path / "run-finetune"
    convert("import", tmp_path / "source", f"out={run}", "data.source=noise", 'data.augment="none"', "data.limit=64")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    capsys.readouterr()
    words = ["train.length.steps=1", "train.workers=0", "optim.lr=1e-30", "train.batch=32"]
    convert("finetune", run, *words)
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"Fine-tuning from {run} with the preset recipes.presets:short."
    assert f"started from {run}." in said.out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    config = load_config(FinetuneConfig, tuned / "config.json")
    assert config.init == str(run)
    assert (config.train.micro_batch, config.mix, config.causal) == (16, None, bool(classes))
    start, end = (read_weights(str(folder)) for folder in (run, tuned))
    assert all(torch.equal(end.model[name], start.model[name]) for name in start.model), "at no rate they stay"
    if classes:
        assert "was imported and stays as it came" in complaint(capsys, "finetune", run, f"out={run}", "init=null")


@pytest.mark.slow
def test_a_released_folder_is_a_start_and_its_averages_go_first(tmp_path: Path) -> None:
    source, run, plain = tmp_path / "source", tmp_path / "run", FACTS | {"qk_norm_affine": False}
    averaged = random_release(plain, seed=1)
    write_release(source, plain, random_release(plain), averaged)
    convert("import", source, f"out={run}", "data.source=digits", 'data.augment="none"')
    starts = [read_weights(str(name)) for name in (source, run)]
    assert starts[0].model.keys() == starts[1].model.keys()
    assert all(torch.equal(starts[0].model[name], starts[1].model[name]) for name in starts[0].model)
    assert torch.equal(starts[0].model["embed.bias"], averaged["vit_nepa.embeddings.patch_embeddings.projection.bias"])
    assert starts[0].digest != read_weights(str(FIXTURES / "classify")).digest
    words = ["model.qk_norm=affine", "train.length.steps=1", "train.batch=8", "train.workers=0", "train.ema=null"]
    convert("finetune", run, f"out={tmp_path / 'tuned'}", f"init={source}", *words)
    new = (Run(tmp_path / "tuned").summary() or {})["new_weights"]
    assert new == [f"predictor.blocks.{i}.attention.{kind}_norm.weight" for i in range(2) for kind in "kq"]


def test_the_same_import_again_is_fine_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other, run = (tmp_path / name for name in ("source", "other", "run"))
    write_release(source, FACTS, random_release(FACTS))
    write_release(other, FACTS, random_release(FACTS, seed=1))
    convert("import", source, f"out={run}")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    convert("import", source, f"out={run}")
    assert f"holds other weights, from {source};" in complaint(capsys, "import", other, f"out={run}")
    assert "data.root imagenet -> x" in complaint(capsys, "import", source, f"out={run}", "data.root=x")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    damaged = run / "checkpoints/step_00000000/model.safetensors"
    damaged.write_bytes(b"")
    convert("import", source, f"out={run}")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before, "fixed"

    for inside in (source, source / "run"):
        said = complaint(capsys, "import", source, f"out={inside}")
        assert said.startswith(f"nepa: out={inside} lies in {source}, ")
        assert "name another folder by out=DIR" in said
    assert sorted(file.name for file in source.iterdir()) == ["config.json", "model.safetensors"]

    pretrain(image_recipe(), Run(tmp_path / "own"), ALONE, show=False)
    said = complaint(capsys, "import", source, f"out={tmp_path / 'own'}")
    assert "holds a run that was trained here" in said
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    assert "is not a run folder" in complaint(capsys, "import", source, f"out={tmp_path / 'notes'}")
    monkeypatch.chdir(tmp_path)
    convert("import", source)
    assert (tmp_path / "runs" / "source" / "config.json").exists()


def test_damaged_weights_of_an_import_are_imported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    convert("import", FIXTURES / "pretrain", f"out={run}", "data.source=noise")
    damaged = run / "checkpoints/step_00000000/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = f"run `nepa import {FIXTURES / 'pretrain'} out={run}` again ("
    words = [["probe", run], ["inspect", run], ["export", run, f"out={tmp_path / 'out'}"], ["pretrain", run]]
    for line in words:
        assert again in complaint(capsys, *line)
    convert("import", FIXTURES / "pretrain", f"out={run}")
    assert load_config(PretrainConfig, run / "config.json").data.source == "noise", "the settings are kept"
    convert("export", run, f"out={tmp_path / 'out'}")


def test_names_of_classes_are_compared_as_far_as_they_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet's id2label and its folders are two ways to name the same; another order is an error."""
    labels = ("ant, emmet", "Honey bee", "cat")
    facts = FACTS | {"id2label": dict(enumerate(labels))}
    write_release(tmp_path / "source", facts, random_release(facts, classes=3))
    convert("import", tmp_path / "source", f"out={tmp_path / 'run'}", "train.workers=0")

    image = encoded(picture(6, 6))

    def on(*folders: str) -> tuple[int, str, str]:
        root = tmp_path / "-".join(folders)
        write_tree(root, {f"{split}/{name}/0.png": image for split in ("train", "val") for name in folders})
        capsys.readouterr()
        return main(["evaluate", str(tmp_path / "run"), f"data.root={root}"]), *capsys.readouterr()

    status, out, err = on("ant", "honey_bee", "zcat")
    assert (status, out) == (2, "")
    assert "differ: 2 is 'cat' there and 'zcat' here; name the data" in err
    status, out, err = on("Cat", "ant", "honey_bee")
    assert status == 2
    assert "0 is 'ant, emmet' there and 'Cat' here, 1 is " in err
    status, out, err = on("n01", "n02", "n03")
    assert status == 0
    assert out.endswith(", 3 samples, raw weights.\n")
    assert err.startswith(
        "The classes are named in two ways, and taken to be the same by number: 0 is 'ant, emmet' there"
    )
    assert err.count("\n") == 1
    status, out, err = on("ant", "bee")
    assert status == 2
    assert "was trained on 3 classes and this data has 2 classes" in err
    status, out, err = on("ANT", "Honey_Bee", "cat")
    assert (status, err) == (0, "")


def test_a_broken_config_of_a_released_folder_is_fetched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path / "source", FACTS, random_release(FACTS))
    (tmp_path / "source" / "config.json").write_text('{"model_type": ')
    for words in (
        ["import", tmp_path / "source"],
        ["finetune", "recipes.vision:digits", f"init={tmp_path / 'source'}"],
    ):
        assert "config.json is not JSON" in (said := complaint(capsys, *words, f"out={tmp_path / 'run'}"))
        assert said.endswith("; fetch it again\n")


def test_help_lists_the_keys_of_the_run_to_be_that_the_weights_leave_open(capsys: pytest.CaptureFixture[str]) -> None:
    convert("import", FIXTURES / "classify", "data.root=here", "--help")
    said = capsys.readouterr().out
    for decided in ("  model.", "  data.patch=", "  causal="):
        assert decided not in said
    assert "  data.patch_order=raster" in said
    assert "data.root=here" in said


@pytest.mark.parametrize("key", ["model.dim=32", "data.patch=[7,7]", "objective.causal=false"])
def test_what_the_weights_decide_can_not_be_set(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "import", FIXTURES / "pretrain", f"out={tmp_path / 'run'}", key)
    assert f"{key.partition('=')[0]} can't be set" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", [{"image_mean": 0.5}, {"image_mean": [0.5, "x", 0.5]}, {"image_mean": [0.5]}])
def test_statistics_that_are_none_are_named(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path / "source", FACTS, random_release(FACTS))
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(told))
    assert "data.mean" in complaint(capsys, "import", tmp_path / "source", f"out={tmp_path / 'run'}")


def test_averages_in_a_pickle_of_more_than_tensors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every reader of the folder: figures of the raw weights would pass for those of the averages."""
    source = tmp_path / "source"
    write_release(source, FACTS, random_release(FACTS))
    (source / "training_args.bin").write_bytes(b"")
    (source / "pytorch_model_ema.bin").write_bytes(pickle.dumps(print, protocol=2))
    words = [["import", source], ["finetune", "recipes.vision:digits", f"init={source}"]]
    for line in words:
        assert "convert it with `python -c " in complaint(capsys, *line, f"out={tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()
    (source / "pytorch_model_ema.bin").unlink()
    convert("import", source, f"out={tmp_path / 'run'}")
    assert "without averaged weights" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [0, 3])
def test_averages_beside_the_weights_come_back_byte_for_byte(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the authors' pytorch_model_ema.bin and from a safetensors file, through a run and out again, twice."""
    facts = FACTS | (LABELS if classes else {})
    raw, averaged = (random_release(facts, classes=classes, seed=seed) for seed in (0, 1))
    averaged["vit_nepa.layernorm.bias"][0] = -0.0
    source = tmp_path / "source"
    write_release(source, facts, raw)
    torch.save(averaged, source / "pytorch_model_ema.bin")
    told = "pytorch_model_ema.bin"
    for turn in range(2):
        run, out = tmp_path / f"run{turn}", tmp_path / f"out{turn}"
        convert("import", source, f"out={run}")
        said = capsys.readouterr().out
        assert f"The averaged weights are those of {told}; evaluate, probe, finetune and init= read these." in said
        for weights in (read_weights(str(source)), read_weights(str(run))):
            assert weights.averaged
            assert torch.equal(weights.model["bos"][0], averaged["vit_nepa.embeddings.cls_token"][0, 0])
        convert("export", run, f"out={out}")
        for name, state in {"model.safetensors": raw, "ema.safetensors": averaged}.items():
            found = load_file(out / name)
            assert found.keys() == state.keys()
            for key, value in state.items():
                assert found[key].numpy().tobytes() == value.numpy().tobytes(), key
        source, told = out, "ema.safetensors"
    names = ("model.safetensors", "ema.safetensors")
    first, second = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("out0", "out1"))
    assert first == second


@pytest.mark.parametrize(
    ("width", "told", "said"),
    [
        (32, None, "pixels: short side 6, centre crop 6"),
        (1024, None, "pixels: squashed to 6 x 6, centre crop 6"),
        (32, {"crop_pct": 0.5}, "pixels: short side 12, centre crop 6"),
        (1024, {"crop_pct": 0.5}, "pixels: short side 12, centre crop 6"),
        (32, {"crop_pct": 0.5, "crop_mode": "squash"}, "pixels: squashed to 12 x 12, centre crop 6"),
    ],
)
def test_an_imported_classifier_is_evaluated_on_the_pixels_of_its_published_figure(
    width: int, told: dict[str, Any] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the recipe of its size, unless the folder says otherwise; both commands name them."""
    facts = FACTS | LABELS | {"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 8}
    write_release(tmp_path / "source", facts, random_release(facts, classes=3))
    if told is not None:
        (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(told))
    image = encoded(picture(0, 20, 12))
    files = {f"{split}/{name}/0.png": image for split in ("train", "val") for name in ("ant", "bee", "cat")}
    write_tree(tmp_path / "data", files)
    run = tmp_path / "run"
    convert("import", tmp_path / "source", f"out={run}", f"data.root={tmp_path / 'data'}", "train.workers=0")
    assert f"\nHeld-out {said}.\n" in capsys.readouterr().out
    convert("evaluate", run)
    assert capsys.readouterr().out.startswith(f"Held-out {said}.\nHeld out: top-1 ")
    assert json.loads((run / "evaluate.json").read_text())["held_out_as"] == said
    convert("export", run, f"out={tmp_path / 'out'}")
    convert("import", tmp_path / "out", f"out={tmp_path / 'back'}")
    assert f"\nHeld-out {said}.\n" in capsys.readouterr().out, "they go out and come back"


# ------------------------------------------------------------------------------------------------ what has no place


def test_what_the_layout_has_no_place_for_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"data__patch": (2, 4), "data__size": (4, 8), "model__learned_positions": 16, "model__bos": False}
    changes |= {"model__predict_position": "add"}
    config = image_recipe(**changes, data__patch_order="random", model__rope_theta=None)
    run = Run(tmp_path / "run")
    run.open(config)
    said = complaint(capsys, "export", run.path, f"out={tmp_path / 'out'}")
    for key in ("data.patch=(2, 4)", "data.patch_order=random", "model.learned_positions=16"):
        assert key in said
    assert "model.predict_position=add" in said
    assert "model.bos=False" in said
    assert "model.rope_theta=None" in said
    assert "model.mask_token" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tests.tiny:recipe", "out=OUT"], "tests.tiny:recipe is not a run folder"),
        (["RUN"], "needs out=DIR"),
        (["RUN", "out=OUT", "model.dim=3"], "model.dim is not one of its options"),
        (["RUN", "out=OUT", "weights=best"], "weights=best"),
        (["RUN", "out=OUT", "weights=ema"], "has no averages"),
        (["RUN", "out=FULL"], "is not an empty folder"),
        (["WAVES", "out=OUT"], "holds images, not Waves"),
        (["EMPTY", "out=OUT"], "holds no checkpoint"),
    ],
)
def test_an_export_that_can_not_be_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_recipe: PretrainConfig
) -> None:
    convert("import", FIXTURES / "pretrain", f"out={tmp_path / 'RUN'}")
    Run(tmp_path / "WAVES").open(tiny_recipe)
    Run(tmp_path / "EMPTY").open(image_recipe())
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").write_text("kept")
    for name in ("RUN", "WAVES", "EMPTY", "OUT", "FULL"):
        words = [word.replace(name, str(tmp_path / name)) for word in words]
    assert said in complaint(capsys, "export", *words)
    assert not (tmp_path / "OUT").exists()
    assert [file.name for file in (tmp_path / "FULL").iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
from pathlib import Path
from nepa_core.runtime.run import Run
from recipes.released.importing import import_released

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

import_released(sys.argv[1], Run(Path(sys.argv[2])), {})
before = peak()
import_released(sys.argv[3], Run(Path(sys.argv[4])), {})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process")
def test_an_import_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    """Mapped pages count as held, so one reading is the size of the file; query, key and value are copied besides."""
    large = FACTS | {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "num_attention_heads": 16}
    write_release(tmp_path / "small", FACTS, random_release(FACTS))
    write_release(tmp_path / "large", large, random_release(large))
    words = [tmp_path / name for name in ("small", "small-run", "large", "large-run")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert 0.5 * size < int(done.stdout) < 1.4 * size
