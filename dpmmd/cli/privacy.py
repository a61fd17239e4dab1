"""Commands about what is promised: `calibrate` and `privacy`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpmmd.cli.console import Adjacency, Json, ReleaseFile, console, print_json, print_table


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
    result = _calibrated(epsilon, delta, mu, sd)
    if adjacency is not None:
        result |= _noise_of_sums(adjacency, result["sd_over_sensitivity"])
    if as_json:
        print_json(result)
        return
    from dpmmd.privacy.printed import up

    def shown(name: str, value: Any) -> str:
        # more noise than is asked for is safe; mu is asked for or promised, so it stands exactly
        return str(value) if isinstance(value, str) or name == "mu" else up(value, 10)

    print_table([(name.replace("_", " "), shown(name, value)) for name, value in result.items()])


def _calibrated(
    epsilon: float | None, delta: float | None, mu: float | None, sd: float | None
) -> dict[str, Any]:
    """Epsilon, delta, mu and the noise, from the two of them that were given."""
    from dpmmd import privacy
    from dpmmd.privacy import accounting

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
    return {"epsilon": epsilon, "delta": delta, "mu": mu, "sd_over_sensitivity": ratio}


def _noise_of_sums(adjacency: Adjacency, ratio: float) -> dict[str, Any]:
    """Sensitivity and noise of class sums of vectors of norm at most 1."""
    from dpmmd import privacy
    from dpmmd.privacy import accounting

    result: dict[str, Any] = {"adjacency": adjacency.value}
    for sign in ("signed", "nonnegative"):
        block = privacy.Block("sums", "sums", 1.0, nonnegative=sign == "nonnegative")
        result[f"sensitivity_{sign}"] = privacy.sensitivity(adjacency.value, [block])
        result[f"sd_{sign}"] = ratio * result[f"sensitivity_{sign}"] * accounting.UP
    return result


def privacy(
    release: ReleaseFile,
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
        print_json(facts(released, book))
    elif as_markdown:
        typer.echo(markdown(released, book), nl=False)
    else:
        print_report(facts(released, book))


def print_report(f: dict[str, Any]) -> None:
    """What a release promises, for people."""
    from dpmmd.privacy import report
    from dpmmd.privacy.printed import plain

    lines = console()
    lines.print(f["promise"], highlight=False)
    print_table(report.rows(f))
    lines.print("Noise against signal:")
    for line in report.utility(f):
        lines.print(f"- {line}", highlight=False)
    lines.print("Not covered:")
    for line in f["not_covered"]:
        lines.print(f"- {line}", highlight=False)
    lines.print(f"Tests: {plain(f['tested'], 1000)}", highlight=False)
    for evidence in f["evidence"]:
        lines.print(f"- {evidence['what']} ({evidence['test']})", highlight=False)
    if f["evidence"]:
        lines.print("- on this machine: dpmmd audit --canaries 10000", highlight=False)
