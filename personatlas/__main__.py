"""`python -m personatlas` and `torchrun -m personatlas`: the command line."""

from personatlas.cli.app import main

if __name__ == "__main__":
    main()
