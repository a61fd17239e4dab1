"""Identifiers of groups: which of them are equal, and which are missing.

What is promised to a group holds for a person only if all images of that person carry one
identifier. A table rarely spells it in one way: it is a number in one file and text in another, it
has a space at its end, or it was read as floating point because one row has none. So identifiers
are compared by a canonical form, `canonical`, and values that have the same one are one group:

- whole numbers of every type (int, bool, float, Decimal, Fraction, NumPy, torch, Arrow) by their
  value; numbers with a fraction by the double that is nearest to them;
- text that spells a number (``"1"``, ``" 01"``, ``"1.0"``, ``"1e0"``) as that number, and
  ``"true"`` and ``"false"`` as 1 and 0;
- other text without white space and quotes at its ends, without invisible characters, with one
  space for several, one kind of dash and quote, the digits 0 to 9 for those of every script, in
  Unicode's form NFKC, regardless of case and of accents; bytes as the UTF-8 text that they hold;
- dates and times by their instant (one without a time zone is in UTC), also where they are text
  with the year first; a day alone as the number YYYYMMDD, as many tables write it; UUIDs by their
  32 digits.

Where in doubt they are merged: one group too few gives the images of two people the weight of one
person's, which costs utility. One group too many lets a person move the sums by more than the
declared sensitivity. What cannot be compared safely is refused: missing values, floating-point
numbers that may have lost digits, and types whose equality nobody knows. No message says a value.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import string
import unicodedata
import uuid
from collections.abc import Mapping, Set
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Text that stands for no identifier, whatever punctuation is around it ("<NA>", "#N/A", "-nan").
_MISSING = frozenset(
    (
        *("", "nan", "nat", "na", "n/a", "n.a", "n a", "n/a n/a", "none", "null", "nil", "missing"),
        *("unknown", "undefined", "masked", "not available", "not applicable", "1.#qnan", "1.#ind"),
        *("inf", "infinity", "void", "blank", "empty", "leer", "unk", "n/k", "n/d", "tbd", "tba"),
        *("not known", "not recorded", "not specified", "not provided", "not given", "not set"),
        *("not entered", "not found", "unspecified", "unrecorded", "unavailable", "no data"),
        *("no value", "no id", "no name", "to be determined", "keine angabe", "unbekannt"),
    )
)
# What a table's program writes for a cell that it could not compute, in every language ("#REF!",
# "#DIV/0!", "#NAME?", "Err:502").
_NO_CELL = re.compile(r"#\S*[!?]|#nv|#getting_data|err:\d{3}")
_AROUND = string.punctuation + " "
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?")
# Most identifiers: they spell nothing else, none of them is missing, and only case can differ. At
# most 31 characters: a UUID has 32 digits.
_ORDINARY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,29}[0-9]")
_JOINS = re.compile("[-_ ]+")
_UUID = re.compile(
    r"(?:urn:uuid:)?\{?([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})\}?"
)
_TIME = re.compile(
    r"(\d{4})([-/.])(\d\d?)\2(\d\d?)(?:[t ](\d\d)(?::?(\d\d)(?::?(\d\d)(?:[.,](\d+))?)?)?)?"
    r" ?(z|utc|[+-]\d\d(?::?\d\d)?)?"
)
_WORDS = {"true": 1, "false": 0}
# Unicode's Default_Ignorable_Code_Point, from DerivedCoreProperties.txt of Unicode 15.1: what a
# program shows nothing for. Python's unicodedata does not have it. First and last of each range.
_IGNORABLE = (
    *((0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5)),
    *((0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164)),
    *((0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3)),
    *((0x1D173, 0x1D17A), (0xE0000, 0xE0FFF)),
)
# Others whose picture is blank: the Braille pattern of no dots, Egyptian blanks, the Khitan filler,
# the null notehead.
_BLANK = ((0x2800, 0x2800), (0x13441, 0x13442), (0x16FE4, 0x16FE4), (0x1D159, 0x1D159))
_UNSEEN = ("Cc", "Cf")  # Unicode's categories of control and format characters
# The blocks of marks that combine with every letter: accents and the like.
_MARKS = (
    *((0x0300, 0x036F), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE20, 0xFE2F)),
)
_QUOTES = frozenset(
    "\"'`\u00a8\u00ab\u00b4\u00bb\u02b9\u02ba\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u02ee\u0374"
    "\u0384\u055a\u05f3\u05f4\u07f4\u07f5\u1fbd\u1fbf\u1fef\u1ffd\u1ffe\u2018\u2019\u201a\u201b\u201c\u201d"
    "\u201e\u201f\u2032\u2033\u2034\u2035\u2036\u2037\u2039\u203a\u2057\u275b\u275c\u275d\u275e\u301d"
    "\u301e\u301f\ua78b\ua78c\uff02\uff07\uff40"
)
_DASHES = frozenset("\u02d7\u2043\u207b\u208b\u2212\u2796")  # beyond those of the category Pd
_RUN = re.compile("''+")
_ZEROS = re.compile(r"(?<![\d.,])0+(?=\d)")
_ASCII = str.maketrans({'"': "'", "`": "'"})


def _points(*tables: tuple[tuple[int, int], ...]) -> frozenset[int]:
    return frozenset(
        code for table in tables for first, last in table for code in range(first, last + 1)
    )


class _Alike(dict[int, str]):
    """For `str.translate`: one character for all that look or mean the same, none for unseen."""

    _unseen = _points(_IGNORABLE, _BLANK)

    def __missing__(self, code: int) -> str:
        self[code] = found = self._found(code)
        return found

    def _found(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace():
            return " "
        if code in self._unseen or category in _UNSEEN:
            return ""
        if character in _QUOTES:
            return "'"
        if character in _DASHES or category == "Pd":
            return "-"
        if code == 0x066B:  # the Arabic decimal separator
            return "."
        digit = unicodedata.digit(character, None)
        return character if digit is None else str(digit)


_ALIKE = _Alike()
_UNMARKED: dict[int, str | None] = {**dict.fromkeys(_points(_MARKS)), 0x0131: "i"}  # dotless i
_FIXED = (bytes, float, np.float64)  # types whose equal values are equal identifiers


Key = Any  # int, float, Decimal, Fraction or str


class IdentifierError(Exception):
    """Identifiers that cannot be used; {source} in the text is the source. It says no value."""

    def __init__(self, kind: type[Exception], message: str) -> None:
        super().__init__(message)
        self.kind = kind


def raw_values(values: Any) -> np.ndarray[Any, Any] | list[Any]:
    """The identifiers as they are: an array of one type, or a list in which none has been changed.

    NumPy makes text of everything in ``["a", nan]`` and floats of ``[2**60, 0.5]``: lists stay
    lists. A masked array has its masked values as None.
    """
    if isinstance(values, np.ma.MaskedArray):
        if not np.ma.getmaskarray(values).any():
            return np.asarray(values.data)
        if values.ndim == 1:
            return [None if hidden else v for v, hidden in zip(*_masked(values), strict=True)]
        return np.asarray(values.filled())  # refused for its shape
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, Tensor):
        tensor = _plain(values)
        if tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS:
            return list(tensor) if tensor.ndim == 1 else np.empty(tuple(tensor.shape))
        return tensor.resolve_conj().resolve_neg().numpy()
    if hasattr(values, "to_pylist") and hasattr(values, "type"):
        return _from_arrow(values)
    nested = getattr(values, "ndim", 1) != 1
    if nested or isinstance(values, str | bytes | bytearray | Mapping | Set):
        raise _not_a_sequence(values)
    try:
        return list(values)
    except TypeError:
        raise _not_a_sequence(values) from None


_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor that NumPy can read, on the CPU: not sparse, quantized, nested or without data."""
    odd = {
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        "meta": tensor.is_meta,
        "sparse": tensor.layout != torch.strided,
    }
    kind = next((kind for kind, found in odd.items() if found), None)
    if kind is not None:
        raise IdentifierError(
            TypeError,
            f"source {{source}} has groups in a {kind} tensor; expected a dense one, with the "
            "group of each image.",
        )
    return tensor.detach().cpu()


