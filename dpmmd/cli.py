"""The command line. Results go to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
import math
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from dpmmd._memory import keep_freed_memory

if TYPE_CHECKING:
    from dpmmd.privacy import SourceAudit


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted; run the same command again to go on")
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


class Adjacency(str, Enum):
    """What may differ between two data sets that must look alike."""

    replace_one = "replace-one"
    zero_out = "zero-out"
    add_remove = "add-remove"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and messages.")]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if PyTorch sees one), cpu, cuda, cuda:1, ...")
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
Background = Annotated[
    str | None,
    typer.Option(help="Colour behind transparent images, e.g. black or #808080. Default: white."),
]
Force = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


@app.command()
def release(
    source: Annotated[
        str,
        typer.Argument(
            help="Private images: a .npz file (x, y), a folder of images (labels from sub-folders),"
            " parquet or WebDataset shards (.parquet, .tar, a folder of them, s3://...), or a data "
            "set's name such as fashion-mnist or cifar10."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, *.safetensors.")],
    epsilon: Annotated[float, typer.Option(help="Privacy loss, e.g. 1.0.")],
    delta: Annotated[float, typer.Option(help="Failure probability, below 1 / N.")],
    adjacency: Annotated[
        Adjacency,
        typer.Option(
            help="Which data sets must look alike: one image exchanged (N is public), left out "
            "(N is public), or added / removed (N is private)."
        ),
    ],
    num_classes: Annotated[
        int | None, typer.Option(help="Classes, for a labelled release. Default: unlabelled.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="squeezenet1.1, efficientnet-lite0, vgg11 to 19, resnet18 to 50.")
    ] = "squeezenet1.1",
    encoder_size: Annotated[int, typer.Option(help="Side of the images the encoder sees.")] = 32,
    weights: Annotated[
        str | None, typer.Option(help="The encoder's weight file, if not found by itself.")
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help="A second encoder, for a block by which `train` picks its best checkpoint without "
            "looking at private data again."
        ),
    ] = None,
    moments: Annotated[str, typer.Option(help="1, 2 or 1,2: means, squares, or both.")] = "1",
    bound: Annotated[str, typer.Option(help="sphere, ball, sphere-per-tap, ball-per-tap.")] = (
        "sphere"
    ),
    clip: Annotated[float, typer.Option(help="Norm of the bound (matters for balls).")] = 1.0,
    shared_taps: Annotated[
        int,
        typer.Option(help="Sum the encoder's first so many taps over all classes, not by class."),
    ] = 0,
    pixel_moments: Annotated[
        int | None,
        typer.Option(
            help="Also release means and products of pixels, of the images brought to this side: "
            "`sample` aligns generated images with them."
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Protect all images of a group (a person) together: the array or column that "
            "says which belong together, or 'folder' for CLASS/GROUP/*.png."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a named data set.")] = "train",
    image_size: Annotated[
        int | None, typer.Option(help="Side to bring images to; needed if sizes differ.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    crop: Annotated[str | None, typer.Option(help="'center': crop instead of stretch.")] = None,
    background: Background = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images a step; no effect on the result. Default: what fits into memory."
        ),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="File that remembers what was spent, of whatever source; made if absent. A "
            "release that is interrupted stays counted."
        ),
    ] = None,
    population: Annotated[
        str | None,
        typer.Option(
            help="Declares that nobody in this source has data in another population of the "
            "ledger: only this one's releases, and those without a name, count. Default: all count."
        ),
    ] = None,
    budget_epsilon: Annotated[
        float | None,
        typer.Option(help="Refuse if all releases in the ledger would pass this epsilon ..."),
    ] = None,
    budget_delta: Annotated[float | None, typer.Option(help="... at this delta.")] = None,
    partial_sums: Annotated[
        Path | None,
        typer.Option(
            help="Folder for raw (NOT private) sums, so that the same command goes on after an "
            "interruption; only you can read it, and it is deleted at the end."
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Release the noised embedding of private images: the only step that costs privacy.

    `torchrun --nproc-per-node 4 -m dpmmd release ...` makes one release by four processes.

    Example: `dpmmd release scans/ --out scans.safetensors --epsilon 1 --delta 1e-6 --adjacency
    replace-one --num-classes 2 --image-size 64 --encoder-size 64`
    """
    import dpmmd
    from dpmmd.devices import choose_device
    from dpmmd.distributed import join
    from dpmmd.files import expanded, refuse_existing
    from dpmmd.privacy import Ledger
    from dpmmd.privacy.report import facts

    out = expanded(out)
    refuse_existing(out)
    where = choose_device(device)
    if (budget_epsilon is None) != (budget_delta is None):
        raise ValueError("--budget-epsilon and --budget-delta: give both of them, or neither.")
    budget = None
    if budget_epsilon is not None and budget_delta is not None:
        budget = (budget_epsilon, budget_delta)
    group = join()
    rank = 0 if group is None else group.rank()
    if rank:
        warnings.simplefilter("ignore")  # the first process says it
    loaded = dpmmd.encoders.load(encoder, image_size=encoder_size, weights=weights).to(where)
    released = dpmmd.release(
        source,
        loaded,
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency.value,
        num_classes=num_classes,
        moments=_moments(moments),
        bound=bound,
        clip=clip,
        shared_taps=shared_taps,
        pixel_moments=pixel_moments,
        selection=None
        if selection is None
        else dpmmd.encoders.load(selection, image_size=encoder_size).to(where),
        batch_size=batch_size,
        out=out,
        ledger=ledger,
        budget=budget,
        population=population,
        partial_sums=partial_sums,
        progress=not quiet,
        process_group=group,
        group_by=group_by,
        split=split,
        image_size=image_size,
        channels=channels,
        crop=crop,
        background=background,
        image_key=image_key,
        label_key=label_key,
    )
    if rank:
        return
    told = facts(released, None if ledger is None else Ledger(ledger))
    if as_json:
        _print_json({"out": str(out), **told})
    else:
        _print_report(told)
        _say(f"wrote {out}")


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Private images, as for `dpmmd release`.")],
    everything: Annotated[
        bool,
        typer.Option("--all", help="Decode every image, and compare contents; not headers alone."),
    ] = False,
    num_classes: Annotated[int | None, typer.Option(help="Classes that you expect.")] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="The array, column or key of the groups, or 'folder', as for a release."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a named data set.")] = "train",
    image_size: Annotated[int | None, typer.Option(help="Side to bring images to.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    crop: Annotated[str | None, typer.Option(help="'center': crop instead of stretch.")] = None,
    background: Background = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what a source of private images holds, before anything is spent: for your eyes alone.

    What cannot be read and what is passed over, by reason; classes, sizes, formats, groups; and the
    options that a release needs. Reads headers; writes nothing, downloads nothing.

    Example: `dpmmd inspect scans/ --num-classes 2`
    """
    from dpmmd.data import inspect as inspection

    found = inspection.inspect(
        source,
        everything=everything,
        progress=not quiet,
        num_classes=num_classes,
        group_by=group_by,
        split=split,
        image_size=image_size,
        channels=channels,
        crop=crop,
        background=background,
        image_key=image_key,
        label_key=label_key,
    )
    if as_json:
        _print_json(found.facts())
        return
    console = _console()
    console.print(inspection.YOURS, markup=False, highlight=False)
    table = Table(show_header=False)
    for name, value in inspection.rows(found):
        table.add_row(Text(name), Text(value))
    console.print(table)
    console.print(f"{inspection.NEXT}\n{found.command}", markup=False, highlight=False)


@app.command()
def train(
    release: Annotated[Path, typer.Argument(help="Release file.")],
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
    weights: Annotated[str | None, typer.Option(help="The encoder's weight file.")] = None,
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
    from dpmmd import recipe as recipes
    from dpmmd import train as training
    from dpmmd.devices import choose_device
    from dpmmd.distributed import join

    where = choose_device(device)
    settings, _ = recipes.read(recipe)
    group = join()
    first = group is None or group.rank() == 0
    released = dpmmd.Release.load(release)
    given = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    chosen = recipes.revised(settings.train, given)
    encoder = dpmmd.encoders.from_spec(
        released.metadata.encoder, weights=weights or settings.encoder.weights
    ).to(where)
    recorded = released.metadata.selection_encoder
    selection = None if recorded is None else dpmmd.encoders.from_spec(recorded).to(where)
    checkpoint = out / "checkpoints" / training.CHECKPOINT
    if checkpoint.exists() and first and not quiet:
        _say(f"resumes at step {training.load_checkpoint(checkpoint)['step']} of {chosen.steps}")
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
        _print_json(result)
    else:
        _say(f"trained {trained.step} steps: {checkpoint}")


@app.command()
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
    if num_images < 1:
        raise ValueError(f"--num-images {num_images}: expected at least 1.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature {temperature}: expected a number > 0; training has 1.")
    picture, card = out.with_suffix(".png"), out.with_suffix(".md")
    for path in (out, picture, card):
        refuse_unwritable(path, overwrite=overwrite)
    where = choose_device(device)
    trained = training.load_generator(checkpoint)
    origin = runs.release_of(checkpoint, release)
    trained.generator.to(where)
    runs.write_samples(
        trained,
        out,
        recipes.SampleSection(num_images=num_images, temperature=temperature, seed=seed),
        picture=picture,
        card=card,
        release=origin,
        format=chosen,
        overwrite=overwrite,
        progress=not quiet,
    )
    if as_json:
        _print_json(
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
        _say(
            f"wrote {out} and {picture}; no card, and not aligned with moments of pixels that its "
            "release may hold: give the release with --release"
        )
    else:
        _say(f"wrote {out}, {picture} and {card}")


@app.command()
def evaluate(
    synthetic: Annotated[
        Path, typer.Argument(help="Synthetic set: *.npz, *.parquet, or a folder of images.")
    ],
    test: Annotated[str, typer.Option(help="Real test images: a path or a data set's name.")],
    num_classes: Annotated[
        int | None,
        typer.Option(
            help="Number of classes of the synthetic set; without it no classifiers are trained."
        ),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of the test images.")] = "test",
    real: Annotated[
        str | None, typer.Option(help="Real training images to compare with (split 'train').")
    ] = None,
    classifiers: Annotated[
        str,
        typer.Option(
            help="Comma-separated: cnn, wrn28_10, or of the suite of twelve: logistic_regression, "
            "random_forest, gaussian_nb, bernoulli_nb, linear_svm, decision_tree, lda, adaboost, "
            "mlp, bagging, gbm, xgboost."
        ),
    ] = "logistic_regression,mlp,cnn",
    num_train: Annotated[
        int | None, typer.Option(help="Training images of each set. Default: all.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side to bring real images to.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    crop: Annotated[str | None, typer.Option(help="'center': crop instead of stretch.")] = None,
    background: Background = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of the classifiers, comma-separated.")
    ] = "0",
    features: Annotated[
        str | None,
        typer.Option(
            help="Also FID, KID, precision, recall, density and coverage, on these features "
            "(comma-separated): inception-v3 or an encoder's name."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, weights of a feature extractor; may be repeated."),
    ] = None,
    num_compared: Annotated[
        int, typer.Option(help="At most so many images of each set for --features.")
    ] = 10_000,
    release: Annotated[
        Path | None,
        typer.Option(
            help="The set's release: --features then has one encoder that the generator was not "
            "trained against."
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train classifiers on a synthetic set, test them on real images; compare the images.

    Classes are matched by their names where both sets have names, else by number. It says how many
    images of each set it used, and refuses sets of which too much is missing.

    Reads real images: what it prints is NOT covered by the release's (epsilon, delta).
    """
    from dpmmd import recipe as recipes
    from dpmmd import run as runs
    from dpmmd.devices import choose_device
    from dpmmd.evaluate import check_classifiers

    if num_classes is None and features is None:
        raise ValueError("give --num-classes, to train classifiers, or --features, or both.")
    where = choose_device(device)
    options = {
        "image_size": image_size,
        "channels": channels,
        "crop": crop,
        "background": background,
    }
    settings = recipes.revised(
        recipes.EvaluateSection(),
        {
            "classifiers": _words(classifiers),
            "num_train": num_train,
            "seeds": _integers("--seeds", seeds),
        },
    )
    check_classifiers(settings.classifiers)
    compared = None
    against: tuple[str, ...] = ()
    if features is not None:
        pairs = [pair.partition("=") for pair in weights or ()]
        compared = recipes.revised(
            recipes.MetricsSection(),
            {
                "features": _words(features),
                "weights": {name: path for name, _, path in pairs},
                "num_images": num_compared,
            },
        )
        against = () if release is None else runs.encoders_of(release)
        extractors = runs.load_extractors(compared, against, image_size or 32, where)
    found = runs.read_sets(
        synthetic,
        test=(test, test_split),
        real=None if real is None or num_classes is None else (real, "train"),
        num_classes=num_classes,
        **options,
    )
    result: dict[str, Any] = {"accuracy": {}, "metrics": {}, **found.facts()}
    if not as_json:
        for line in found.lines():
            _say(line)
    if compared is not None:
        result["metrics"] = runs.compared(
            found,
            compared,
            extractors=extractors,
            test=(test, test_split),
            trained_against=against if release is not None else None,
            progress=not quiet,
        )
    if num_classes is not None:
        result["accuracy"] = runs.accuracies(found, settings, device=str(where), progress=not quiet)
    if as_json:
        _print_json({**result, "accuracy_note": runs.EVALUATION_NOTE})
    else:
        _print_figures(result)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`dpmmd recipes`) or .toml file.")],
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
        say=(lambda line: None) if quiet else _say,
        changes=set_anew,
        device=device,
        progress=not quiet,
    )
    if as_json:
        _print_json({"out": str(folder), **report})
        return
    _print_figures(report)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    peak = report["peak_rss_bytes"]
    _say(f"{seconds}; peak memory {'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'}")
    if not report["private"]:
        _say("NOT PRIVATE: the release was made with test noise, or none")
    for name, what in (
        ("release.safetensors", "the release: all that was learned from the private images"),
        ("privacy.json", "what it promises (`dpmmd privacy` prints it)"),
        ("checkpoints/last.pt", "the generator"),
        ("samples.png", "a picture of samples, one row a class"),
        ("synthetic.npz", "the synthetic set"),
        ("README.md", "the set's card, with its privacy statement"),
        ("report.json", "accuracies, metrics, seconds, memory"),
    ):
        _say(f"  {folder / name}: {what}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`dpmmd recipes`) or .toml file.")],
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
    from dpmmd import plan as planning
    from dpmmd import recipe as recipes
    from dpmmd.devices import choose_device

    where = choose_device(device)
    settings, _ = recipes.read(recipe)
    memory = memory or settings.train.memory
    if memory is None:
        raise ValueError(
            "--memory: the recipe has no [train] memory; give a budget such as --memory 8GiB."
        )
    found = planning.of_recipe(settings, memory, where)
    if as_json:
        _print_json(found.facts())
        return
    table = Table(show_header=False)
    for name, value in found.rows():
        table.add_row(name, value)
    _console().print(table)


