"""Numbers as people read them: 12.3 k parameters, 97.4 %, 1.20 ms, 3 min 5 s."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

Kind = Literal["share", "count", "bytes", "ms", "seconds", "plain"]

SHARES = {"accuracy", "acc", "auc", "auroc", "f1", "precision", "recall", "sparsity", "ece"}
COUNTS = {"params", "parameters", "flops", "macs", "traffic", "weights"}
NARROW = "\u202f"  # a narrow space that does not break


def kind(name: str, values: Iterable[float] = ()) -> Kind:
    """What the metric called ``name`` counts; a share only if all ``values`` lie in [0, 1]."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & SHARES:
        return "share" if all(0 <= value <= 1 for value in values) else "plain"
    if words & {"bytes"}:
        return "bytes"
    if words & {"ms"}:
        return "ms"
    if words & {"seconds"}:
        return "seconds"
    return "count" if words & COUNTS else "plain"


def number(name: str, value: float) -> str:
    """``value`` of the metric ``name`` with its unit, to about three digits."""
    return column(name, [value])[0]


def column(name: str, values: Sequence[float]) -> list[str]:
    """Texts of ``values`` of the metric ``name``: three digits, or as many more as keep different values apart."""
    write = _WRITERS[kind(name, [value for value in values if math.isfinite(value)])]
    for digits in range(3, 7):
        texts = [write(value, digits) if math.isfinite(value) else str(value) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts if values else []


def duration(seconds: float) -> str:
    """``3 min 5 s``, ``2 h 10 min``, ``0.42 s``."""
    if seconds < 10:
        return f"{seconds:.2g}{NARROW}s"
    whole = round(seconds)
    units = [("d", whole // 86400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60)]
    first = next(i for i, (_, count) in enumerate(units) if count)
    return " ".join(f"{count}{NARROW}{unit}" for unit, count in units[first : first + 2] if count)


def _scaled(value: float, digits: int, unit: str = "") -> str:
    if value == int(value) and abs(value) < 1000:
        return f"{value:.0f}" + (NARROW + unit if unit else "")
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "k"), (0, "")):
        # what rounds up to 1000 belongs to the next prefix
        if abs(float(f"{value:.{digits}g}")) >= 1000**power or not power:
            text = _digits(value / 1000**power, digits)
            return text + (NARROW + prefix + unit if prefix + unit else "")
    raise AssertionError("the last power is 0")


def _digits(value: float, digits: int) -> str:
    """``value`` to ``digits`` significant digits, zeros at the end kept; tiny and huge ones as 1.2e-07."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.{digits}g}"))))
    text = f"{value:.{max(digits - 1 - size, 0)}f}" if -4 <= size < 7 else f"{value:.{digits - 1}e}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _plain(value: float, digits: int) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    return _digits(value, digits + 1)


_WRITERS: dict[Kind, Callable[[float, int], str]] = {
    "share": lambda value, digits: f"{100 * value:.{digits - (1 if 0 < abs(value) < 0.01 else 2)}f}{NARROW}%",
    "count": _scaled,
    "bytes": lambda value, digits: _scaled(value, digits, "B"),
    "ms": lambda value, digits: f"{_digits(value, digits)}{NARROW}ms",
    "seconds": lambda value, digits: duration(value) if digits == 3 else f"{_digits(value, digits)}{NARROW}s",
    "plain": _plain,
}
