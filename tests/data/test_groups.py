"""Identifiers of groups: equal ones are one group, missing ones are refused, whatever the type."""

from __future__ import annotations

import datetime
import io
import json
import math
import re
import tarfile
import uuid
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import dpmmd
from dpmmd.data import open_source
from dpmmd.data.labels import as_groups, as_labels, one_label
from dpmmd.data.look import first_look
from tests.conftest import images, no_noise, small_encoder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def shown(value: object) -> str:
    """An id that is the same in every process: without addresses."""
    return re.sub(r" object at 0x[0-9a-f]+", "", repr(value))


DAY = datetime.date(2020, 1, 2)
EAST = datetime.timezone(datetime.timedelta(hours=2))
ID = uuid.UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")
BFLOAT = torch.tensor(1, dtype=torch.bfloat16)


def groups(values: Any) -> list[int]:
    found = as_groups(values, len(values), "patient", "scans")
    assert found.dtype == torch.int64
    return list(found.tolist())


ONE: dict[str, list[Any]] = {
    "one": [
        1, 1.0, True, "1", " 1", "01", "1.0", "1.", "+1", "1e0", "1", "true", b"1", bytearray(b"1"),
        Decimal(1), Decimal("1.00"), Fraction(1), np.int8(1), np.uint64(1), np.float16(1),
        np.float32(1), np.longdouble(1), np.bool_(True), np.str_("1"), np.bytes_(b"1"),
        np.array(1), np.array([1.0]), np.array("1"), np.array(1, object), np.ma.array(1),
        torch.tensor(1), torch.tensor([1.0]), torch.tensor(True), BFLOAT,
        pa.scalar(1), pa.scalar(1.0), pa.scalar("1"), pa.scalar(1, pa.float32()), pa.scalar(b"1"),
    ],
    "a half": [0.5, "0.5", ".50", "5e-1", Decimal("0.5"), Fraction(1, 2), np.float32(0.5)],
    "a tenth": [0.1, "0.1", "0.10", Decimal("0.1"), Decimal.from_float(0.1), Fraction(1, 10)],
    "beyond doubles": [2**53 + 1, str(2**53 + 1), Decimal(2**53 + 1), np.uint64(2**53 + 1)],
    "beyond int64": [2**70, str(2**70), f"0{2**70}", Decimal(2**70), f"{2**70}.0"],
    "digits beyond doubles": [10**400, "1" + "0" * 400, Decimal(10**400)],
    "a name": ["Anna", " anna", "ANNA\t\n", "an\u200bna", "Anna\0", b"Anna", "\ufeffAnna"],
    "accents": ["é", "e\u0301", "É", "E\u0301", "é".encode(), "e"],
    "a dotted i": ["İ", "i", "I", "ı", "i\u0307"],
    "spaces": ["Anna Lee", "Anna  Lee", "Anna\u00a0Lee", " anna\tlee "],
    "sharp s": ["STRASSE", "straße"],
    "dashes": ["P-1", "p–1", "P\u20111", "P\u22121", "P\u058a1", "P－1"],
    "apostrophes": [
        "O'Brien", "o’brien", "O`Brien", "O´Brien", "O′Brien", 'O"Brien', "O''Brien", "O“Brien",
        "Oʼbrien", "O＇Brien", "'O'Brien'",
    ],
    "scripts' digits": ["p1", "p١", "p１", "p१", "p①", "p➀", "p¹", "'p1'"],
    "an Arabic number": [3.5, "٣٫٥"],
    "no UTF-8": [b"caf\xe9", "caf\udce9"],
    "a UUID": [ID, str(ID), str(ID).upper(), ID.hex, ID.urn, f"{{{ID}}}", pa.scalar(str(ID))],
    "a UUID of digits": [uuid.UUID("12345678" * 4), "12345678" * 4, int("12345678" * 4)],
    "a day": [
        DAY, datetime.datetime(2020, 1, 2), datetime.datetime(2020, 1, 2, 2, tzinfo=EAST),
        np.datetime64("2020-01-02"), np.datetime64("2020-01-02T00", "h"),
        np.datetime64("2020-01-02", "ns"), "2020-01-02", "2020-01-02T00:00:00.000Z",
        "2020-1-2", "2020/01/02", "2020.01.02", "2020/1/2", "20200102", 20200102, "2020/1/2 00:00",
        "2020-01-01 23:00:00-01:00", pa.scalar(DAY), pa.scalar(DAY).cast(pa.timestamp("ns")),
    ],
    "an instant": [
        datetime.datetime(2020, 1, 2, 3, 4, 5, 500000), "2020-01-02 03:04:05.5",
        np.datetime64("2020-01-02T03:04:05.500000000"), "2020-01-02T05:04:05.500+02:00",
    ],
    "a year": [np.datetime64("2020"), np.datetime64("2020-01"), datetime.date(2020, 1, 1)],
    "zero": [0, 0.0, -0.0, "0", "0e999", "-0", "00", False, "FALSE", Decimal("-0")],
}  # fmt: skip