@app.command()
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
        _print_json(result)
        return
    table = Table("figure", "mean", "sd", "n", title=f"{len(folders)} runs")
    for name, f in result["figures"].items():
        spread = "" if f["sd"] is None else f"{f['sd']:.4g}"
        table.add_row(name, f"{f['mean']:.4g}", spread, str(f["n"]))
    _console().print(table)
    _say(runs.EVALUATION_NOTE)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that come with dpmmd."""
    from dpmmd import recipe as module

    found = {name: module.read(name)[0].description.strip() for name in module.names()}
    if as_json:
        _print_json(found)
        return
    table = Table("recipe", "what it does")
    for name, description in found.items():
        table.add_row(name, description)
    _console().print(table)


@app.command()
def calibrate(
    epsilon: Annotated[float | None, typer.Option(help="Privacy loss.")] = None,
    delta: Annotated[float | None, typer.Option(help="Failure probability.")] = None,
    mu: Annotated[float | None, typer.Option(help="Gaussian-DP parameter, instead.")] = None,
    sd: Annotated[
        float | None, typer.Option(help="Noise sd over sensitivity, instead (1 / mu).")
    ] = None,
    adjacency: Annotated[
        Adjacency | None,
        typer.Option(help="Also print the noise for class sums of vectors of norm at most 1."),
    ] = None,
    as_json: Json = False,
) -> None:
    """(epsilon, delta) to noise, and back.

    Give two of: epsilon with delta (how much noise?), mu or sd with delta (what epsilon?), mu or sd
    with epsilon (what delta?). Example: `dpmmd calibrate --epsilon 1 --delta 1e-6`
    """
    from dpmmd import privacy
    from dpmmd.privacy import accounting
    from dpmmd.privacy.printed import up

    if mu is not None and sd is not None:
        raise ValueError("--mu and --sd: give one of them, each is the other's inverse.")
    if sd is not None:
        if not sd > 0:
            raise ValueError(f"--sd {sd}: expected a number > 0.")
        mu = accounting.UP / sd
    if sum(v is not None for v in (epsilon, delta, mu)) != 2:
        raise ValueError(
            "give exactly two of --epsilon, --delta and --mu (or --sd); "
            "e.g. `dpmmd calibrate --epsilon 1 --delta 1e-6`."
        )
    if mu is None:
        assert epsilon is not None
        assert delta is not None
        level = privacy.calibrate(epsilon=epsilon, delta=delta)
        mu, ratio = level.mu, level.sd_over_sensitivity
    else:
        ratio = sd or (accounting.UP / mu if mu else float("inf"))
        if epsilon is None:
            assert delta is not None
            epsilon = privacy.epsilon(mu=mu, delta=delta)
        else:
            delta = privacy.delta(mu=mu, epsilon=epsilon)
    result: dict[str, Any] = {
        "epsilon": epsilon,
        "delta": delta,
        "mu": mu,
        "sd_over_sensitivity": ratio,
    }
    if adjacency is not None:
        result["adjacency"] = adjacency.value
        for sign in ("signed", "nonnegative"):
            block = privacy.Block("sums", "sums", 1.0, nonnegative=sign == "nonnegative")
            result[f"sensitivity_{sign}"] = privacy.sensitivity(adjacency.value, [block])
            result[f"sd_{sign}"] = ratio * result[f"sensitivity_{sign}"] * accounting.UP
    if as_json:
        _print_json(result)
        return
    table = Table(show_header=False)
    for name, value in result.items():
        # more noise than is asked for is safe; mu is asked for or promised, so it stands exactly
        exact = isinstance(value, str) or name == "mu"
        table.add_row(name.replace("_", " "), str(value) if exact else up(value, 10))
    _console().print(table)


@app.command()
def privacy(
    release: Annotated[Path, typer.Argument(help="Release file.")],
    ledger: Annotated[
        Path | None,
        typer.Option(help="Also print the total over all releases in this ledger."),
    ] = None,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Print what a release promises, to whom, and what it does not cover."""
    import dpmmd
    from dpmmd.privacy import Ledger
    from dpmmd.privacy.report import facts, markdown

    released = dpmmd.Release.load(release)
    book = None if ledger is None else Ledger(ledger)
    if as_json:
        _print_json(facts(released, book))
    elif as_markdown:
        typer.echo(markdown(released, book), nl=False)
    else:
        _print_report(facts(released, book))


