"""The steps of a release: who is handed what, as their signatures say, and whom warnings reach."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import dpmmd
from dpmmd.privacy import collecting, layout, mechanism, noising, opening, spending
from tests.conftest import images, small_encoder

STEPS = (mechanism, opening, layout, spending, collecting, noising)


def takers(kind: str) -> set[str]:
    """The functions of the steps that have a parameter of this type."""
    found = set()
    for module in STEPS:
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                annotations = {k: str(v) for k, v in function.__annotations__.items()}
                annotations.pop("return", None)
                if any(re.search(rf"\b{kind}\b", text) for text in annotations.values()):
                    found.add(f"{module.__name__.rpartition('.')[2]}.{name}")
    return found


def test_only_collecting_is_given_pixels() -> None:
    assert takers("Batch") == {"collecting.harmless"}
    assert takers("ImageSource") == {"opening.group_sizes"}  # of which it takes the groups
    asked = {"spending.spend", "spending._settings", "spending._asked"}  # before the spend
    assert takers("Opened") == {"collecting.collect", *asked}


def test_only_noising_opens_raw_sums() -> None:
    filled = {"spending.spend", "collecting.collect", "collecting.add"}
    assert takers("Raw") == {*filled, "noising.noise"}
    assert takers("PrivateSums") == {"noising._noised", "noising._noised_products"}
    for module in STEPS:
        taken = re.findall(r"\.take\(\)|\._sums\b|\._shared\b", inspect.getsource(module))
        assert bool(taken) == (module is noising), module


def test_what_is_sealed_has_its_noise() -> None:
    assert takers("Noised") == {"mechanism._sealed"}
    parameters = inspect.signature(mechanism._sealed).parameters.values()
    assert [p.annotation for p in parameters] == [
        "Noised", "Metadata", "Modes | None", "Ledger | None", "str | None", "Path | None",
    ]  # fmt: skip


def test_images_are_collected_after_the_spend() -> None:
    assert takers("Spent") == {"collecting.collect"}


def test_warnings_point_at_the_line_that_called(tmp_path: Path) -> None:
    """Whichever step they come from."""
    options = {"adjacency": "replace-one", "epsilon": 1.0, "progress": False, "num_classes": 3}
    for population in ("ward 1", "ward 2"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dpmmd.release(
                images(40),
                small_encoder(),
                **options,  # type: ignore[arg-type]
                delta=0.5,
                partial_sums=tmp_path / "sums",
                ledger=tmp_path / "ledger",
                population=population,
            )
    assert len(caught) == 3  # of delta, of the folder, of the population
    assert {warning.filename for warning in caught} == {__file__}
