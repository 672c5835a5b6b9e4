"""Numbers as people read them: 45.2 %, 1.3 M tokens, 4.1 TFLOP, 3 min 20 s. What is absent is `not measured`, never 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

ABSENT = "not measured"
MINUS = "\u2212"
_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _digits(value: float, digits: int = 2) -> str:
    """At least `digits` significant digits, without an exponent: 4.13 -> '4.1', 41.3 -> '41', 0.0413 -> '0.041'."""
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, places)
    if abs(rounded) >= 10 ** (digits - 1 - places + 1):  # 9.96 rounds to 10, not to 10.0
        places = max(0, places - 1)
    return f"{rounded:.{places}f}".replace("-", MINUS)


def _scaled(value: float, unit: str, digits: int = 2) -> str:
    for size, prefix in _LARGE:
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{_digits(value / size, digits)} {prefix}{unit}"
    return f"{_digits(value, digits)} {unit}".rstrip()


def percent(share: float | None, places: int = 1) -> str:
    """0.452 -> '45.2 %'."""
    return ABSENT if share is None else f"{100 * share:.{places}f} %"


def points(difference: float | None) -> str:
    """A difference of two shares, signed, in percentage points: 0.421 -> '+42.1'."""
    if difference is None:
        return ABSENT
    said = f"{100 * difference:+.1f}".replace("-", MINUS)
    return "0.0" if said[1:] == "0.0" else said


def signed(value: float) -> str:
    """0.7244 -> '+0.724', -1.2 -> '−1.20'."""
    return f"+{plain(value)}" if value > 0 else plain(value)


def interval(limits: Sequence[float] | None) -> str:
    """(0.42, 0.482) -> '42.0 to 48.2 %'."""
    return ABSENT if limits is None else f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f} %"


def points_interval(limits: Sequence[float] | None) -> str:
    """(-0.01, 0.018) -> '−1.0 to +1.8'."""
    return ABSENT if limits is None else f"{points(limits[0])} to {points(limits[1])}"


def probability(p: float | None) -> str:
    """'p = 0.0031', 'p < 0.0001'; never 'p = 0'."""
    if p is None:
        return ABSENT
    if p < 0.0001:
        return "p < 0.0001"
    return f"p = {p:.4f}" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def whole(n: float | None) -> str:
    """12345 -> '12,345'."""
    return ABSENT if n is None else f"{round(n):,}".replace("-", MINUS)


def count(n: float | None) -> str:
    """Whole up to 9,999, then two digits and a prefix: 1 312 345 -> '1.3 M'."""
    if n is None:
        return ABSENT
    if abs(n) < 10_000:
        return whole(n) if n == round(n) or abs(n) >= 100 else _digits(n, 3 if abs(n) >= 10 else 2)
    return _scaled(n, "")


def tokens(n: float | None) -> str:
    return ABSENT if n is None else f"{count(n)} token{'' if n == 1 else 's'}"


def flops(n: float | None) -> str:
    return ABSENT if n is None else _scaled(n, "FLOP")


def duration(seconds: float | None) -> str:
    """0.42 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{_digits(seconds)} s" if seconds >= 0.001 or seconds == 0 else "under 1 ms"
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s" if whole_s % 60 else f"{whole_s // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def size(n: float | None) -> str:
    """Bytes, decimal: 812 MB."""
    if n is None:
        return ABSENT
    return f"{whole(n)} B" if abs(n) < 999.5 else _scaled(n, "B", 3)


def plain(value: float | None, digits: int = 3) -> str:
    """A bare number: 0.00042 -> '0.00042', 1e-05 -> '1e-5'."""
    if value is None:
        return ABSENT
    if value != 0 and (abs(value) < 1e-4 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}".replace("-", MINUS)
    return _digits(value, digits)


def many(n: int, word: str, plural: str | None = None) -> str:
    """'1 row', '1,200 rows'."""
    return f"{whole(n)} {word if n == 1 else plural or word + 's'}"
