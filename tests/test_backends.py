from __future__ import annotations

import pytest

from dpmmd import backends


def test_resolution_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.resolve() == "torch"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert backends.resolve() == "torch"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="DPMMD_BACKEND='fast'"):
        backends.resolve()
    assert backends.resolve("torch") == "torch"
    with backends.use("torch"):
        assert backends.resolve() == "torch"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="backend='triton': this build has 'auto', 'torch'"):
        backends.resolve("triton")
    with pytest.raises(ValueError, match="backend='nope'"), backends.use("nope"):
        pass