@pytest.mark.parametrize("values", ONE.values(), ids=ONE)
def test_equal_identifiers_are_one_group_whatever_their_type(values: list[Any]) -> None:
    assert groups(values) == [0] * len(values)
    for value in values:  # each of them alone against the first, and beside another
        assert groups([value, values[0]]) == [0, 0]
        assert len(set(groups(["somebody else", value]))) == 2


@pytest.mark.parametrize(
    "values",
    [
        [2**53, 2**53 + 1, 2**53 + 2],
        [str(2**53), str(2**53 + 1)],
        [2**70, 2**70 + 1, -(2**70)],
        np.array([2**63, 2**63 + 1], np.uint64),
        np.array([2**62, 2**62 + 1]),
        [2**60, 0.5, "x"],
        ["1", "11", "1 1", "1-1", "1_1"],
        ["2020-01-02", "2020-01-02T00:00:01", "2020-01-02T00:00:00.000000001"],
        np.array(["2020-01-02T00:00:00.000000001", "2020-01-02"], "M8[ns]"),
        [0.5, 0.25, 1],
        ["a", "b", "ab", "ba"],
    ],
    ids=shown,
)
def test_different_identifiers_are_different_groups(values: Any) -> None:
    assert len(set(groups(values))) == len(values)


# Unicode's Default_Ignorable_Code_Point, one of each range and its ends, and blank letters.
UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b\u180e\u180f\u200b\u200f\u202a\u202e\u2060\u206f\u3164"
    "\ufe00\ufe0f\ufeff\uffa0\ufff0\ufff8\U0001bca0\U0001d173\U000e0001\U000e0100\U000e0fff\u2800\U0001d159"
)


@pytest.mark.parametrize("unseen", UNSEEN, ids=ascii)
def test_what_nobody_sees_makes_no_other_identifier(unseen: str) -> None:
    assert groups(["p1", f"p1{unseen}", f"{unseen}P{unseen}1", f"p{unseen}\u06611"[:-1]]) == [0] * 4
    for text in (unseen, unseen * 3, f" {unseen} "):
        with pytest.raises(ValueError, match="have no group"):
            groups(["p1", text])


def test_a_day_that_there_is_not_is_compared_by_its_digits() -> None:
    assert groups(["2020-13-45", "2020/13/45", 20201345, "2020-13-46"]) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0, 1]).to_sparse(),
        torch.empty(2, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_that_are_not_plain_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"^group_by='patient': source 'scans' has groups in a "):
        as_groups(values, 2, "patient", "scans")
    one = torch.tensor([1]).to_sparse()
    with pytest.raises(TypeError, match=r"^group_by='patient': source 'scans' has groups in a "):
        as_groups([1, one], 2, "patient", "scans")
    with pytest.raises(TypeError, match="labels of source 'scans' are of type a sparse tensor"):
        as_labels(torch.tensor([0, 1]).to_sparse(), 2, "scans")


@pytest.mark.parametrize("label", [2**63, 2**70, -(2**70)])
def test_a_label_that_no_tensor_holds_is_out_of_range(label: int) -> None:
    with pytest.raises(ValueError, match="source 'scans' has labels that are not class indices"):
        one_label(label, "scans")

    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return images(1)[0][0], label * index

    source = open_source(Items(), image_size=8, channels=1)
    with pytest.raises(ValueError, match=r"source 'Items' has labels that are not class indices"):
        first_look(source)


