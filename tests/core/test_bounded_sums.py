"""The native integer sums: `dpmmd.privacy.sums` bit for bit, and Python integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpmmd import backends
from dpmmd._contract.protocol import Core
from dpmmd._cores import cpu
from dpmmd._cores.matching import CORE
from dpmmd.bounds import BOUNDS, Bound
from dpmmd.privacy.sums import GUARD, PrivateSums
from tests.core.test_mean_embedding import level as level

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")

LIMIT = 1 << 30
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}
WIDTHS = {"taps": [5, 33, 4099, 1], "one": [130], "many": [3] * 64}


def rows(
    n: int, widths: list[int], dtype: torch.dtype, *, signed: bool = False, seed: int = 0
) -> list[Tensor]:
    """Features of many sizes, images 1 to 6 of them hostile."""
    rng = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-6, 7, (n, 1), generator=rng)
    out = []
    for width in widths:
        f = torch.randn(n, width, generator=rng, dtype=torch.float64)
        f = (f if signed else f.relu()) * scale
        out.append(f.to(dtype))
    for i, bad in enumerate([0.0, math.nan, math.inf, -math.inf, 1e-42, 3e38][: max(n - 1, 0)]):
        out[i % len(out)][i + 1, -1] = bad
    if n > 1:
        for f in out:
            f[1] = 0.0
    return out


def labels(n: int, k: int) -> Tensor:
    return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(1))


def both(
    fs: list[Tensor],
    y: Tensor,
    valid: Tensor,
    k: int,
    limit: int = LIMIT,
    core: Core = CORE,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Sums by a native core, and by the definition."""
    dim = sum(f.shape[1] for f in fs) * len(options["bound"].moments)
    ours = torch.zeros(k, dim, dtype=torch.int64)
    core.bounded_sums(fs, y, valid, torch.full_like(y, limit), sums=ours, **options)
    definition = PrivateSums(k, dim)
    with backends.use("torch"):
        definition.add(fs, y, valid, torch.full_like(y, limit), **options)
    return ours, definition.take()[0]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_bits_as_the_definition(
    dtype: torch.dtype, widths: list[int], moments: tuple[int, ...], bound: str
) -> None:
    fs = rows(17, widths, dtype)
    valid = torch.ones(17, dtype=torch.bool)
    valid[[7, 9]] = False
    ours, expected = both(
        fs, labels(17, 3), valid, 3,
        bound=Bound(moments, bound, 2.5, 0.3), nonnegative=True,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert ours.any()


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)], ids=str)
def test_signed_features(level: str, moments: tuple[int, ...], nonnegative: bool) -> None:
    fs = rows(12, WIDTHS["taps"], torch.float32, signed=True)
    fs[0][8:] = fs[0][8:].abs()
    for f in fs:
        f[8:] = f[8:].abs()
    ours, expected = both(
        fs, labels(12, 2), torch.ones(12, dtype=torch.bool), 2, 12_345_678,
        bound=Bound(moments, "sphere", 1.0, 1.7), nonnegative=nonnegative,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert ours.any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weight", [1e-200, 1e-30, 1e30, 1e200, 1e290])
def test_extreme_joint_weights(weight: float, dtype: torch.dtype) -> None:
    ours, expected = both(
        rows(9, [40, 3], dtype), labels(9, 2), torch.ones(9, dtype=torch.bool), 2,
        bound=Bound((1, 2), "sphere", 1.0, weight), nonnegative=True,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert ours.any()


@pytest.mark.parametrize("exponent", [-1074, -1022, -1000, -999, -150, 150, 999, 1000, 1023])
def test_extremes_of_float64(exponent: int) -> None:
    fs = [torch.tensor([[1.0, 1.5, 0.0]], dtype=torch.float64) * 2.0**exponent]
    for moments in ((1,), (2,), (1, 2)):
        ours, expected = both(
            fs, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool), 1,
            bound=Bound(moments, "ball", 1e-3, 0.5), nonnegative=False,
        )  # fmt: skip
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("limit", [1, 2, 1000, LIMIT])
def test_exact_against_python_integers(limit: int) -> None:
    """One image, the definition's steps in rational arithmetic where they are exact."""
    (f,) = rows(1, [37], torch.float32, signed=True)
    sums = torch.zeros(1, 37, dtype=torch.int64)
    CORE.bounded_sums(
        [f], torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool),
        torch.tensor([limit]), bound=Bound((1,), "sphere", 1.0, 1.0), nonnegative=False, sums=sums,
    )  # fmt: skip
    values = [Fraction(float(v)) for v in f[0]]
    exponent = math.frexp(max(abs(float(v)) for v in values))[1]
    g = [v / Fraction(2) ** exponent for v in values]
    bits = 62 - 6  # 37 numbers: log2 rounds up to 6
    # g^2 is exact in double precision: the features have 24 bits.
    square = sum(math.ceil(v * v * 2**bits) for v in g)
    rate = limit * GUARD / math.sqrt(float(square) * 2.0**-bits)
    expected = [math.trunc(float(v) * rate) for v in g]
    assert sum(q * q for q in expected) <= limit * limit
    if not any(expected):
        expected = [0] * 37
    assert sums[0].tolist() == expected


