"""Windows of documents as samples: numbers of symbols, in memory.

Shapes: W windows, L symbols in a window, k symbols in a token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modalities.data.documents import Document, read_documents, read_files
from modalities.data.listing import IN_PLACE, Contents, printable, say
from modalities.data.stdlib_text import stdlib_documents
from modalities.data.vocabulary import open_vocabulary
from nepa_core.basics import Batch, UnreadableSample, UserError, number_of, some
from nepa_core.tokens import Spans

SourceName = Literal["stdlib", "file"]
Ends = Literal["pad", "drop"]
_FEW = 20  # documents below which intervals are made from stretches of them
_STRETCH = 16  # windows in a stretch
_LONGEST = 8192  # numbers in a token


class Form(NamedTuple):
    """Where documents come from and how they are cut; the settings of `modalities.text.Text`."""

    source: SourceName
    root: str | None
    held_out: float
    text: str | None
    label: str | None
    letters: str | None
    vocabulary: str | None
    patch: int
    window: int
    ends: Ends


class TextWindows(Dataset[Batch]):
    """Windows: "symbols" int64 [L], zeros behind the end, and "label" where documents have one.

    Where not all windows are full, "tokens" says how many of each are real.

    Args:
        flat: symbols of all documents, one behind the other. first, tokens, document: [W], where each window begins,
            how many tokens it has, and the document it is from. starts: of each document in `flat`.
        names: of documents. labels: [W] or None.
        broken: document -> why it can't be read.
    """

    def __init__(
        self,
        form: Form,
        flat: np.ndarray[Any, Any],
        windows: tuple[Tensor, Tensor, Tensor],
        starts: Tensor,
        names: Sequence[str],
        labels: Tensor | None,
        broken: dict[int, str],
    ) -> None:
        self.form, self.starts, self.names, self.labels, self.broken = form, starts, names, labels, broken
        self.first, self.tokens, self.document = windows
        self.full = bool((self.tokens == form.window // form.patch).all())
        self.flat = torch.from_numpy(np.concatenate((flat, np.zeros(form.window, np.int16))))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """A whole batch at once."""
        rows, places = torch.as_tensor(indices), torch.arange(self.form.window)
        if self.broken and (bad := [self.broken[at] for at in self.document[rows].tolist() if at in self.broken]):
            raise UnreadableSample(bad[0])
        real = places < (self.tokens[rows] * self.form.patch)[:, None]
        found = {"symbols": self.flat[self.first[rows, None] + places].long() * real}
        if not self.full:
            found["tokens"] = self.tokens[rows]
        return found if self.labels is None else found | {"label": self.labels[rows]}

    def name(self, index: int) -> str:
        """The document, and where in it the window begins."""
        document = int(self.document[index])
        place = int(self.first[index] - self.starts[document])
        return printable(self.names[document]) + (f", from symbol {place}" if place else "")

    def spans(self) -> Spans:
        """Windows of one document depend on each other; of few long ones, those of a stretch."""
        few = len(self.names) < _FEW
        stretch = (self.first - self.starts[self.document]) // (self.form.window * _STRETCH)
        each = torch.stack((self.document, stretch if few else torch.zeros_like(stretch)), 1)
        cluster = each.unique(dim=0, return_inverse=True)[1]
        return Spans(cluster, self.document, self.first, self.first + self.form.window, chained=few)

    def fingerprint(self) -> str:
        """Changes where any symbol, cut or label does."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.flat, self.first, self.tokens, *(() if self.labels is None else (self.labels,))):
            digest.update(part.numpy().tobytes())
        return f"{len(self)} windows, {len(self.names)} documents, {digest.hexdigest()}"

    def contents(self) -> Contents:
        """The symbols of every window."""

        def read(index: int) -> bytes:
            first = int(self.first[index])
            return self.flat[first : first + int(self.tokens[index]) * self.form.patch].numpy().tobytes()

        return Contents(2 * self.form.patch * self.tokens.numpy(), read, self.name, IN_PLACE)


