"""Numbers as text: durations, sizes, counts, percentages and measurements."""

import math


def duration(seconds: float | None) -> str:
    """Return seconds as "0.4 s", "12 s", "3 min 05 s" or "1 h 02 min", or "-" if unknown."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Return bytes in decimal units with three digits, as disks and the Hub show them."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{_digits(value, 3)} {unit}"
        value /= 1000
    return f"{_digits(value, 3)} TB"


def count(value: float) -> str:
    """Return a count with thousands separators."""
    return f"{value:,.0f}"


def parameters(value: float) -> str:
    """Return a number of parameters as "135 M" or "8.03 B"."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_digits(value / limit, 3)} {unit}"
    return count(value)


def percent(value: float) -> str:
    """Return a fraction as a percentage; only the value zero is shown as zero."""
    value = 100 * value
    if value and abs(value) < 0.05:
        return "< 0.1 %" if value > 0 else "> -0.1 %"
    return f"{value:.1f} %"


def percent_pair(before: float, after: float) -> tuple[str, str]:
    """Return two fractions of right answers as percentages, with the decimals of their change."""
    decimals = change_decimals(after - before)
    return f"{100 * before:.{decimals}f} %", f"{100 * after:.{decimals}f} %"


def points(change: float) -> str:
    """Return a change of a fraction of right answers with its sign, in points of percent."""
    return f"{100 * change:+.{change_decimals(change)}f}"


def change_decimals(change: float) -> int:
    """Return the decimals of a percentage: none for changes that are 10 points when rounded."""
    return 0 if abs(change) >= 0.0995 else 1


def number(value: float | None, digits: int = 4) -> str:
    """Return a measurement with `digits` significant digits and thousands separators."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-4 or magnitude >= 1e9:
        return f"{value:.{max(digits - 2, 1)}g}"
    return _digits(value, digits)


def number_pair(before: float | None, after: float | None) -> tuple[str, str]:
    """Return two measurements of the same quantity with equally many decimals.

    The larger has three significant digits, and the smaller at least two.
    """
    values = [abs(value) for value in (before, after) if value and math.isfinite(value)]
    if before is None or after is None or len(values) < 2:
        return number(before, 3), number(after, 3)
    digits = [math.floor(math.log10(value)) + 1 for value in (max(values), min(values))]
    decimals = max(3 - digits[0], 2 - digits[1], 0)
    return f"{before:,.{decimals}f}", f"{after:,.{decimals}f}"


def signed(value: float, digits: int = 4) -> str:
    """Return a difference with its sign."""
    text = number(value, digits)
    return text if value <= 0 or text == "-" else f"+{text}"


def _digits(value: float, digits: int) -> str:
    """Return the value with `digits` significant digits, without trailing zeros."""
    before_point = math.floor(math.log10(abs(value))) + 1 if value else 1
    text = f"{value:,.{max(digits - before_point, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
