"""Commands that read private images: `release` and `inspect`."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpmmd.cli.console import (
    Adjacency,
    Background,
    BoundKind,
    Channels,
    Crop,
    Device,
    EncoderSize,
    ImageKey,
    ImageSize,
    Json,
    LabelKey,
    Moments,
    Quiet,
    Split,
    console,
    moments_of,
    print_json,
    print_table,
    say,
)
from dpmmd.cli.privacy import print_report

if TYPE_CHECKING:
    from dpmmd.privacy import Modes

ModesOf = Annotated[
    Path | None,
    typer.Option(
        help="An earlier release of the same images with --pixel-moments: features are released "
        "by class and mode, its modes being the cells along its leading directions. Both releases "
        "together are stated."
    ),
]
PerClass = Annotated[
    int | None, typer.Option(help="With --modes: modes of a class, a power of two, e.g. 8.")
]
PixelMoments = Annotated[
    int | None,
    typer.Option(
        help="Also release means and products of pixels, of the images brought to this side: "
        "`sample` aligns generated images with them."
    ),
]


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
        str,
        typer.Option(
            help="squeezenet1.1, efficientnet-lite0, vgg11 to 19, resnet18 to 50; none: no "
            "features, the moments of pixels alone (--pixel-moments)."
        ),
    ] = "squeezenet1.1",
    encoder_size: EncoderSize = 32,
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
    moments: Moments = "1",
    bound: BoundKind = "sphere",
    clip: Annotated[float, typer.Option(help="Norm of the bound (matters for balls).")] = 1.0,
    shared_taps: Annotated[
        int,
        typer.Option(help="Sum the encoder's first so many taps over all classes, not by class."),
    ] = 0,
    pixel_moments: PixelMoments = None,
    modes: ModesOf = None,
    per_class: PerClass = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Protect all images of a group (a person) together: the array or column that "
            "says which belong together, or 'folder' for CLASS/GROUP/*.png."
        ),
    ] = None,
    split: Split = "train",
    image_size: Annotated[
        int | None, typer.Option(help="Side to bring images to; needed if sizes differ.")
    ] = None,
    channels: Channels = None,
    crop: Crop = None,
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

    With modes: `dpmmd release scans/ --encoder none --pixel-moments 28 --out first.safetensors ...`
    and then `dpmmd release scans/ --modes first.safetensors --per-class 8 ...`.

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
    split_by = modes_of(modes, per_class)
    budget = _budget(budget_epsilon, budget_delta)
    group = join()
    rank = 0 if group is None else group.rank()
    if rank:
        warnings.simplefilter("ignore")  # the first process says it
    loaded = None
    if encoder == "none" and weights is not None:
        raise ValueError(f"--weights {weights}: there are none with --encoder none; leave it out.")
    if encoder != "none":
        loaded = dpmmd.encoders.load(encoder, image_size=encoder_size, weights=weights).to(where)
    second = None
    if selection is not None:
        second = dpmmd.encoders.load(selection, image_size=encoder_size).to(where)
    released = dpmmd.release(
        source,
        loaded,
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency.value,
        num_classes=num_classes,
        moments=moments_of(moments),
        bound=bound,
        clip=clip,
        shared_taps=shared_taps,
        pixel_moments=pixel_moments,
        modes=split_by,
        selection=second,
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
        print_json({"out": str(out), **told})
    else:
        print_report(told)
        say(f"wrote {out}")


def modes_of(first: Path | None, per_class: int | None) -> "Modes | None":
    """The modes that a release suggests, by the options of the command line."""
    if first is None and per_class is None:
        return None
    if first is None:
        raise ValueError(
            f"--per-class {per_class}: needs --modes FIRST.safetensors, a release of the same "
            "images with --pixel-moments, whose directions split the classes."
        )
    if per_class is None:
        raise ValueError(f"--modes {first}: needs --per-class C, a power of two, e.g. 8.")
    import dpmmd

    return dpmmd.modes.fit(dpmmd.Release.load(first), per_class)


def _budget(epsilon: float | None, delta: float | None) -> tuple[float, float] | None:
    if epsilon is None and delta is None:
        return None
    if epsilon is None or delta is None:
        raise ValueError("--budget-epsilon and --budget-delta: give both of them, or neither.")
    return epsilon, delta


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
    split: Split = "train",
    image_size: ImageSize = None,
    channels: Channels = None,
    crop: Crop = None,
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
    from dpmmd.data import inspect as inspecting
    from dpmmd.data import inspection

    found = inspecting.inspect(
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
        print_json(found.facts())
        return
    from rich.text import Text

    lines = console()
    lines.print(inspection.YOURS, markup=False, highlight=False)
    print_table([(Text(name), Text(value)) for name, value in inspection.rows(found)])
    lines.print(f"{inspection.NEXT}\n{found.command}", markup=False, highlight=False)
