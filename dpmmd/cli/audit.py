"""The command `audit`."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dpmmd.cli.console import (
    Adjacency,
    Background,
    BoundKind,
    Channels,
    Crop,
    Device,
    EncoderSize,
    EncoderWeights,
    ImageSize,
    Json,
    Moments,
    Quiet,
    Split,
    console,
    moments_of,
    print_json,
    print_table,
    say,
)
from dpmmd.cli.release import ModesOf, PerClass, PixelMoments, modes_of

if TYPE_CHECKING:
    from dpmmd.privacy import Audit, SourceAudit


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
    moments: Moments = "1",
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
    encoder_size: EncoderSize = 32,
    weights: EncoderWeights = None,
    records: Annotated[
        int | None,
        typer.Option(
            help="How many records are read, the first ones. Default: 256, or a quarter more than "
            "a batch."
        ),
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes; none: unlabelled.")] = None,
    bound: BoundKind = "sphere",
    pixel_moments: PixelMoments = None,
    modes: ModesOf = None,
    per_class: PerClass = None,
    group_by: Annotated[
        str | None, typer.Option(help="What says which images belong together.")
    ] = None,
    split: Split = "train",
    image_size: ImageSize = None,
    channels: Channels = None,
    crop: Crop = None,
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
    given = {
        name
        for name in context.params
        if (how := context.get_parameter_source(name)) is not None and how.name == "COMMANDLINE"
    }
    if source is not None:
        _refuse(given & {"canaries", "epsilon", "delta", "copies", "sign", "confidence"}, "without")
        _audit_source(
            source,
            _Encoder(encoder, encoder_size, weights, device),
            quiet=quiet,
            as_json=as_json,
            adjacency=adjacency.value,
            num_classes=num_classes,
            records=records,
            moments=moments_of(moments),
            bound=bound,
            pixel_moments=pixel_moments,
            modes=modes_of(modes, per_class),
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
    from dpmmd import privacy

    result = privacy.audit(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency.value,
        canaries=canaries,
        copies=copies,
        sign=sign,
        moments=moments_of(moments),
        confidence=confidence,
        progress=not quiet,
    )
    _print_audit(result, quiet=quiet, as_json=as_json)


def _refuse(names: set[str], how: str) -> None:
    """Refuses options of the other kind of audit, by name."""
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise ValueError(
            f"{options}: makes sense {how} --source only. `dpmmd audit` attacks the release with "
            "made-up images; with --source it checks a data set and an encoder, and draws no noise."
        )


def _print_audit(result: "Audit", *, quiet: bool, as_json: bool) -> None:
    from dpmmd.privacy.printed import down, up

    def shown(name: str, value: Any) -> str:
        if isinstance(value, tuple):
            return ", ".join(map(str, value))
        if isinstance(value, float):
            claimed = name in ("epsilon_claimed", "mu_claimed", "delta")
            return (up if claimed else down)(value, 7)  # what was found is a lower bound
        return str(value)

    if as_json:
        print_json(result.facts())
    else:
        print_table((name.replace("_", " "), shown(name, v)) for name, v in result.facts().items())
    if result.verdict == "VIOLATED":
        say(
            f"error: VIOLATED: epsilon is at least {down(result.epsilon_lower, 4)} at "
            f"delta={up(result.delta)}, claimed is {up(result.epsilon_claimed)}. Do not publish "
            "what this installation releases."
        )
        raise typer.Exit(2)
    if not quiet:
        say("consistent with the claim: these canaries did not refute it, which does not prove it")


class _Encoder(NamedTuple):
    name: str
    size: int
    weights: str | None
    device: str


def _audit_source(
    source: str, encoder: _Encoder, *, quiet: bool, as_json: bool, **options: Any
) -> None:
    import dpmmd
    from dpmmd.devices import choose_device
    from dpmmd.privacy.pipeline import NOTICE

    where = choose_device(encoder.device)
    loaded = None
    if encoder.name != "none":
        loaded = dpmmd.encoders.load(
            encoder.name, image_size=encoder.size, weights=encoder.weights
        ).to(where)
    say(NOTICE)
    result = dpmmd.privacy.audit_source(source, loaded, progress=not quiet, **options)
    if as_json:
        print_json(result.facts())
    else:
        _print_checks(result)
    if result.verdict == "VIOLATED":
        say(
            "error: VIOLATED: what a record contributes does not depend on that record alone, so "
            "that no epsilon holds. Do not release with this source and encoder."
        )
        raise typer.Exit(2)
    if not quiet:
        say(
            f"consistent with the claim: no other record moved in these checks of {result.records} "
            "records, which does not prove that none ever does"
        )


def _print_checks(result: "SourceAudit") -> None:
    from rich.text import Text

    rows: list[tuple[str | Text, ...]] = []
    causes: dict[str, list[str]] = {}
    for check in result.checks:
        moved = check.rows_moved if check.moved is None else check.moved
        numbers = (check.distance, check.limit)
        rows.append(
            (
                Text(check.name),
                check.outcome,
                *("" if number is None else f"{number:.4g}" for number in numbers),
                *("" if count is None else str(count) for count in (moved, check.compared)),
            )
        )
        if check.why:
            causes.setdefault(check.why, []).append(check.name)
    print_table(rows, "check", "outcome", "x Delta", "at most", "others that moved", "of")
    for why, names in causes.items():
        console().print(Text(f"- {', '.join(names)}: {why}"))