def check_limits_labels_and_validity(core: Core) -> None:
    """Each image alone is the truth; what may not contribute adds nothing and raises nothing."""
    fs = [f[7:] for f in rows(19, [9, 200], torch.float32, seed=3)]  # none of them hostile
    limits = torch.tensor([LIMIT, 5, 0, -1, LIMIT + 1, 1 << 62, -(1 << 63), 77, 1, LIMIT, 9, 9])
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, -1, 3, 1 << 62])
    valid = torch.ones(12, dtype=torch.bool)
    valid[8] = False
    options: dict[str, Any] = {
        "bound": Bound((1, 2), joint_weight=0.5), "nonnegative": True,
    }  # fmt: skip
    ours = torch.zeros(3, 418, dtype=torch.int64)
    core.bounded_sums(fs, y, valid, limits, sums=ours, **options)
    expected = PrivateSums(3, 418)
    for i in (0, 1, 7):
        one = slice(i, i + 1)
        with backends.use("torch"):
            expected.add([f[one] for f in fs], y[one], valid[one], limits[one], **options)
    truth, _ = expected.take()
    assert torch.equal(ours, truth)
    assert truth[0].any()
    assert truth[1].any()


def test_limits_labels_and_validity_by_image() -> None:
    check_limits_labels_and_validity(CORE)


@pytest.mark.parametrize("moments", [(1,), (1, 2)], ids=str)
def test_shared_taps_have_one_row(moments: tuple[int, ...]) -> None:
    widths = [5, 70, 33, 8]
    fs = rows(15, widths, torch.float32)
    y, valid = labels(15, 4), torch.ones(15, dtype=torch.bool)
    options: dict[str, Any] = {
        "bound": Bound(moments, joint_weight=0.5),
        "nonnegative": True,
    }
    m, dim = len(moments), sum(widths)
    shared = torch.zeros(1, m * 75, dtype=torch.int64)
    deep = torch.zeros(4, m * 41, dtype=torch.int64)
    CORE.bounded_sums(
        fs, y, valid, torch.full_like(y, LIMIT), sums=deep, shared=shared, shared_taps=2, **options
    )
    whole, _ = both(fs, y, valid, 4, **options)
    whole = whole.view(4, m, dim)
    assert torch.equal(deep, whole[:, :, 75:].flatten(1))
    assert torch.equal(shared, whole[:, :, :75].sum(dim=0).flatten()[None])


def test_adds_to_what_is_there_with_any_number_of_threads(level: str) -> None:
    fs = rows(33, [4099, 700, 9], torch.float32)
    y, valid = labels(33, 3), torch.ones(33, dtype=torch.bool)
    results = []
    for threads in (1, 2, 16):
        sums = torch.arange(3 * 2 * 4808).view(3, -1).clone()
        CORE.bounded_sums(
            fs,
            y,
            valid,
            torch.full_like(y, LIMIT),
            bound=Bound((1, 2), "ball-per-tap", 1.0, 0.1),
            nonnegative=True,
            sums=sums,
            threads=threads,
        )
        results.append(sums)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_images() -> None:
    ours, expected = both(
        [torch.zeros(0, 4)], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), 2,
        bound=Bound((1,), "sphere", 1.0, 1.0), nonnegative=True,
    )  # fmt: skip
    assert torch.equal(ours, expected)


class _Operations(TorchDispatchMode):
    """Names of the operations that run, and whether a division was by a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.by_number = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("div", "div_", "true_divide", "reciprocal"):
            self.by_number |= len(args) < 2 or not isinstance(args[1], Tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_definition_rounds_alike_on_every_device(bound: str) -> None:
    """Floats pass through operations that IEEE 754 fixes, or that are exact, alone.

    On CUDA, PyTorch's division by a Python number is a product with its reciprocal.
    """
    fs = rows(9, [5, 33], torch.float32)
    sums = PrivateSums(3, 2 * 38)
    inputs = (labels(9, 3), torch.ones(9, dtype=torch.bool), torch.full((9,), LIMIT))
    with backends.use("torch"), _Operations() as seen:
        sums.add(
            fs,
            *inputs,
            bound=Bound((1, 2), bound, 1.7, 0.3),
            nonnegative=True,
        )
    assert "div" in seen.names
    assert not seen.by_number
    rounded = {"mul", "mul_", "div", "sqrt_", "pow"}  # pow is the estimate's square
    exact = {
        *("abs", "amax", "amin", "maximum", "minimum", "frexp", "ceil_", "trunc_", "neg", "view"),
        *(
            "sum",
            "add",
            "add_",
            "index_add_",
            "where",
            "_to_copy",
            "ge",
            "gt",
            "le",
            "lt",
            "select",
        ),
        *("bitwise_and", "bitwise_and_", "__and__", "__iand__", "__lshift__", "slice", "unsqueeze"),
        *("zeros", "zeros_like", "ones_like", "full", "new_full", "scalar_tensor", "detach"),
    }
    assert seen.names <= rounded | exact, seen.names - rounded - exact
