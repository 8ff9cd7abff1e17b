"""`python -m recipes` and `torchrun -m recipes` are the `nepa` command."""

from recipes.cli import leave, main

if __name__ == "__main__":
    leave(main())
