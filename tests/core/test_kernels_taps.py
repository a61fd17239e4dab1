"""What is launched: one launch over all taps, 16-byte accesses only where every row allows them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from dpmmd.kernels import row_statistics, table, taps
from dpmmd.kernels.taps import Taps


def at(offset: int, n: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor [n, width] so many elements after an address that is a multiple of 64 bytes."""
    return torch.zeros(offset + n * width, dtype=dtype)[offset:].view(n, width)


def vectors(*tensors: Tensor) -> dict[int, list[int]]:
    """Elements an access -> which taps have it."""
    launches = Taps(tensors).launches(16)
    return {launch.vector: sorted(set(launch.records[:, 5].tolist())) for launch in launches}


def test_aligned_taps_share_one_launch() -> None:
    tensors = [at(0, 3, 8), at(0, 3, 16), at(4, 3, 4)]
    (launch,) = Taps(tensors).launches(16)
    assert launch.vector == 4
    assert launch.addresses == tuple(t.data_ptr() for t in tensors)
    assert vectors(*(t.bfloat16() for t in tensors[:2])) == {8: [0, 1]}


def test_what_is_not_aligned_goes_apart() -> None:
    assert vectors(at(1, 3, 8), at(0, 3, 8)) == {1: [0], 4: [1]}  # address
    wide = torch.zeros(3, 13)[:, :8]
    assert vectors(wide, at(0, 3, 8)) == {1: [0], 4: [1]}  # step from image to image
    # An odd tap leaves the columns after it, and all rows of [K, D], off 16 bytes.
    assert vectors(at(0, 3, 8), at(0, 3, 5)) == {1: [0, 1]}
    assert vectors(at(0, 3, 5), at(0, 3, 3), at(0, 3, 8)) == {1: [0, 1], 4: [2]}
    assert vectors(at(0, 3, 4).bfloat16(), at(0, 3, 4).bfloat16(), at(0, 3, 8).bfloat16()) == {
        1: [0, 1],
        8: [2],
    }
    first, second = Taps([at(0, 3, 8), at(0, 3, 8)]).launches(16, [at(1, 3, 8), at(0, 3, 8)])
    assert (first.vector, second.vector) == (4, 1)  # a partner off 16 bytes
    assert first.records[:, 5].tolist() == [1]


def test_records_cover_every_column_once() -> None:
    tensors = [
        at(0, 2, 37),
        torch.zeros(2, 0),
        at(0, 2, 3),
        at(0, 2, 16),
        torch.zeros(2, 90)[:, :40],
    ]
    t = Taps(tensors)
    covered, numbers = [], []
    for launch in t.launches(16):
        for index, begin, width, column, step, tap, number, _ in launch.records.tolist():
            assert launch.addresses[index] == tensors[tap].data_ptr()
            assert width == tensors[tap].shape[1]
            assert step == tensors[tap].stride(0)
            covered += range(column + begin, column + min(width, begin + 16))
            numbers.append(number)
    assert sorted(covered) == list(range(t.dim))
    assert sorted(numbers) == list(range(t.blocks(16)))
    assert t.ranges(16, False).tolist() == [0, len(numbers)]
    assert t.ranges(16, True).tolist() == [0, 3, 3, 4, 5, 8]


def test_a_column_past_two_billion() -> None:
    """Index arithmetic has 64 bits: a tap of more than 2^31 elements, on paper."""
    big = torch.zeros(1).expand(40_000 * 50_000 + 3).unsqueeze(0).expand(2, -1)
    records = taps._records((big.shape[1],), (big.shape[1],), (0,), 1 << 26, torch.device("cpu"))
    assert records.dtype == torch.int64
    begin, width = records[-1, 1:3].tolist()
    assert begin < width == 2_000_000_003
    assert records[-1, 3:5].tolist() == [0, width]


def test_many_taps_take_several_launches() -> None:
    tensors = [at(0, 2, 4) for _ in range(taps.MOST_TAPS + 3)]
    first, second = Taps(tensors).launches(16)
    assert (len(first.addresses), len(second.addresses)) == (taps.MOST_TAPS, 3)


def test_taps_without_partner_are_left_out() -> None:
    (launch,) = Taps([at(0, 2, 4), at(0, 2, 8)]).launches(16, [None, at(0, 2, 8)])
    assert launch.records[:, 5].tolist() == [1]


def test_maps_are_made_once() -> None:
    tensors = [at(0, 2, 4), at(0, 2, 8)]
    (one,), (two,) = Taps(tensors).launches(16), Taps([t.clone() for t in tensors]).launches(16)
    assert one.records is two.records


def test_new_shapes_are_refused_while_a_graph_is_captured() -> None:
    device = mock.Mock(spec=torch.device, type="cuda")
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="Run one step with the same shapes before the capture"),
    ):
        taps.to_device(torch.zeros(1), device)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "features: expected at least one tap"),
        ([torch.zeros(2, 3).double()], r"features\[0\]: torch.float64 .*float32 or bfloat16"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).bfloat16()], r"features\[1\]: torch.bfloat16"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], r"features\[1\]: .* with n=2"),
        ([torch.zeros(2)], r"features\[0\]: .*expected \[n, ...\]"),
        ([torch.zeros(2, 3), torch.zeros(2, 3, device="meta")], r"features\[1\]: .* on cpu"),
    ],
)
def test_refusals(features: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Taps(features)


def test_too_many_programs_are_refused() -> None:
    with pytest.raises(ValueError, match="65536 tiles of images or classes"):
        taps.launch(None, (1, 65_536), torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "row"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((12, 0), 100)]
)
def test_table_follows_the_architecture(capability: tuple[int, int], row: int) -> None:
    device = torch.device("cuda", 7)
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch.dict(table._architectures, clear=True),
    ):
        assert table._architecture(device) == row


def test_old_architectures_are_refused() -> None:
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)),
        mock.patch("torch.cuda.get_device_name", return_value="Tesla T4"),
        mock.patch.dict(table._architectures, clear=True),
        pytest.raises(ValueError, match="Tesla T4 is sm_75, expected sm_80 or newer"),
    ):
        table._architecture(torch.device("cuda", 7))


def test_tiles_agree_with_the_schedule() -> None:
    for rows in table.TABLE.values():
        for operations in rows.values():
            for name in ("row_dots", "gradient", "gradient_with"):
                assert all(config.rows == table.TILE_ROWS for _, config in operations[name])


def test_importing_touches_no_driver_and_needs_no_triton() -> None:
    """The kernels import without a driver; dpmmd itself does so without triton."""
    code = """
import dpmmd, dpmmd.kernels
{more}
from triton.runtime import driver
assert driver._active is None and driver._default is None, "a driver was started"
"""
    names = [p.stem for p in Path(row_statistics.__file__).parent.glob("[a-z]*.py")]
    assert "class_sums" in names
    more = "\n".join(f"import dpmmd.kernels.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code.format(more=more)], check=True)
    without = "import sys; sys.modules['triton'] = None; import dpmmd, dpmmd.kernels; print('fine')"
    failed = subprocess.run(
        [sys.executable, "-c", f"{without}; import dpmmd.kernels.mean_embedding"],
        capture_output=True,
        text=True,
    )
    assert failed.stdout == "fine\n"
    assert re.search("ModuleNotFoundError.*triton", failed.stderr)
