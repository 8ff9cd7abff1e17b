"""Configs as users touch them: overrides, messages, JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from modalities.data.spectrogram_augment import SpectrogramAugment
from nepa_core.basics import UserError
from nepa_core.runtime.config import (
    differences,
    load_config,
    load_object,
    override,
    parse_assignments,
    save_config,
    validated,
)
from nepa_core.runtime.optim import Duration, LayerDecay
from recipes.configs import PretrainConfig
from tests import tiny


def test_overrides_reach_nested_keys_with_the_types_of_their_fields(tiny_recipe: PretrainConfig) -> None:
    words = ["optim.lr=5e-4", "optim.betas=[0.8,0.9]", "train.micro_batch=4", "model.bos=false", "data.tokens=9"]
    changed = override(tiny_recipe, parse_assignments([*words, "recipe=1e3x", "train.ema=null"]))
    assert (changed.optim.lr, changed.optim.betas) == (5e-4, (0.8, 0.9))
    assert (changed.train.micro_batch, changed.train.ema) == (4, None)
    assert (changed.model.bos, changed.recipe) == (False, "1e3x")
    assert changed.data == tiny.Waves(tokens=9)
    assert tiny_recipe == tiny.recipe(), "the original is left alone"
    assert set(differences(tiny_recipe, changed)) == {
        *("optim.lr", "optim.betas", "train.micro_batch", "model.bos", "data.tokens", "recipe", "train.ema")
    }


def test_naming_a_unit_of_a_duration_replaces_the_other(tiny_recipe: PretrainConfig) -> None:
    changed = override(tiny_recipe, {"train.length.epochs": 1.5, "optim.warmup.steps": 3})
    assert changed.train.length == Duration(epochs=1.5)
    assert changed.optim.warmup == Duration(steps=3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim.learning_rate": 1}, "unknown key optim.learning_rate; did you mean optim.lr_batch?"),
        ({"optim.l": 1}, "unknown key optim.l; did you mean optim.lr?"),
        ({"train.bach": 1}, "unknown key train.bach; did you mean train.batch?"),
        ({"data.tokns": 1}, "unknown key data.tokns; did you mean data.tokens?"),
        (
            {"zzz": 1},
            "unknown key zzz; keys begin with recipe, init, data, model, objective, optim, train, verdict: add",
        ),
        ({"optim.lr.peak": 1}, "unknown key optim.lr.peak: optim.lr is a single value"),
        ({"train.batch": "many"}, "train.batch=many: input should be a valid integer"),
        ({"train.batch": 2.5}, "train.batch=2.5: input should be a valid integer"),
        ({"train.batch": 0}, "train.batch=0: input should be greater than 0"),
        ({"train.ema": 1.0}, "train.ema=1.0: input should be less than 1"),
        ({"optim.lr": float("nan")}, "optim.lr=nan: input should be a finite number"),
        ({"optim.betas": [0.9, "x"]}, "optim.betas=x: each should be a valid number"),
        ({"optim.betas": "0.9,0.95"}, "optim.betas=0.9,0.95: input should be a list in brackets, such as [1,2]"),
        ({"optim.betas": [0.9]}, "optim.betas=[0.9]: too few elements"),
        ({"objective.terms.zzz": 1}, 'objective.terms={"cosine":1.0,"zzz":1}: there is no term zzz; known: cosine,'),
        (
            {"objective.terms": {"infonce": 1}},
            'objective.terms={"infonce":1}: there is no term infonce; did you mean infonce_sample or infonce_position?',
        ),
        ({"train.precision": "float16"}, "train.precision=float16: input should be 'auto', 'float32' or 'bfloat16'"),
        ({"train.length.steps": -1}, "train.length.steps=-1: input should be greater than or equal to 0"),
        ({"train.length.steps": 5, "train.length.epochs": 1}, "train.length: a duration needs exactly one of"),
        ({"model.heads": 3}, "model.dim=16 must be a multiple of 2 * model.heads=6"),
        ({"objective.input_mask": 0.5}, "objective.input_mask=0.5 needs model.mask_token=true"),
        ({"train.batch": 0, "train.log": 0}, "train.batch=0: input should be greater than 0 (and also train.log)"),
        ({"train": 5}, "train holds several keys: set them one by one, such as train.length.steps"),
        ({"train": {"batch": 8}, "train.seed": 1}, "train holds several keys: set them one by one"),
        ({"data": {}}, "data holds several keys: set them one by one, such as data.limit"),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(
    tiny_recipe: PretrainConfig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError) as raised:
        override(tiny_recipe, changes)
    assert str(raised.value).startswith(said)
    assert "\n" not in str(raised.value)


DECAY = {"optim.layer_decay.start": 0.5, "optim.layer_decay.end": 1, "optim.layer_decay.staggered_warmup": False}


class Either(BaseModel):
    """Fields that may be of several types."""

    name: Literal["one", "two"] | Literal["three"] = "one"
    some: tuple[Literal["one"] | Literal["two"], ...] = ()
    mixed: Literal["all"] | int | None = None
    pairs: tuple[int, int] | tuple[float, float] | None = None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "demo"}, "name=demo: input should be 'one', 'two' or 'three'"),
        ({"some": ["demo"]}, "some=demo: each should be 'one' or 'two'"),
        ({"mixed": "demo"}, "mixed=demo: input should be 'all' or a valid integer"),
        ({"mixed": "demo", "name": 1}, "name=1: input should be 'one', 'two' or 'three' (and also mixed)"),
        ({"pairs": 3}, "pairs=3: input should be a list in brackets, such as [1,2]"),
        ({"pairs": [1, "a"]}, "pairs=a: each should be a valid integer or a valid number"),
    ],
)
def test_of_several_types_every_value_that_would_do_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        override(Either(), changes)
    assert str(error.value) == said


def test_a_group_is_not_null_and_set_at_once(tiny_recipe: PretrainConfig) -> None:
    with pytest.raises(UserError, match=r"train=null and train\.length\.steps contradict each other"):
        override(tiny_recipe, {"train.length.steps": 1, "train": None})


def test_the_keys_of_a_group_that_is_null_make_it(tiny_recipe: PretrainConfig) -> None:
    assert tiny_recipe.optim.layer_decay is None
    changed = override(tiny_recipe, {**DECAY, "optim.lr": 0.5})
    assert changed.optim.layer_decay == LayerDecay(start=0.5, end=1.0, staggered_warmup=False)
    assert changed.optim.lr == 0.5
    again = override(changed, {"optim.layer_decay.end": 0.75})
    assert again.optim.layer_decay == LayerDecay(start=0.5, end=0.75, staggered_warmup=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"optim.layer_decay.end": 1},
            "optim.layer_decay is null here: give optim.layer_decay.start, optim.layer_decay.staggered_warmup, too",
        ),
        (DECAY | {"optim.layer_decay.start": 2}, "optim.layer_decay.start=2: input should be less than or equal to 1"),
        (
            DECAY | {"optim.layer_decay.strat": 2},
            "unknown key optim.layer_decay.strat; did you mean optim.layer_decay.start?",
        ),
        (
            DECAY | {"optim.layer_decay.start.x": 2},
            "unknown key optim.layer_decay.start.x: optim.layer_decay.start is a single value",
        ),
        ({"train.micro_batch.x": 2}, "unknown key train.micro_batch.x: train.micro_batch is a single value"),
    ],
)
def test_half_a_group_and_wrong_keys_of_it_are_told(
    tiny_recipe: PretrainConfig, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError) as raised:
        override(tiny_recipe, changes)
    assert str(raised.value) == said


@pytest.mark.parametrize(("word", "said"), [("lr", "'lr' is not of the form"), ("=1", "'=1' is not of the form")])
def test_assignments_need_a_key_and_a_value(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_assignments([word])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="a is given twice"):
        parse_assignments(["a=1", "b=2", "a=3"])


def test_assignments_are_json_where_they_parse_and_else_text() -> None:
    words = ["a=1", "b=1e-3", "c=true", "d=null", "e=[1,2]", "f=/data/x=y", "g=", "h=None"]
    assert parse_assignments(words) == {
        **{"a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, 2], "f": "/data/x=y", "g": "", "h": "None"}
    }


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("tests.tiny", "not of the form module:function"),
        ("tests.tiny:", "not of the form module:function"),
        ("no_such_module:recipe", "no module 'no_such_module' here"),
        ("tests.no_such:recipe", "no module 'tests.no_such' here"),
        (".tiny:recipe", "not of the form module:function"),
        ("tests.tiny:recip", "tests.tiny has no 'recip'; did you mean recipe?"),
        ("tests.tiny:zzz", "tests.tiny has no 'zzz'; known: Series, Waves, interrupted_at, ragged, random"),
        ("recipes.vision:digit", "did you mean digits?"),
    ],
)
def test_a_bad_import_path_says_what_is_missing(path: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        load_object(path)
    assert said in str(raised.value)


def test_a_module_whose_own_import_fails_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing needs_more failed: No module named 'needs'"):
        load_object("needs_more:recipe")


def test_a_saved_config_comes_back_with_its_adapter(tmp_path: Path) -> None:
    config = override(tiny.random(), {"optim.warmup.epochs": 0.5, "train.ema": None, "data.unreadable": [3, 4]})
    save_config(config, tmp_path / "config.json")
    again = load_config(PretrainConfig, tmp_path / "config.json")
    assert again == config
    assert type(again.data) is tiny.Waves
    assert differences(config, again) == {}
    assert json.loads((tmp_path / "config.json").read_text())["adapter"] == "tests.tiny:Waves"


def test_differences_hold_both_values(tiny_recipe: PretrainConfig) -> None:
    other = override(tiny_recipe, {"optim.lr": 1.0, "train.length.epochs": 2})
    assert differences(tiny_recipe, other) == {
        "optim.lr": (3e-3, 1.0),
        "train.length.steps": (12, None),
        "train.length.epochs": (None, 2.0),
    }


def test_another_adapter_with_the_same_settings_is_a_difference(tiny_recipe: PretrainConfig) -> None:
    class Ripples(tiny.Waves):
        pass

    other = tiny_recipe.model_copy(update={"data": Ripples()})
    assert set(differences(tiny_recipe, other)) == {"adapter"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ('{"recipe": "", "da', "is not JSON"),
        ("\x00\x00", "is not JSON"),
        ("[]", "holds no settings"),
        ("3", "holds no settings"),
        ('{"adapter": "tests.tiny:Waves"}', "model is missing"),
        ('{"adapter": "tests.tiny:Waves", "data": 3}', "Input should be a valid dictionary"),
        ('{"task": "segment"}', "is of a run of `nepa segment`, and a run of `nepa pretrain` is wanted here"),
        ('{"adapter": 5, "data": {}}', "'5' is not of the form module:function"),
        ('{"adapter": "tests.tiny:CPU", "data": {}}', "tests.tiny:CPU is not an adapter"),
        ('{"adapter": "tests.tiny:Waves", "data": {}}', "model is missing"),
        ('{"adapter": "tests.tiny:Waves", "data": {"tokens": "x"}}', "data.tokens=x"),
        ('{"adapter": "tests.tinny:Waves", "data": {}}', "no module 'tests.tinny'"),
    ],
)
def test_a_damaged_config_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        load_config(PretrainConfig, file)
    assert str(file) in str(raised.value)
    assert said in str(raised.value)


def test_a_folder_without_a_config_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} is not a run folder"):
        load_config(PretrainConfig, tmp_path / "config.json")


def test_saving_a_config_leaves_the_earlier_one_where_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: PretrainConfig
) -> None:
    file = tmp_path / "config.json"
    save_config(tiny_recipe, file)
    before = file.read_bytes()

    def half(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        save_config(tiny.random(), file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["data.augment", "data.parts.sound.augment"])
def test_a_group_of_an_adapter_is_named_where_it_lies(place: str) -> None:
    with pytest.raises(UserError, match=f"^all of {re.escape(place)} is 0; set {re.escape(place)}=null"):
        validated(SpectrogramAugment, {}, f"{place}.")
