"""Numbers as text, the same in the page, in Markdown and in the tables of the command line; ABSENT for None."""

from __future__ import annotations

import math

from layerboost.schemas.evaluation import Change
from layerboost.schemas.sensitivity import Score

ABSENT = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits and separated thousands: 0.0123, 12.3, 1,234."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -5 <= power <= 14:
        return minus(f"{value:.{digits - 1}e}")
    return minus(f"{value:,.{max(0, digits - 1 - power)}f}")


def with_error(score: Score | None, signed: bool = False) -> str:
    """Return a mean and its standard error, both to the error's second digit: 0.0123 ± 0.0041."""
    if score is None:
        return ABSENT
    mean, error = score.mean, score.standard_error
    if not math.isfinite(mean) or not math.isfinite(error) or error <= 0:
        return f"{'+' if signed and mean > 0 else ''}{number(mean)} (no standard error)"
    power = math.floor(math.log10(error))
    if power < -6:
        text = f"{mean:.2e} ± {error:.1e}"
    else:
        places = max(0, 1 - power)
        text = f"{mean:,.{places}f} ± {error:,.{places}f}"
    return minus(f"+{text}" if signed and mean > 0 else text)


def interval(mean: float, low: float, high: float, signed: bool = False) -> str:
    """Return a mean with its 95 % interval in brackets, to the interval's second digit: −0.6 (−2.1 to +0.8)."""
    if not all(map(math.isfinite, (mean, low, high))):
        return "not finite"
    half = (high - low) / 2
    places = max(0, 1 - math.floor(math.log10(half))) if half > 1e-6 else 4

    def written(value: float) -> str:
        text = f"{value:,.{places}f}"
        if float(text.replace(",", "")) == 0:
            return text.removeprefix("-")
        return minus(f"+{text}" if signed and value > 0 else text)

    return f"{written(mean)} ({written(low)} to {written(high)})"


def with_interval(change: Change | None, signed: bool = True, scale: float = 1.0) -> str:
    """Return a change times `scale` with its 95 % interval; 100 converts fractions to points."""
    return interval(scale * change.mean, scale * change.low, scale * change.high, signed) if change else ABSENT


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction as a percentage: 0.4231 is 42.3 %."""
    return minus(f"{100 * fraction:.{digits}f} %")


def size(count: float) -> str:
    """Return bytes in binary units: 23.6 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{number(count)} {unit}"
        count /= 1024
    return f"{number(count)} GiB"


def duration(seconds: float) -> str:
    """Return seconds as 8.2 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def minus(text: str) -> str:
    """Return text with a typographic minus, as wide as a digit in tables; exponents keep their hyphen."""
    return f"−{text[1:]}" if text.startswith("-") else text
