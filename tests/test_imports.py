"""What is imported when: nobody waits for PyTorch to read a help text."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys

import pytest

import dpmmd
import dpmmd.privacy

HEAVY = {"torch", "scipy", "numpy", "PIL", "pydantic", "sklearn", "triton", "torchvision"}
COMMAND = "import sys; sys.argv[1:] = {!r}; from dpmmd.cli import main; main()"
CALIBRATE = ["calibrate", "--epsilon", "1", "--delta", "1e-6", "--adjacency", "zero-out"]


def imported(code: str) -> set[str]:
    """Which of the packages above a process has imported when it ends."""
    told = f"import atexit, sys; atexit.register(lambda: print(*{HEAVY!r} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{told}\n{code}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import dpmmd, dpmmd.privacy, dpmmd.cli",
        COMMAND.format(["--help"]),
        COMMAND.format(["--version"]),
    ],
)
def test_help_needs_nothing(code: str) -> None:
    assert imported(code) == set()


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        (COMMAND.format(["release", "--help"]), HEAVY - {"pydantic"}),  # which typer imports
        (COMMAND.format(CALIBRATE), {"torch", "PIL"}),
        (COMMAND.format(["recipes"]), {"torch", "scipy", "PIL"}),
        ("import dpmmd.functional", {"scipy", "PIL", "pydantic"}),
        ("import dpmmd; dpmmd.nn, dpmmd.encoders, dpmmd.generators", {"scipy", "sklearn"}),
        ("import dpmmd; dpmmd.release, dpmmd.train", {"scipy", "sklearn", "torchvision"}),
    ],
)
def test_what_a_part_does_not_need(code: str, unneeded: set[str]) -> None:
    assert imported(code) & unneeded == set()


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dpmmd.cli import main

    monkeypatch.setattr(sys, "argv", ["dpmmd", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"dpmmd {dpmmd.__version__}\n"


@pytest.mark.parametrize("package", ["dpmmd", "dpmmd.privacy"])
def test_a_package_has_what_it_lists_whatever_was_imported_before(package: str) -> None:
    module = importlib.import_module(package)
    inside = {found.name for found in pkgutil.iter_modules(module.__path__)}
    for name in module.__all__:
        code = f"import {package} as p; print(type(p.{name}).__name__)"
        if name in inside:  # importing the module must not hide what the package calls so
            code = f"import {package}.{name}; {code}"
        assert name in dir(module)
        value = getattr(module, name)
        if not inspect.ismodule(value):
            if name in inside:
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
                assert done.stdout == f"{type(value).__name__}\n", done.stderr
            if inspect.isclass(value) or inspect.isfunction(value):
                assert pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_names_can_be_imported_from_the_package() -> None:
    code = (
        "from dpmmd import train, release, Release, functional\n"
        "import dpmmd\n"
        "assert dpmmd.privacy.release is release and dpmmd.privacy.Release is Release\n"
        "assert dpmmd.train is train and dpmmd.functional is functional\n"
        "assert callable(dpmmd.nn.MMDLoss) and callable(dpmmd.privacy.audit)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