MISSING: dict[str, Any] = {
    "None": None, "nan": math.nan, "np.nan": np.float32("nan"), "Decimal": Decimal("nan"),
    "signaling": Decimal("sNaN"), "NaT": np.datetime64("NaT"), "masked": np.ma.masked,
    "masked 0-d": np.ma.array(1, mask=True), "tensor": torch.tensor(math.nan),
    "0-d": np.array(np.nan), "object": np.array(None, object), "null": pa.scalar(None, pa.int64()),
    "untyped null": pa.scalar(None), "inf": math.inf, "-inf": Decimal("-inf"), "empty": "",
    "space": " \t", "invisible": "\u200b\u00a0",
    "bytes": b"", "zeros": b"\0\0", "text nan": "nan", "text NaN": " NaN ", "text None": "None",
    "text null": "NULL", "n/a": "N/A", "na": "na", "<NA>": "<NA>", "#N/A": "#N/A", "-nan": "-nan",
    "text nat": "NaT", "dash": "-", "dashes": "----------------------------", "em dash": "—",
    "question": "?", "SQL": "\\N", "unknown": "Unknown", "bytes nan": b"nan",
    "np.str_": np.str_("nan"), "text inf": "inf",
    **{text: text for text in (
        "(blank)", "(leer)", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NUM!", "#NULL!", "#WERT!",
        "#NV", "Err:502", "1e999", "-1e999", "1.5e400", "1e99999999999999999999", "unk",
        "not known", "not_known", "not-recorded", "not recorded", "not available", "missing",
        "tbd", "??", "--", ".", "[]", "{}", "no id", "n/k",
    )},
    "Decimal 1e999": Decimal("1e999"),
}  # fmt: skip


class NAType:
    """pandas.NA: neither equal to itself nor unequal."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = object.__hash__


@pytest.mark.parametrize("value", [*MISSING.values(), NAType()], ids=[*MISSING, "pandas.NA"])
def test_a_missing_value_is_refused(value: Any) -> None:
    for values in (["a", value], [value, 3], [1.5, value, "x"]):
        with pytest.raises(
            ValueError, match=r"^group_by='patient': some images of source 'scans' "
        ):
            groups(values)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, np.nan, 2]),
        np.array(["a", "nan"]),
        np.array(["a", np.nan], object),
        np.array([b"a", b""]),
        np.array(["2020-01-01", "NaT"], "M8[D]"),
        np.ma.array([1, 2], mask=[0, 1]),
        np.ma.array(["a", "b"], mask=[0, 1]),
        torch.tensor([1, math.nan]),
        torch.tensor([1, math.nan], dtype=torch.bfloat16),
        pa.array([1, None]),
        pa.array([1.5, None], pa.float32()),
        pa.array(["a", None]),
        pa.array(["a", None]).dictionary_encode(),
        pa.array([DAY, None]),
        pa.array([None, datetime.datetime(2020, 1, 1)], pa.timestamp("ns")),
        pa.array([None, None]),
        pa.chunked_array([["a"], [None]]),
    ],
    ids=shown,
)
def test_a_missing_value_of_any_container_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="have no group"):
        groups(values)


@pytest.mark.parametrize(
    "values",
    [
        [2.0**53, 1],
        np.array([1, 2.0**53]),
        np.array([2**24 + 1, 2**24], np.float32),
        torch.tensor([1, 256], dtype=torch.bfloat16),
        pa.array([1e300]),
        [np.float32(0.1), 0.1],
        [torch.tensor(1e20)],
    ],
    ids=shown,
)
def test_floats_that_may_have_been_rounded_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="may have been rounded"):
        groups(values)


@pytest.mark.parametrize(
    "values",
    [
        [["a"], ["b"]], [("a", 1)], [{"a": 1}], [object()], [1j], [datetime.timedelta(1)],
        [np.timedelta64(1)], [np.timedelta64("NaT")], np.array([1, 2], "m8[s]"),
        np.array([(1, 2)], "i4,i4"), np.array([1j]), [np.array([1, 2])], "ab", b"ab",
        {"a": 1}, {"a"},
    ],
    ids=shown,
)  # fmt: skip
def test_types_whose_equality_nobody_knows_are_refused(values: Any) -> None:
    with pytest.raises(TypeError, match=r"^group_by='patient': source 'scans' has groups of type"):
        groups(values)


@pytest.mark.parametrize("values", [5, None, len, np.zeros((2, 1)), torch.zeros(2, 1), ["a"]])
def test_one_value_per_image_is_needed(values: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="group_by='patient': source 'scans' has"):
        as_groups(values, 2, "patient", "scans")


def test_messages_say_no_value_of_a_record() -> None:
    for values in (["Jane Doe", None], [2.0**53, "Jane Doe"], ["Jane Doe", {"Jane": "Doe"}]):
        with pytest.raises((TypeError, ValueError)) as caught:
            groups(values)
        for error in (caught.value, caught.value.__context__, caught.value.__cause__):
            assert "Jane" not in repr(error)
            assert "9007" not in repr(error)


@pytest.mark.parametrize(
    "values",
    [
        [3, 1, 3, 2],
        (3, 1, 3, 2),
        np.array([3, 1, 3, 2], np.uint8),
        np.array([3.0, 1, 3, 2], np.float32),
        np.array(["3", "1", " 3", "2"]),
        np.array([b"c", b"a", b"c", b"b"]),
        np.array(["c", 1, "C", "b"], object),
        np.ma.array([3, 1, 3, 2]),
        np.array(["2003", "2001", "2003", "2002"], "M8[Y]"),
        torch.tensor([3, 1, 3, 2]),
        torch.tensor([3, 1, 3, 2], dtype=torch.bfloat16),
        torch.tensor([1.5, 0.5, 1.5, 1], requires_grad=True),
        pa.array([3, 1, 3, 2]),
        pa.array(["c", "a", "c", "b"]).dictionary_encode(),
        pa.chunked_array([[3.0, 1.0], [3.0, 2.0]]),
        pa.array([Decimal("1.5"), Decimal("0.5"), Decimal("1.5"), Decimal("1.0")]),
        iter([3, 1, 3, 2]),
    ],
    ids=shown,
)
def test_every_container_gives_the_same_groups(values: Any) -> None:
    assert as_groups(values, 4, "patient", "scans").tolist() == [2, 0, 2, 1]


def test_many_identifiers_are_numbered_without_a_look_at_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole numbers by NumPy; of text each different one is looked at once."""
    from dpmmd.data import identifiers

    seen: list[Any] = []
    real = identifiers._identifier
    monkeypatch.setattr(identifiers, "canonical", lambda value: 1 / 0)
    monkeypatch.setattr(identifiers, "_identifier", lambda t: seen.append(t) or real(t))
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2**50, 100_000)
    wanted = np.unique(whole, return_inverse=True)[1]
    for values in (whole, whole.astype(float), whole.tolist()):
        assert (as_groups(values, len(whole), "p", "s").numpy() == wanted).all()
    assert seen == []
    few = [f"p{i:04d}" for i in rng.integers(0, 1000, 100_000)]
    found = as_groups(few, len(few), "p", "s").numpy()
    assert (found == np.unique(few, return_inverse=True)[1]).all()
    assert len(seen) == len(set(few))


