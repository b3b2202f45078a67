"""Series out of metric records, and numbers as people read them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ra3_megatron.report.schema import METRICS, WALL

Row = tuple[str, str]
"""Label and value."""

MINUS = "\N{MINUS SIGN}"


def series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every record that has the metric."""
    inside = (lambda r: r.get(WALL, {})) if METRICS[name].wall else (lambda r: r)
    return [(record["step"], inside(record)[name]) for record in records if name in inside(record)]


def finite_series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Like `series`, empty when no value is finite."""
    found = series(records, name)
    return found if any(math.isfinite(y) for _, y in found) else []


def last(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """The latest value of a metric; None when it was never measured."""
    found = series(records, name)
    return found[-1][1] if found else None


def number(value: float | None, form: str = ".4f") -> str:
    """`value` with a proper minus; a dash for what was not measured or is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    return format(value, form).replace("-", MINUS)


def with_error(value: float | None, error: float | None, form: str = ".4f") -> str:
    """`value ± error`; just the value where no error was measured, `± unknown` where it could not be."""
    if value is None or error is None or not math.isfinite(value):
        return number(value, form)
    if not math.isfinite(error):
        return f"{number(value, form)} ± unknown"
    return f"{number(value, form)} ± {number(error, form.removeprefix('+'))}"


def interval(value: float | None, low: float | None, high: float | None, form: str = ".4f") -> str:
    """`value [low, high]`; without an interval just the value."""
    if value is None or low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return number(value, form)
    return f"{number(value, form)} [{number(low, form)}, {number(high, form)}]"


def scaled(value: float | None, unit: str) -> str:
    """`value` in thousands, millions, ..., such as `3.21 PFLOP`."""
    if value is None or not math.isfinite(value):
        return "–"
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} Y{unit}"


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that leaves one to four figures, such as `1.9 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def flatten_numbers(content: Any, prefix: str = "") -> list[Row]:
    """Every number in nested dicts as (`outer / inner`, formatted value); lists, texts and booleans are left out.

    A count that comes with its `meaning` is one row that says it.
    """
    if isinstance(content, dict):
        if content.keys() == {"count", "meaning"}:
            return [(f"{row[0]}: {content['meaning']}", row[1]) for row in flatten_numbers(content["count"], prefix)]
        return [row for k, v in content.items() for row in flatten_numbers(v, f"{prefix} / {k}" if prefix else str(k))]
    if isinstance(content, bool) or not isinstance(content, int | float):
        return []
    return [(prefix.replace("_", " "), f"{content:,}" if isinstance(content, int) else f"{content:,.6g}")]


def leaves(content: Any, prefix: str = "") -> Iterator[Row]:
    """Every leaf of nested plain data as (`outer / inner`, text); a list is one leaf."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{prefix} / {key}" if prefix else str(key))
    elif isinstance(content, list):
        yield prefix, ", ".join(str(item) for item in content)
    else:
        yield prefix, str(content)
