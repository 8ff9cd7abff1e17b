"""`python -m recipes` and `torchrun -m recipes` are the `nepa` command."""

import sys

from recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
