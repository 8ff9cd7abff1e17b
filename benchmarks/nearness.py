"""How near tokens are, for docs/results/what-pays.md: `python -m benchmarks.nearness RECIPE [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.parser import Parser
from nepa_core.basics import UserError
from nepa_core.runtime.config import parse_assignments
from nepa_core.runtime.data import plain_batches
from nepa_core.tokens import Tokens
from recipes.comparison.engine import read_recipe

SAMPLES = 1000


def nearness(batches: Sequence[Tokens]) -> float:
    """The lag-one autocorrelation of raw tokens, in the order in which they are read.

    Each number of a token less its mean over all real tokens; the mean product of two real tokens that follow each
    other, over the mean square. 0 where the next has nothing to do with this one, 1 where it is the same.
    """
    mean = torch.cat([tokens.values[tokens.real].double() for tokens in batches]).mean(0)
    products, squares = zip(*(_products(tokens, mean) for tokens in batches), strict=True)
    return float(torch.cat(products).mean() / torch.cat(squares).mean())


def _products(tokens: Tokens, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pair of successive real tokens, and of every real token with itself; means over their numbers."""
    values, real = tokens.values.double() - mean, tokens.real
    pairs = real[:, 1:] & real[:, :-1]
    return (values[:, 1:] * values[:, :-1]).mean(-1)[pairs], values.square().mean(-1)[real]


def main(words: Sequence[str]) -> int:
    """Print the nearness of a recipe's training samples; 2 where the recipe is refused."""
    parser = Parser("python -m benchmarks.nearness", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    known = parser.parse_args(words)
    try:
        config = read_recipe("objectives", known.recipe, parse_assignments(known.changes))
        data = config.data.plain()
        batches = plain_batches(
            data.samples_of("train"),
            batch=100,
            device=torch.device("cpu"),
            limit=SAMPLES,
            seed=0,
            tokenize=data.tokenize,
        )
        print(f"{nearness([data.read(batch) for batch in batches]):.3f}")
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
