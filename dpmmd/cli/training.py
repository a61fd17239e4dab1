"""Commands that see a release alone: `train` and `sample`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpmmd.cli.console import (
    Device,
    EncoderWeights,
    Force,
    Json,
    Quiet,
    ReleaseFile,
    print_json,
    say,
)

if TYPE_CHECKING:
    from dpmmd.recipe import Recipe

_USED = ("train.", "generator.", "encoder.weights")  # of a recipe, by `train`


def train(
    release: ReleaseFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; resumed if it has one.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe (name or .toml) whose [encoder] weights, [generator] and [train] sections "
            "are used."
        ),
    ] = "fashion-demo",
    steps: Annotated[int | None, typer.Option(help="Steps, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and latent points.")] = None,
    weights: EncoderWeights = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="SECTION.KEY=VALUE instead of the recipe's, e.g. train.memory=8GiB; may be "
            "repeated.",
        ),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Resume what another number of processes has begun."),
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a generator on a release. Costs no privacy. Ctrl-C keeps a checkpoint.

    Over several processes: `torchrun --nproc-per-node 2 -m dpmmd train RELEASE --out run/`.
    """
    import dpmmd
    from dpmmd import precision
    from dpmmd import recipe as recipes
    from dpmmd import train as training
    from dpmmd.devices import choose_device
    from dpmmd.distributed import join

    where = choose_device(device)
    settings = _settings(recipe, changes or ())
    group = join()
    first = group is None or group.rank() == 0
    released = dpmmd.Release.load(release)
    given = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    chosen = recipes.revised(settings.train, given)
    encoder = dpmmd.encoders.from_spec(
        released.metadata.features_of, weights=weights or settings.encoder.weights
    ).to(where)
    recorded = released.metadata.selection_encoder
    selection = None if recorded is None else dpmmd.encoders.from_spec(recorded).to(where)
    computed = precision.of_generator(chosen.precision, where)
    if first and not quiet:
        say(precision.told(encoder.precision, computed, where, released=True))
    checkpoint = out / "checkpoints" / training.CHECKPOINT
    if checkpoint.exists() and first and not quiet:
        say(f"resumes at step {training.load_checkpoint(checkpoint)['step']} of {chosen.steps}")
    trained = training.train(
        released,
        encoder,
        settings=chosen,
        generator_settings=settings.generator,
        selection_encoder=selection,
        out=out,
        process_group=group,
        elastic=elastic,
        progress=not quiet,
    )
    if not first:
        return
    result = {
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "selected_step": trained.selected_step,
        "seconds": round(trained.seconds, 2),
        "private": trained.private,
    }
    if as_json:
        print_json(result)
    else:
        say(f"trained {trained.step} steps: {checkpoint}")


def _settings(recipe: str, changes: Sequence[str]) -> "Recipe":
    """The recipe with some of its keys set anew, which must be some that training uses."""
    from dpmmd import recipe as recipes

    settings, text = recipes.read(recipe)
    for change in changes:
        if not change.strip().startswith(_USED):
            raise ValueError(
                f"--set {change}: training uses the sections train and generator and "
                "encoder.weights of a recipe, and nothing else; e.g. --set train.memory=8GiB."
            )
    return recipes.with_changes(text, changes, recipe)[0] if changes else settings


def sample(
    checkpoint: Annotated[Path, typer.Argument(help="Run folder or checkpoint file.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Synthetic set to write: *.npz, *.parquet, or a folder of PNGs."
        ),
    ],
    num_images: Annotated[int, typer.Option(help="How many; costs no privacy.")] = 60_000,
    temperature: Annotated[
        float,
        typer.Option(help="Of the latent points: above 1 images are more varied, less typical."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the latent points.")] = 0,
    format: Annotated[
        str | None,
        typer.Option(
            help="npz (x uint8), npz-float (x float32 in [0, 1]), folder or parquet. Default: by "
            "the name of --out."
        ),
    ] = None,
    release: Annotated[
        Path | None,
        typer.Option(
            help="The release it was trained on, for the card. Default: that of the run folder."
        ),
    ] = None,
    modes: Annotated[
        bool,
        typer.Option(
            "--modes", help="Also write of which mode of its class each image is: .npz, .parquet."
        ),
    ] = False,
    device: Device = "auto",
    overwrite: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw a synthetic set; beside it a picture of samples and a card with its privacy statement.

    An .npz has x uint8 [n, C, H, W] and y; a folder has a folder of PNGs for each class.
    """
    from dpmmd import export
    from dpmmd import recipe as recipes
    from dpmmd import run as runs
    from dpmmd import train as training
    from dpmmd.devices import choose_device
    from dpmmd.files import expanded, refuse_unwritable

    out, checkpoint = expanded(out), expanded(checkpoint)
    chosen = export.format_of(out, format)
    if modes:
        export.check_modes(chosen)
    if num_images < 1:
        raise ValueError(f"--num-images {num_images}: expected at least 1.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature {temperature}: expected a number > 0; training has 1.")
    picture, card = out.with_suffix(".png"), out.with_suffix(".md")
    for path in (out, picture, card):
        refuse_unwritable(path, overwrite=overwrite)
    where = choose_device(device)
    trained = training.load_generator(checkpoint)
    origin = runs.releases_of(checkpoint, release)
    if modes and trained.modes is None:
        raise ValueError(
            f"--modes: {checkpoint} was trained on a release without modes; leave it out, or make "
            "one with a recipe that has [modes]."
        )
    trained.generator.to(where)
    runs.write_samples(
        trained,
        out,
        recipes.SampleSection(
            num_images=num_images, temperature=temperature, seed=seed, modes=modes
        ),
        picture=picture,
        card=card,
        release=None if origin is None else origin.release,
        moments=None if origin is None else origin.moments,
        format=chosen,
        overwrite=overwrite,
        progress=not quiet,
    )
    if as_json:
        print_json(
            {
                "out": str(out),
                "picture": str(picture),
                "card": None if origin is None else str(card),
                "format": chosen,
                "num_images": num_images,
                "classes": None if trained.class_names is None else list(trained.class_names),
                "private": trained.private,
            }
        )
    elif origin is None:
        say(
            f"wrote {out} and {picture}; no card, and not aligned with moments of pixels that its "
            "release may hold: give the release with --release"
        )
    elif origin.unaligned:
        say(
            f"wrote {out}, {picture} and {card}; not aligned, since {runs.MOMENTS}, to which the "
            "modes were fitted, does not lie beside the release"
        )
    else:
        say(f"wrote {out}, {picture} and {card}")
