"""What the commands share: the app, the types of their options, what they print, how they end.

Results go to standard output, progress and messages to standard error. This module is imported
for ``dpmmd --help``: whatever is slow to import is imported where it is used.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from dpmmd._version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise SystemExit(130) from None


app = typer.Typer(
    name="dpmmd",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Differentially private image generation with pre-trained perceptual features.\n\n"
        "Private images are read once, by `release`. It writes a small noised file with a stated "
        "(epsilon, delta); `train` and `sample` see that file alone, for any number of steps, at "
        "no further privacy cost.\n\n"
        "**Start here:** `dpmmd run fashion-demo --out runs/demo`, then "
        "`dpmmd privacy runs/demo/release.safetensors`."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpmmd {__version__}")
        raise typer.Exit


@app.callback()
def _before_a_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    from dpmmd._memory import keep_freed_memory

    keep_freed_memory()


class Adjacency(str, Enum):
    """What may differ between two data sets that must look alike."""

    replace_one = "replace-one"
    zero_out = "zero-out"
    add_remove = "add-remove"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and messages.")]
Force = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if PyTorch sees one), cpu, cuda, cuda:1, ...")
]
EncoderSize = Annotated[int, typer.Option(help="Side of the images the encoder sees.")]
EncoderWeights = Annotated[str | None, typer.Option(help="The encoder's weight file.")]
Moments = Annotated[str, typer.Option(help="1, 2 or 1,2: means, squares, or both.")]
BoundKind = Annotated[str, typer.Option(help="sphere, ball, sphere-per-tap, ball-per-tap.")]
RecipeName = Annotated[str, typer.Argument(help="A recipe's name (`dpmmd recipes`) or .toml file.")]
ReleaseFile = Annotated[Path, typer.Argument(help="Release file.")]

# How a source of images is read: the keywords of `dpmmd.data.open_source`.
Split = Annotated[str, typer.Option(help="Split of a named data set.")]
ImageSize = Annotated[int | None, typer.Option(help="Side to bring images to.")]
Channels = Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")]
Crop = Annotated[str | None, typer.Option(help="'center': crop instead of stretch.")]
Background = Annotated[
    str | None,
    typer.Option(help="Colour behind transparent images, e.g. black or #808080. Default: white."),
]
ImageKey = Annotated[
    str | None,
    typer.Option(
        help="Array, column or extension (in .tar) of the images, if not found by itself."
    ),
]
LabelKey = Annotated[
    str | None,
    typer.Option(help="Array, column or key of the labels, if not found by itself."),
]


def moments_of(text: str) -> tuple[int, ...]:
    """The value of --moments."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--moments {text!r}: expected 1, 2 or 1,2.") from None


def console() -> Console:
    """Takes texts as they are: no markup, as names may come from anybody's files."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), markup=False, emoji=False)


def say(text: str) -> None:
    """A message for people, on standard error."""
    from dpmmd.privacy.printed import plain

    typer.echo("\n".join(plain(line, None) for line in text.split("\n")), err=True)


def print_json(value: dict[str, Any]) -> None:
    """The result of ``--json``: one line on standard output."""
    typer.echo(json.dumps(value))


def print_table(
    rows: Iterable[Iterable[str | Text]], *heads: str, title: str | None = None
) -> None:
    """A table on standard output, with or without a line of heads."""
    from rich.table import Table

    table = Table(*heads, title=title, show_header=bool(heads))
    for row in rows:
        table.add_row(*row)
    console().print(table)


def main() -> None:
    """Entry point: 0 done, 2 wrong use or refused input, 130 interrupted."""
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    code = 0
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        say(f"error: {error}")
        if getattr(error, "release", None) is not None and getattr(error, "saved", None) is None:
            say(
                "lost: the release itself, with this process. Its epsilon and delta stay spent. "
                "Make room on the disk before you release again, which spends them once more."
            )
        code = 2
    if "dpmmd.distributed" in sys.modules:
        sys.modules["dpmmd.distributed"].leave(code)
    sys.exit(code)