@lru_cache(maxsize=4)
def open_windows(form: Form, split: str) -> TextWindows:
    """The windows of a split.

    Raises:
        UserError: of `read_documents` and `open_vocabulary`; a token is too wide; or no document has two tokens.
    """
    documents = _documents(form)[split]
    where = form.root or form.source
    return _cut(form, documents, classes_of(form), f"{where}, {'training' if split == 'train' else 'held-out'} split")


def open_text_files(form: Form, paths: Sequence[str]) -> TextWindows:
    """The first window of each file by name, without labels."""
    documents, broken = list[Document](), dict[int, str]()
    for place, (path, found) in enumerate(zip(paths, read_files(paths), strict=True)):
        if isinstance(found, str):
            broken[place] = found
        documents.append(Document(path, "") if isinstance(found, str) else found._replace(name=path))
    return _cut(form, documents, None, "files", broken)


def classes_of(form: Form) -> tuple[str, ...] | None:
    """The classes of training documents by their names; None where they have none."""
    names = sorted({each.label for each in _documents(form)["train"]})
    return None if names == [""] else tuple(names)


def _documents(form: Form) -> dict[str, tuple[Document, ...]]:
    if form.source == "stdlib":
        return stdlib_documents()
    assert form.root is not None
    return read_documents(form.root, form.held_out, form.text, form.label)


def _cut(
    form: Form,
    documents: Sequence[Document],
    classes: tuple[str, ...] | None,
    where: str,
    broken: dict[int, str] | None = None,
) -> TextWindows:
    """Documents one behind the other; with `broken`, the first window of each, else all."""
    vocabulary, patch = open_vocabulary(form.letters, form.vocabulary), form.patch
    if vocabulary.size * patch > _LONGEST:
        raise UserError(
            f"data.patch={patch} symbols of {vocabulary.size:,} kinds make tokens of more than {_LONGEST:,} numbers; "
            "give fewer symbols a token, or a smaller vocabulary"
        )
    parts, other = list[np.ndarray[Any, Any]](), Counter[str]()
    rows, starts, short, total = list[tuple[int, int, int]](), list[int](), list[str](), 0
    whole = form.window // patch
    least = whole if form.ends == "drop" and broken is None else 2  # tokens of a window
    for number, each in enumerate(documents):
        symbols, unknown = vocabulary.encode(each.text)
        other.update(unknown)
        starts.append(total)
        tokens = len(symbols) // patch
        if broken is not None:
            if tokens < least:
                broken.setdefault(number, f"{printable(each.name)}: fewer than two tokens of {patch} symbols")
            tokens = max(min(tokens, whole), least)
        elif tokens < least:
            short.append(each.name)
        rows += [(total + at * patch, min(whole, tokens - at), number) for at in range(0, tokens - least + 1, whole)]
        parts.append(symbols)
        total += len(symbols)
    if short:
        what = f"a window of {form.window}" if least == whole else f"two tokens of {patch}"
        few = f"{len(short):,} of {len(documents):,} documents ({some(list(map(printable, short)), 2)})"
        say(f"{where}: left out, for they have less than {what} symbols: {few}")
    if other:
        kinds = ", ".join(f"{printable(each)!r}" for each, _ in other.most_common(6))
        count, of = number_of(other.total(), "character"), number_of(len(other), "kind")
        say(
            f"{where}: {count} of {of} without a symbol, read as one more: "
            f"{kinds}{' and others' if len(other) > 6 else ''}"
        )
    if not rows:
        raise UserError(
            f"{where}: no document has {least} tokens of {patch} symbols; make data.window or data.patch smaller"
        )
    first, tokens_of, document = torch.tensor(rows).unbind(1)
    column = {name: place for place, name in enumerate(classes or ())}
    labels = None if classes is None else torch.tensor([column[documents[at].label] for at in document.tolist()])
    names = [each.name for each in documents]
    return TextWindows(
        form, np.concatenate(parts), (first, tokens_of, document), torch.tensor(starts), names, labels, broken or {}
    )
