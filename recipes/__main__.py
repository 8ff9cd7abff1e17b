"""`python -m recipes` and `torchrun -m recipes` are the `nepa` command."""

from nepa_core.runtime.distributed import leave
from recipes.cli import main

if __name__ == "__main__":
    leave(main())
