"""Text: what a token holds, UTF-8, vocabularies, windows and their documents."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from modalities.data.stdlib_text import stdlib_documents
from modalities.data.vocabulary import OTHER, open_vocabulary
from modalities.text import Text
from nepa_core.basics import UnreadableSample, UserError
from nepa_core.contract import check_modality


def write(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def adapter(folder: Path, **changes: object) -> Text:
    return Text.model_validate({"source": "file", "root": str(folder), "patch": 2, "window": 8} | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {
        f"{split}/{kind}/{i}.txt": kind * (i + 2) for split in ("train", "test") for kind in "ab" for i in range(6)
    }
    return write(tmp_path, texts | {"test/a/9.txt": "äöü" * 4, "train/b/9.txt": "ß" * 11})


def test_it_keeps_the_contract(folder: Path) -> None:
    check_modality(adapter(folder))
    check_modality(adapter(folder, letters="ab", patch=1, window=4, ends="drop"))


def test_a_token_is_its_symbols_one_hot_and_comes_back(folder: Path) -> None:
    data = adapter(folder)
    windows = data.dataset("test")
    tokens = data.read(default_collate([windows[i] for i in range(len(windows))]))
    assert tokens.values.shape[1:] == (4, 512)
    assert tokens.mask is not None
    assert torch.equal(tokens.values.sum(-1), 2.0 * tokens.mask)
    texts = [data.text_of(each) for each in data.decode(tokens).data]
    assert "aaaaaa" in texts
    assert any("ä" in text for text in texts)
    assert data.classes() == ("a", "b")


def test_equal_tokens_and_no_others_have_equal_symbols(folder: Path) -> None:
    data = adapter(folder, patch=4)
    values = torch.nn.functional.one_hot(torch.randint(2, (1, 400, 4)), 256).float().flatten(2)
    found, plain = data.symbols(values)[0], values[0]
    assert torch.equal(found[:, None] == found, (plain[:, None] == plain).all(-1))


def test_half_a_character_is_never_shown_as_another(tmp_path: Path) -> None:
    """U+FFFD stands for the half at either end of a window; a whole character stands at its first byte."""
    data = adapter(write(tmp_path, {f"{i}.txt": "aaaä" * 9 for i in range(4)}), patch=1, window=4)
    windows = data.dataset("train")
    read = [data.text_of(windows[i]["symbols"]) for i in range(2)]
    assert read == ["aaa" + OTHER, OTHER + "aaa"]
    assert open_vocabulary(None, None).shown(list("€a".encode())) == ["€", "", "", "a"]


def test_the_longest_symbol_is_read_and_the_rest_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "texts", {f"{i}.txt": "the then\nx" for i in range(3)})
    write(tmp_path, {"words.txt": "the\nthen\n \n\\n\nt"})
    data = adapter(root, vocabulary=str(tmp_path / "words.txt"), patch=1, window=5)
    assert data.dataset("train")[0]["symbols"].tolist() == [0, 2, 1, 3, 5]
    assert "training split: 2 characters of 1 kind without a symbol, read as one more: 'x'" in capsys.readouterr().err
    assert data.token_dim() == 6


def test_windows_of_a_document_are_one_cluster_and_name_their_place(folder: Path) -> None:
    windows = adapter(folder, window=4).dataset("train")
    spans = windows.spans()
    assert len(windows) == len(spans.cluster)
    assert len(spans.cluster.unique()) == len(set(windows.document.tolist()))
    assert any(windows.name(i).endswith("b/9.txt, from symbol 4") for i in range(len(windows)))
    assert (spans.end - spans.first == 4).all()


def test_short_documents_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {f"train/{i}.txt": "abcdefgh" for i in range(3)} | {"train/short.txt": "abc", "test/a.txt": "abcdefgh"}
    root = write(tmp_path, texts)
    assert len(adapter(root).dataset("train")) == 3
    assert "less than two tokens of 2 symbols: 1 of 4 documents" in capsys.readouterr().err
    with pytest.raises(UserError, match="no document has 16 tokens"):
        adapter(root, window=32, ends="drop").dataset("train")
    with pytest.raises(UserError, match="tokens of more than 8,192 numbers"):
        adapter(root, patch=64, window=128).dataset("train")


def test_files_by_name_are_their_beginnings(folder: Path) -> None:
    write(folder, {"own.txt": "zyxwvutsrq", "tiny.txt": "z"})
    data = adapter(folder)
    files = data.files([str(folder / name) for name in ("own.txt", "tiny.txt", "none.txt")])
    assert len(files) == 3
    assert data.text_of(files[0]["symbols"]) == "zyxwvuts"
    for index, words in ((1, "fewer than two tokens"), (2, "none.txt")):
        with pytest.raises(UnreadableSample, match=words):
            files[index]
        with pytest.raises(UnreadableSample, match=words):
            files.__getitems__([0, index])


def test_the_picture_has_a_cell_for_every_symbol(folder: Path) -> None:
    data = adapter(folder)
    sketch = data.describe(data.read(default_collate([data.dataset("test")[i] for i in range(3)])))
    assert sketch.grid[0] * sketch.grid[1] == 4
    assert sketch.canvas.min() < 0.5
    assert sketch.canvas.max() == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": None}, "data.source=file needs data.root"),
        ({"letters": "ab", "vocabulary": "x"}, "two ways to name symbols"),
        ({"patch": 3}, "6 and 12 fit"),
        ({"patch": 8}, "is not two or more tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapter(tmp_path, **changes)


def test_the_embedded_texts_share_no_module_and_no_beginning() -> None:
    found = stdlib_documents()
    modules = [{each.name.split(" of ")[1].split(".")[0] for each in found[split]} for split in ("train", "test")]
    assert not modules[0] & modules[1]
    assert len(modules[0]) > 20
    assert len(modules[1]) > 10
    begin = [each.text[:48] for split in found.values() for each in split]
    assert len(begin) == len(set(begin))
    assert all(text.isascii() for text in begin)
    assert {each.label for each in found["test"]} == {"code", "docstring"}
