"""Budgets as people write them: `10ms`, `2h`, `5MB`."""

import re

from omniconv.core.errors import UsageError

__all__ = ["bytes_text", "parse_bytes", "parse_seconds", "seconds_text"]

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}


def _parse(text: str, units: dict[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise UsageError(f"cannot read the {what} {text!r}; write a number and a unit, such as {example}")
    return float(match[1]) * units[match[2].lower()]


def parse_seconds(text: str) -> float:
    """Return the seconds that a text such as `10ms`, `90s`, `10m` or `2h` means."""
    return _parse(text, _SECONDS, "time", "10ms, 90s, 10m or 2h")


def parse_bytes(text: str) -> int:
    """Return the bytes that a text such as `500kB` or `5MB` means (decimal units; MiB is binary)."""
    return round(_parse(text, _BYTES, "size", "500kB or 5MB"))


def seconds_text(seconds: float) -> str:
    """Return a duration for people: `0.84 ms`, `12.0 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def bytes_text(size: float) -> str:
    """Return a size for people: `812 B`, `1.23 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
