"""Presets for text and other sequences of symbols."""

from __future__ import annotations

from modalities.text import Text
from nepa_core.runtime.config import override
from recipes.configs import PretrainConfig
from recipes.presets import small

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
"""Line break and the printable characters of ASCII."""


def demo() -> PretrainConfig:
    """Code and docstrings of Python's own library, in tokens of 2 characters: nothing is downloaded.

    `nepa pretrain recipes.text:demo`. 22,772 windows of 24 tokens to train, 4,410 of other modules held out, code or
    docstring as the class. 70 s of one core. Measured (seed 0): next token identified among 64 21 %, by a linear
    autoregression 11 %, by 5-gram counts 40 %; 82 % is all that can be, for many candidates are the same token.
    """
    data = Text(source="stdlib", letters=PRINTABLE, patch=2, window=48, ends="drop")
    return override(small(data), {"verdict.test_samples": 1024})


def folder() -> PretrainConfig:
    """Texts of your own, in tokens of 4 bytes: a folder of files (class folders are labels), or a table.

    `nepa pretrain recipes.text:folder data.root=DIR`, or FILE.csv, .jsonl or .parquet with a column of text, or one
    long text. `data.letters=abc...` or `data.vocabulary=FILE` make smaller tokens than bytes do.
    """
    return small(Text(source="file", root="DIR", patch=4, window=128))


def fasta() -> PretrainConfig:
    """Sequences of nucleotides (or of other letters: `data.letters=`), in tokens of 3.

    `nepa pretrain recipes.text:fasta data.root=FILE.fasta`, or a folder whose class folders hold FASTA files. A tenth
    of the records is held out: put relatives into one split by train.fasta and test.fasta.
    """
    return small(Text(source="file", root="FILE.fasta", letters="ACGT", patch=3, window=192))