def _masked(values: Any) -> tuple[list[Any], list[bool]]:
    return list(values.data), np.ma.getmaskarray(values).tolist()


def _from_arrow(values: Any) -> list[Any]:
    """A pyarrow Array or ChunkedArray as a list; nulls are None, NaN or NaT."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        return _from_arrow(values.cast(kind.value_type))
    if pa.types.is_floating(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        # Single precision stays what it is; Python has no nanoseconds.
        column = pa.chunked_array([values]) if isinstance(values, pa.Array) else values
        return list(column.to_numpy())
    return list(values.to_pylist())


def _not_a_sequence(values: Any) -> IdentifierError:
    return IdentifierError(
        TypeError,
        f"source {{source}} has groups of type {type(values).__name__}; expected an array or a "
        "list with the group of each image.",
    )


def numbered(values: np.ndarray[Any, Any] | list[Any]) -> np.ndarray[Any, Any]:
    """Identifiers as `raw_values` gives them -> int64 [N] from 0 on; equal ones have one number.

    Raises:
        IdentifierError: as `canonical`.
    """
    if isinstance(values, np.ndarray):
        whole = _whole(values)
        if whole is not None:
            return np.unique(whole, return_inverse=True)[1].reshape(-1).astype(np.int64)
        # tolist() would make doubles of single precision, and integers of nanoseconds
        values = values.tolist() if values.dtype.kind in "OUST" else list(values)
    texts = {value: _identifier(value) for value in {v for v in values if type(v) is str}}
    known = _Known()
    keys = [
        texts[value] if type(value) is str
        else value if type(value) is int
        else known[type(value), value] if type(value) in _FIXED
        else canonical(value)
        for value in values
    ]  # fmt: skip
    if set(map(type, keys)) == {int}:
        with contextlib.suppress(OverflowError):
            return numbered(np.fromiter(keys, np.int64, len(keys)))
    distinct = set(keys)
    words = sorted(key for key in distinct if isinstance(key, str))
    numbers = sorted(key for key in distinct if not isinstance(key, str))
    codes = {key: code for code, key in enumerate([*numbers, *words])}
    return np.fromiter(map(codes.__getitem__, keys), np.int64, len(keys))


def _whole(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """An array of whole numbers as integers, without a look at each; None for any other."""
    if array.dtype.kind in "iub":
        return array
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        return None
    if (np.trunc(array) != array).any() or (np.abs(array) >= _exact_below(array.dtype)).any():
        return None
    return array.astype(np.int64)


def _exact_below(dtype: Any) -> float:
    """Below it every whole number has a floating-point number of its own: 2^53 for doubles."""
    return min(2 / float(np.finfo(dtype).eps), 2.0**63)


_EXACT = _exact_below(np.float64)


class _Known(dict[tuple[type, Any], Key]):
    """The canonical form of each (type, value), computed once."""

    def __missing__(self, pair: tuple[type, Any]) -> Key:
        self[pair] = key = canonical(pair[1])
        return key


def canonical(value: Any) -> Key:
    """What is the same of equal identifiers: a number or a text.

    Raises:
        IdentifierError: a missing value (None, NaN, NaT, NA, masked, infinite, or text that says
            so), a floating-point number that may have been rounded, or another type.
    """
    if isinstance(value, str):
        return _identifier(str.__str__(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return _identifier(bytes(value).decode("utf-8", "surrogateescape"))
    if isinstance(value, float | np.floating):
        return _float(value)
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas.NA, pandas.NaT
        raise _missing()
    if isinstance(value, int | np.bool_ | np.integer) and not isinstance(value, np.timedelta64):
        return int(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise _missing()
        return _finite(_decimal(value))
    if isinstance(value, Fraction):
        return value.numerator if value.denominator == 1 else _nearest(value)
    if isinstance(value, uuid.UUID):
        return _identifier(value.hex)
    if isinstance(value, datetime.date | np.datetime64):
        return _identifier(_iso(value))
    held = _held(value)
    if held is not value:
        return canonical(held)
    raise IdentifierError(
        TypeError,
        f"source {{source}} has groups of type {type(value).__name__}; expected numbers, text, "
        "dates or UUIDs; give each group a number or a name, e.g. columns joined into one text.",
    )


def folded(text: str) -> str:
    """Text without what its spelling may differ in: case, white space, forms of Unicode.

    Letters with an accent and letters without one stay different.
    """
    if text.isascii() and text.isprintable():
        text = text.translate(_ASCII) if '"' in text or "`" in text else text
    else:  # acute accents before NFKC, which would make a space of one; others come from it
        text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).casefold()
        text = unicodedata.normalize("NFKC", text.translate(_ALIKE))
    if "'" in text:
        text = _RUN.sub("'", text).strip("' ")
    return " ".join(text.lower().split())


def unmarked(text: str) -> str:
    """Folded text without accents, so that "İ" is "i" and "é" is "e"."""
    if text.isascii():
        return text
    bare = unicodedata.normalize("NFKD", text).translate(_UNMARKED)
    return " ".join(unicodedata.normalize("NFKC", bare).split())


def without_zeros(text: str) -> str:
    """Text without the zeros before its whole numbers: "ward 03" as "ward 3"."""
    return _ZEROS.sub("", text)


def spelled(text: str) -> Key:
    """What folded text spells: a number, an instant, a UUID's digits; else the text itself.

    A number that is too large for anything but its exponent ("1e999") is infinite.
    """
    if text in _WORDS:
        return _WORDS[text]
    if len(text) >= 32 and (found := _UUID.fullmatch(text)):
        text = "".join(found.groups())
    if text.isdecimal() and len(text) < 19:
        return int(text)
    first = text[:1]
    if first.isdecimal() or first in ("+", "-", "."):
        if _NUMBER.fullmatch(text):
            try:
                return _decimal(Decimal(text))
            except InvalidOperation:  # an exponent that no number has
                return math.inf
        if found := _TIME.fullmatch(text):
            return _instant(found)
    return text


def _identifier(text: str) -> Key:
    if _ORDINARY.fullmatch(text):
        return text.lower()
    text = unmarked(folded(text))
    bare = text.strip(_AROUND)
    if bare in _MISSING or text == "\\n" or not (text.isascii() or any(map(str.isalnum, text))):
        raise _missing()  # databases write \\N
    if ("_" in bare or "-" in bare) and _JOINS.sub(" ", bare) in _MISSING:
        raise _missing()
    if text[0] in "#e" and _NO_CELL.fullmatch(text):
        raise _missing()
    return _finite(spelled(text))


def _finite(key: Key) -> Key:
    if isinstance(key, float) and math.isinf(key):
        raise _missing()
    return key


def _held(value: Any) -> Any:
    """The one value that an array, a tensor or an Arrow scalar holds; anything else as it is."""
    if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        tensor = _plain(value).reshape(())
        if tensor.is_floating_point() and tensor.dtype not in _NUMPY_FLOATS:
            return _half(tensor)
        return tensor.numpy()[()]
    if isinstance(value, np.ndarray) and value.size == 1:
        return value.reshape(())[()]
    if hasattr(value, "as_py") and hasattr(value, "type"):
        return _from_arrow(_column(value))[0]
    return value


def _half(value: Tensor) -> np.floating[Any] | float:
    """A number of a type that NumPy does not have (bfloat16)."""
    number = value.double().item()
    if math.isfinite(number) and abs(number) >= 2 / torch.finfo(value.dtype).eps:
        raise _rounded()
    return np.float32(number)


def _column(value: Any) -> Any:
    import pyarrow as pa

    return pa.array([value], value.type)


def _float(value: float | np.floating[Any]) -> Key:
    number = float(value)
    if not math.isfinite(number):
        raise _missing()
    double = isinstance(value, float)  # np.float64 is one
    if value.is_integer():
        if abs(number) >= (_EXACT if double else _exact_below(type(value))):
            raise _rounded()
        return int(value)
    if not double and np.finfo(type(value)).bits < 64 and number != float(str(value)):
        raise _rounded()  # 0.1 of single precision equals neither 0.1 of double nor "0.1"
    return number


def _decimal(value: Decimal) -> Key:
    """A key that equals, and has the hash of, the int or float of the same value.

    One that is beyond floating point and has no digits down to its units is infinite: a program
    has written so what overflowed.
    """
    if value and value.adjusted() > 308 and int(value.as_tuple().exponent) > 0:
        return math.copysign(math.inf, value)
    return value if value == value.to_integral_value() else _nearest(value)


def _nearest(value: Decimal | Fraction) -> Key:
    try:
        return float(value)
    except OverflowError:
        return value


def _iso(value: Any) -> str:
    if isinstance(value, np.datetime64):
        if np.isnat(value):
            raise _missing()
        unit = np.datetime_data(value.dtype)[0]
        coarse = {"Y": "D", "M": "D", "W": "D", "h": "s", "m": "s"}
        return str(value.astype(f"datetime64[{coarse[unit]}]") if unit in coarse else value)
    return str(value.isoformat())


def _instant(found: re.Match[str]) -> Key:
    """ISO text of the same instant, with no more digits than needed; YYYYMMDD for midnight.

    A day alone need not be one that there is: then the digits are compared.
    """
    year, _, month, day, hour, minute, second, fraction, zone = found.groups()
    date = f"{year}-{month:0>2}-{day:0>2}"
    if hour is None and zone is None:
        return int(date.replace("-", ""))
    try:
        at = datetime.datetime.fromisoformat(f"{date}T{hour or '00'}:{minute or '00'}")
        at += datetime.timedelta(seconds=int(second or 0))
        if zone not in (None, "z", "utc"):
            digits = zone[1:].replace(":", "").ljust(4, "0")
            offset = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            at = at - offset if zone[0] == "+" else at + offset
    except (ValueError, OverflowError):  # a time that there is not
        return found.string
    fraction = (fraction or "").rstrip("0")
    if not fraction and at.time() == datetime.time():
        return int(at.date().isoformat().replace("-", ""))
    return at.isoformat() + (f".{fraction}" if fraction else "")


def _missing() -> IdentifierError:
    return IdentifierError(
        ValueError,
        "some images of source {source} have no group: a missing value such as None or NaN, empty "
        "text, or text such as 'nan', 'n/a' or 'unknown'. Give each image one: an image that "
        "stands alone a group of its own, and a group that is really called so another name.",
    )


def _rounded() -> IdentifierError:
    return IdentifierError(
        ValueError,
        "source {source} has groups that are floating-point numbers of more digits than their type "
        "holds, and may have been rounded; give them as integers or text, read again from where "
        "they come from.",
    )
