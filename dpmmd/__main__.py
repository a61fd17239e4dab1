"""``python -m dpmmd``: the command line, e.g. under torchrun."""

from dpmmd.cli import main

main()
