"""What people read: bounds rounded outward, and text of others that stays text.

A bound that is printed is never better than the one that is kept: `up` and `down` give the nearest
decimal number of so many digits that is not below, or not above, the double (as it is written: its
shortest decimal). Names come from files that anybody may have written: `plain` leaves nothing in
them that a terminal obeys, and `markdown` nothing that a Markdown or HTML renderer does.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

LONGEST = 200  # characters of a name that are printed
_MARKDOWN = {c: f"\\{c}" for c in "\\`*_[]|~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def up(value: float, digits: int = 6) -> str:
    """The least decimal number of so many significant digits that is at least ``value``."""
    return _rounded(value, digits, ROUND_CEILING)


def down(value: float, digits: int = 6) -> str:
    """The largest decimal number of so many significant digits that is at most ``value``."""
    return _rounded(value, digits, ROUND_FLOOR)


def percent(share: float, places: int) -> str:
    """A share of at most so much, in percent, rounded up to so many decimal places."""
    if not math.isfinite(share):
        return str(share)
    step = Decimal(1).scaleb(-places)
    return f"{(100 * Decimal(repr(share))).quantize(step, ROUND_CEILING)}%"


def _rounded(value: float, digits: int, rounding: str) -> str:
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    number = Context(prec=digits, rounding=rounding).create_decimal(repr(value)).normalize()
    if -5 < number.adjusted() < digits:
        return f"{number:f}"
    mantissa, _, exponent = f"{number:e}".partition("e")
    return f"{mantissa}e{int(exponent):+03d}"


def at_least(exact: Fraction) -> float:
    """The least double that is not below a number."""
    value = float(exact)
    return value if Fraction(value) >= exact else math.nextafter(value, math.inf)


def plain(text: object, longest: int | None = LONGEST) -> str:
    """One line: what is not printable, line ends and direction marks too, as escapes; cut off."""
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = shown[: longest - 3] + "..."
    return "".join(c if c.isprintable() else _escaped(c) for c in shown)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def markdown(text: object) -> str:
    """`plain`, with every character that Markdown or HTML gives a meaning to as itself."""
    shown = "".join(_MARKDOWN.get(c, c) for c in plain(text, None))
    return shown.replace("://", "&#58;//")  # or renderers make links of addresses
