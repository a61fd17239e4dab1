"""Commands about recipes and their runs: `run`, `plan`, `summarise` and `recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from dpmmd.cli.console import Device, Json, Quiet, RecipeName, print_json, print_table, say
from dpmmd.cli.evaluation import print_figures


def run(
    recipe: RecipeName,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder. Default: runs/RECIPE.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Instead of the recipe's; inf adds no noise and is NOT PRIVATE."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="SECTION.KEY=VALUE instead of the recipe's, e.g. release.moments=[1,2]; may be "
            "repeated.",
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do all of a recipe: release, train, sample, evaluate. Run again to resume.

    A finished release is re-used, never made again: that would cost privacy a second time.
    """
    from dpmmd import run as runs
    from dpmmd.files import expanded

    folder = Path("runs") / Path(recipe).stem if out is None else expanded(out)
    set_anew = list(changes or ())
    if epsilon is not None:
        set_anew.append(f"release.epsilon={epsilon}")
    report = runs.run(
        recipe,
        folder,
        say=(lambda line: None) if quiet else say,
        changes=set_anew,
        device=device,
        progress=not quiet,
    )
    if as_json:
        print_json({"out": str(folder), **report})
        return
    print_figures(report)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    peak = report["peak_rss_bytes"]
    say(f"{seconds}; peak memory {'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'}")
    if not report["private"]:
        say("NOT PRIVATE: the release was made with test noise, or none")
    for name, what in (
        (runs.MOMENTS, "the first release: moments of pixels, to which its modes were fitted"),
        ("release.safetensors", "the release: all that was learned from the private images"),
        ("privacy.json", "what it promises (`dpmmd privacy` prints it)"),
        ("checkpoints/last.pt", "the generator"),
        ("samples.png", "a picture of samples, one row a class"),
        ("synthetic.npz", "the synthetic set"),
        ("README.md", "the set's card, with its privacy statement"),
        ("report.json", "accuracies, metrics, seconds, memory"),
    ):
        if name != runs.MOMENTS or (folder / name).exists():
            say(f"  {folder / name}: {what}")


def plan(
    recipe: RecipeName,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Budget: 8GiB, 500MB, or 0.8 of what is free. Default: that of the recipe."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How training of a recipe would fit into a memory budget: predicted peak and time of a step.

    Measures a few small batches of random images on the device. Reads no data and no release.
    """
    from dpmmd import recipe as recipes
    from dpmmd.devices import choose_device
    from dpmmd.train import ahead

    where = choose_device(device)
    settings, _ = recipes.read(recipe)
    memory = memory or settings.train.memory
    if memory is None:
        raise ValueError(
            "--memory: the recipe has no [train] memory; give a budget such as --memory 8GiB."
        )
    found = ahead.of_recipe(settings, memory, where)
    if as_json:
        print_json(found.facts())
        return
    print_table(found.rows())


def summarise(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, e.g. of several seeds.")],
    as_json: Json = False,
) -> None:
    """Mean, standard deviation and n of the figures of several runs with the same privacy.

    Example: `dpmmd summarise runs/a runs/b runs/c`
    """
    from dpmmd import run as runs

    result = runs.summarise(folders)
    if as_json:
        print_json(result)
        return
    rows = [
        (name, f"{f['mean']:.4g}", "" if f["sd"] is None else f"{f['sd']:.4g}", str(f["n"]))
        for name, f in result["figures"].items()
    ]
    print_table(rows, "figure", "mean", "sd", "n", title=f"{len(folders)} runs")
    say(runs.EVALUATION_NOTE)


def recipes(as_json: Json = False) -> None:
    """List the recipes that come with dpmmd."""
    from dpmmd import recipe as module

    found = {name: module.read(name)[0].description.strip() for name in module.names()}
    if as_json:
        print_json(found)
        return
    print_table(found.items(), "recipe", "what it does")
