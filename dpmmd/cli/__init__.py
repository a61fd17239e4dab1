"""The command line: one file for each group of commands, in the order of ``dpmmd --help``."""

from dpmmd.cli import audit, evaluation, privacy, release, running, training
from dpmmd.cli.console import app, main

__all__ = ["app", "main"]

for _command in (
    *(release.release, release.inspect),
    *(training.train, training.sample, evaluation.evaluate),
    *(running.run, running.plan, running.summarise, running.recipes),
    *(privacy.calibrate, privacy.privacy, audit.audit),
):
    app.command()(_command)
