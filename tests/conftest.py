"""What all tests share: one thread, the tiny recipe, and a disk that is full. The tiny data is in tests/tiny.py."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from recipes.pretrain import PretrainConfig
from tests import tiny

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # several processes share few cores; and sums then come out the same everywhere


@pytest.fixture
def tiny_recipe() -> PretrainConfig:
    return tiny.recipe()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