def test_ordinary_identifiers_have_the_form_that_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpmmd.data import identifiers

    texts = [
        "P-1",
        "p_01",
        "a.1",
        "a--1",
        "A1",
        "e1",
        "nan1",
        "inf-0",
        "true1",
        "t2020-01-02",
        "Z9",
    ]
    texts += ["af" + "6f9619ff8b86d011b42d00c04fc96", "a" + "1" * 30]
    found = [identifiers._identifier(text) for text in texts]
    assert all(map(identifiers._ORDINARY.fullmatch, texts))
    assert not any(map(identifiers._ORDINARY.fullmatch, ("a" + "1" * 31, "1a1", "a 1", "é1", "a١")))
    monkeypatch.setattr(identifiers, "_ORDINARY", re.compile("(?!)"))
    assert found == [identifiers._identifier(text) for text in texts]


# ----------------------------------------------------------------------------- sources


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, *columns: Any) -> Path:
    """A shard for each of the columns of patients."""
    path.mkdir()
    for number, column in enumerate(columns):
        x, y = images(len(column))
        table = pa.table({"image": [png(i[0]) for i in x], "label": y, "patient": column})
        pq.write_table(table, path / f"{number}.parquet")
    return path


def tar(path: Path, patients: list[Any]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, (image, patient) in enumerate(zip(images(9)[0], patients, strict=False)):
            facts = json.dumps({"patient": patient}).encode()
            for name, data in ((f"{number}.png", png(image[0])), (f"{number}.json", facts)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def opened(source: Any, **options: Any) -> list[int]:
    found = open_source(source, group_by="patient", image_size=8, channels=1, **options).groups
    assert found is not None
    return list(found.tolist())


def test_sources_hand_over_values_as_they_are(tmp_path: Path) -> None:
    """What NumPy or Arrow would make one type of is compared value by value."""
    big = 2**53 + 1
    shards = parquet(
        tmp_path / "p", pa.array([1, big, 2**53]), pa.array(["01", str(big)]), pa.array([1.0, 2.0])
    )
    assert opened(shards) == [0, 3, 2, 0, 3, 0, 1]
    assert opened(tar(tmp_path / "t.tar", [big, str(big), 2**53, 1, "1.0", 1.0])) == [
        2, 2, 1, 0, 0, 0
    ]  # fmt: skip
    x, y = images(4)
    assert opened((x, y, [big, 2**53, 1.0, "1"])) == [2, 1, 0, 0]
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    data.patient = [big, "a", 2**53, " A"]  # type: ignore[attr-defined]
    assert opened(Subset(Subset(data, [3, 2, 1]), torch.tensor([0, 2, 1]))) == [1, 1, 0]
    np.savez(tmp_path / "n.npz", x=x, y=y, patient=np.array(["1", "é", "e\u0301", "1 "]))
    assert opened(tmp_path / "n.npz") == [0, 1, 1, 0]
    for number, name in enumerate(["Anna", "anna ", "e\u0301", "é"]):
        (tmp_path / "f" / name).mkdir(parents=True)
        Image.fromarray(x[number, 0]).save(tmp_path / "f" / name / f"{number}.png")
    folder = open_source(tmp_path / "f", group_by="folder", image_size=8, channels=1)
    assert folder.groups is not None
    assert folder.groups.tolist() == [0, 0, 1, 1]


def test_missing_groups_of_sources_are_refused(tmp_path: Path) -> None:
    x, y = images(3)
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    data.patient = ["a", math.nan, "b"]  # type: ignore[attr-defined]
    np.savez(tmp_path / "n.npz", x=x, y=y, patient=np.array(["a", math.nan, "b"]))  # 'nan'
    columns = (
        ["a", None, "b"], [1, None, 2], [1.5, None, 2.0], [DAY, None, DAY],
        pa.array(["a", None, "b"]).dictionary_encode(), ["a", "", "b"], pa.nulls(3),
    )  # fmt: skip
    sources: list[Any] = [
        (x, y, ["a", math.nan, "b"]),
        (x, y, ["a", None, "b"]),
        (x, y, np.ma.array([1, 2, 3], mask=[0, 1, 0])),
        data,
        Subset(data, [0, 1]),
        tmp_path / "n.npz",
        tar(tmp_path / "t.tar", ["a", math.nan, "b"]),
        tar(tmp_path / "u.tar", ["a", " ", "b"]),
        *(parquet(tmp_path / f"p{i}", column) for i, column in enumerate(columns)),
    ]
    for source in sources:
        with pytest.raises(
            ValueError, match=r"^group_by='patient': some images of source .* no gro"
        ):
            opened(source)
    with pytest.raises(ValueError, match=r"^group_by='patient': source .* without that key"):
        opened(tar(tmp_path / "v.tar", ["a", None, "b"]))
    (tmp_path / "f" / "unknown").mkdir(parents=True)
    Image.fromarray(x[0, 0]).save(tmp_path / "f" / "unknown" / "1.png")
    with pytest.raises(ValueError, match="a group that is really called so another name"):
        open_source(tmp_path / "f", group_by="folder", image_size=8, channels=1)
    data.patient = "abc"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"^group_by='patient': .* groups of type str"):
        opened(Subset(data, [0, 1]))


def test_one_patient_under_several_spellings_weighs_no_more_than_one() -> None:
    """Split in two, a patient of two images would move the sums by up to twice their share."""
    x, y = images(6)
    options: dict[str, Any] = {
        "epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one", "num_classes": 3,
        "group_by": "patient", "insecure_test_noise": no_noise, "progress": False,
    }  # fmt: skip
    plain = dpmmd.release((x, y, [0, 0, 0, 1, 1, 2]), small_encoder(), **options)
    spelled = ["P 1", b"p 1", "p  1\n", 7, "07", "P 2"]
    again = dpmmd.release((x, y, spelled), small_encoder(), **options)
    assert torch.equal(plain.sums, again.sums)
    assert torch.equal(plain.counts, again.counts)
    assert again.metadata.num_units == 3


def test_masked_labels_are_refused() -> None:
    x, y = images(3)
    with pytest.raises(ValueError, match=r"labels of source 'arrays' have missing values"):
        open_source((x, np.ma.array(y, mask=[0, 1, 0])))
    assert open_source((x, np.ma.array(y))).labelled