@app.command()
def audit(
    context: typer.Context,
    canaries: Annotated[int, typer.Option(help="Made-up images, one secret coin each.")] = 10_000,
    epsilon: Annotated[float, typer.Option(help="The claim.")] = 1.0,
    delta: Annotated[float, typer.Option(help="The claim's failure probability.")] = 1e-5,
    adjacency: Annotated[
        Adjacency, typer.Option(help="Which data sets must look alike.")
    ] = Adjacency.replace_one,
    copies: Annotated[
        int | None, typer.Option(help="Images a canary. Default: about 3 / mu.")
    ] = None,
    sign: Annotated[str, typer.Option(help="Features: signed or nonnegative.")] = "signed",
    moments: Annotated[str, typer.Option(help="1, 2 or 1,2: means, squares, or both.")] = "1",
    confidence: Annotated[
        float, typer.Option(help="Probability that a true claim is found consistent.")
    ] = 1 - 1e-6,
    source: Annotated[
        str | None,
        typer.Option(
            help="Check a pipeline of your own instead: private images as for `release`. Reads "
            "them; what is printed is for your eyes alone."
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="With --source, as all below, and as for `release`: the encoder.")
    ] = "squeezenet1.1",
    encoder_size: Annotated[int, typer.Option(help="Side of the images the encoder sees.")] = 32,
    weights: Annotated[str | None, typer.Option(help="The encoder's weight file.")] = None,
    records: Annotated[
        int | None,
        typer.Option(
            help="How many records are read, the first ones. Default: 256, or a quarter more than "
            "a batch."
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes; none: unlabelled.")] = None,
    bound: Annotated[str, typer.Option(help="sphere, ball, sphere-per-tap, ball-per-tap.")] = (
        "sphere"
    ),
    group_by: Annotated[
        str | None, typer.Option(help="What says which images belong together.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a named data set.")] = "train",
    image_size: Annotated[int | None, typer.Option(help="Side to bring images to.")] = None,
    channels: Annotated[int | None, typer.Option(help="1 (grey) or 3 (RGB).")] = None,
    crop: Annotated[str | None, typer.Option(help="'center': crop instead of stretch.")] = None,
    background: Background = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step. Default: that of the release.")
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attack the release with canaries: a lower bound of the epsilon it really has.

    Sends made-up images through the real release and tells, by secret coins, how well they can be
    found in it. Reads no private data. An audit can refute a claim, never prove it. Exit code 2 if
    the claim is refuted.

    With --source it checks your own data set and encoder instead: it exchanges and leaves out
    records, and refutes the claim if what another record contributes moves. It reads private
    records, draws no noise and spends nothing; what it prints is for your eyes alone.

    Example: `dpmmd audit --source scans/ --encoder squeezenet1.1 --encoder-size 64 --num-classes 2
    --image-size 64`
    """
    from dpmmd import privacy
    from dpmmd.privacy.printed import down, up

    given = {
        name
        for name in context.params
        if (how := context.get_parameter_source(name)) is not None and how.name == "COMMANDLINE"
    }
    if source is not None:
        _refuse(given & {"canaries", "epsilon", "delta", "copies", "sign", "confidence"}, "without")
        _audit_source(
            source,
            encoder,
            encoder_size,
            weights,
            device,
            quiet=quiet,
            as_json=as_json,
            adjacency=adjacency.value,
            num_classes=num_classes,
            records=records,
            moments=_moments(moments),
            bound=bound,
            batch_size=batch_size,
            group_by=group_by,
            split=split,
            image_size=image_size,
            channels=channels,
            crop=crop,
            background=background,
        )
        return
    canary = {"canaries", "epsilon", "delta", "adjacency", "copies", "sign", "moments"}
    _refuse(given - canary - {"confidence", "quiet", "as_json"}, "with")
    result = privacy.audit(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency.value,
        canaries=canaries,
        copies=copies,
        sign=sign,
        moments=_moments(moments),
        confidence=confidence,
        progress=not quiet,
    )
    if as_json:
        _print_json(result.facts())
    else:
        table = Table(show_header=False)
        for name, value in result.facts().items():
            if isinstance(value, tuple):
                value = ", ".join(map(str, value))
            elif isinstance(value, float):
                claimed = name in ("epsilon_claimed", "mu_claimed", "delta")
                value = (up if claimed else down)(value, 7)  # what was found is a lower bound
            table.add_row(name.replace("_", " "), str(value))
        _console().print(table)
    if result.verdict == "VIOLATED":
        _say(
            f"error: VIOLATED: epsilon is at least {down(result.epsilon_lower, 4)} at "
            f"delta={up(result.delta)}, claimed is {up(result.epsilon_claimed)}. Do not publish "
            "what this installation releases."
        )
        raise typer.Exit(2)
    if not quiet:
        _say("consistent with the claim: these canaries did not refute it, which does not prove it")


def _refuse(names: set[str], how: str) -> None:
    """Refuses options of the other kind of audit, by name."""
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise ValueError(
            f"{options}: makes sense {how} --source only. `dpmmd audit` attacks the release with "
            "made-up images; with --source it checks a data set and an encoder, and draws no noise."
        )


def _audit_source(
    source: str,
    encoder: str,
    encoder_size: int,
    weights: str | None,
    device: str,
    *,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    import dpmmd
    from dpmmd.devices import choose_device
    from dpmmd.privacy.pipeline import NOTICE

    where = choose_device(device)
    loaded = dpmmd.encoders.load(encoder, image_size=encoder_size, weights=weights).to(where)
    _say(NOTICE)
    result = dpmmd.privacy.audit_source(source, loaded, progress=not quiet, **options)
    if as_json:
        _print_json(result.facts())
    else:
        _print_checks(result)
    if result.verdict == "VIOLATED":
        _say(
            "error: VIOLATED: what a record contributes does not depend on that record alone, so "
            "that no epsilon holds. Do not release with this source and encoder."
        )
        raise typer.Exit(2)
    if not quiet:
        _say(
            f"consistent with the claim: no other record moved in these checks of {result.records} "
            "records, which does not prove that none ever does"
        )


def _print_checks(result: SourceAudit) -> None:
    console = _console()
    table = Table("check", "outcome", "x Delta", "at most", "others that moved", "of")
    causes: dict[str, list[str]] = {}
    for check in result.checks:
        moved = check.rows_moved if check.moved is None else check.moved
        numbers = (check.distance, check.limit)
        table.add_row(
            Text(check.name),
            check.outcome,
            *("" if number is None else f"{number:.4g}" for number in numbers),
            *("" if count is None else str(count) for count in (moved, check.compared)),
        )
        if check.why:
            causes.setdefault(check.why, []).append(check.name)
    console.print(table)
    for why, names in causes.items():
        console.print(Text(f"- {', '.join(names)}: {why}"))


def _moments(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--moments {text!r}: expected 1, 2 or 1,2.") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected whole numbers, e.g. 0,1,2.") from None


def _console() -> Console:
    """Takes texts as they are: no markup, as names may come from anybody's files."""
    return Console(soft_wrap=not sys.stdout.isatty(), markup=False, emoji=False)


def _say(text: str) -> None:
    from dpmmd.privacy.printed import plain

    typer.echo("\n".join(plain(line, None) for line in text.split("\n")), err=True)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value))


def _print_report(f: dict[str, Any]) -> None:
    from dpmmd.privacy import report
    from dpmmd.privacy.printed import plain

    console = _console()
    console.print(f["promise"], highlight=False)
    table = Table(show_header=False)
    for name, value in report.rows(f):
        table.add_row(name, value)
    console.print(table)
    console.print("Noise against signal:")
    for line in report.utility(f):
        console.print(f"- {line}", highlight=False)
    console.print("Not covered:")
    for line in f["not_covered"]:
        console.print(f"- {line}", highlight=False)
    console.print(f"Tests: {plain(f['tested'], 1000)}", highlight=False)
    for evidence in f["evidence"]:
        console.print(f"- {evidence['what']} ({evidence['test']})", highlight=False)
    if f["evidence"]:
        console.print("- on this machine: dpmmd audit --canaries 10000", highlight=False)


def _print_figures(report: dict[str, Any]) -> None:
    from dpmmd import run as runs

    if not report["accuracy"] and not report["metrics"]:
        return
    if report["accuracy"]:
        table = Table(
            "classifier", "trained on synthetic", "trained on real", title="Accuracy on real images"
        )
        for line in runs.accuracy_rows(report["accuracy"]):
            table.add_row(*line)
        _console().print(table)
    if report["metrics"]:
        heads, *rows = runs.metric_rows(report["metrics"])
        table = Table(*heads, title="Synthetic against real images")
        for row in rows:
            table.add_row(*row)
        _console().print(table)
        f = next(iter(report["metrics"].values()))
        libraries = ", ".join(f"{name} {number}" for name, number in f["libraries"].items())
        _say(
            f"{f['synthetic_images']} synthetic and {f['real_images']} real images "
            f"({f['real']}, {f['split']}); {libraries}"
        )
    _say(runs.EVALUATION_NOTE)


def main() -> None:
    """Entry point: 0 done, 2 wrong use or refused input, 130 interrupted."""
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    keep_freed_memory()
    code = 0
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        _say(f"error: {error}")
        if getattr(error, "release", None) is not None and getattr(error, "saved", None) is None:
            _say(
                "lost: the release itself, with this process. Its epsilon and delta stay spent. "
                "Make room on the disk before you release again, which spends them once more."
            )
        code = 2
    if "dpmmd.distributed" in sys.modules:
        sys.modules["dpmmd.distributed"].leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
