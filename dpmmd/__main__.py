"""`python -m dpmmd`, which `torchrun -m dpmmd` needs: the command line."""

from dpmmd.cli import main

if __name__ == "__main__":
    main()
