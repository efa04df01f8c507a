"""Words and numbers of the report: what a person reads for what a program wrote."""

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

__all__ = ["Metric", "axis", "big", "count", "number", "plain", "setting", "share", "visible"]

# name -> (for people, whether it is a share of one, whether more is better, what it means)
_METRICS: dict[str, tuple[str, bool, bool, str]] = {
    "accuracy": ("accuracy", True, True, "share of pictures whose first answer is right"),
    "balanced_accuracy": ("balanced accuracy", True, True, "share right, every class counting the same"),
    "macro_f1": ("macro F1", True, True, "balance of precision and recall, every class counting the same"),
    "top5_accuracy": ("top-5 accuracy", True, True, "share with the right class among the first five answers"),
    "mean_average_precision": (
        "mean average precision", True, True, "how well each label's pictures are ranked before the others",
    ),
    "exact_match": ("exact match", True, True, "share of pictures with every label right"),
    "nll": ("log loss", False, False, "how surprised the network is by the truth"),
    "mae": ("mean absolute error", False, False, "how far off an answer is on average"),
    "rmse": ("root mean square error", False, False, "as mean absolute error, large errors counting more"),
    "r2": ("R²", False, True, "share of the variation explained; 0 is the mean's, 1 is perfect"),
}  # fmt: skip

_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Cs"}
_JOINERS = "\u200c\u200d"  # emoji and some scripts are written with them


def visible(value: Any) -> str:
    """Return a text in which control and direction characters are written out as Python would."""

    def shown(char: str) -> str:
        if char in _JOINERS or unicodedata.category(char) not in _INVISIBLE:
            return char
        return char.encode("unicode_escape", "surrogatepass").decode()

    return "".join(map(shown, str(value)))


def share(value: float | None, unit: str = "%") -> str:
    """Return a share of one in percent; only what is all or nothing reads 100% or 0%."""
    if value is None:
        return "–"
    percent = 100 * value
    for digits in (1, 2, 3):
        text = f"{percent:.{digits}f}"
        if (float(text) not in (0, 100)) or percent in (0, 100):
            break
    else:
        text = f"{percent:.3g}"
    return text.removesuffix(".0") + unit if percent in (0, 100) else text + unit


def count(value: float) -> str:
    """Return a whole number with its thousands marked."""
    return f"{value:,.0f}"


def big(value: float) -> str:
    """Return a large number in words."""
    for suffix, scale in ((" billion", 1e9), (" million", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return count(value)


def number(value: Any) -> float | None:
    """Return a finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain(value: float) -> str:
    """Return a number with three digits."""
    if value == 0 or abs(value) >= 1000:
        return count(value) if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:#.3g}".removesuffix(".").replace("-", "\u2212", 1)


class Metric:
    """A metric by name: what it is called and how its values are written."""

    def __init__(self, name: str) -> None:
        guess = (visible(name).replace("_", " "), False, "loss" not in name and "error" not in name, "")
        self.label, self.unit, self.higher, self.meaning = _METRICS.get(name, guess)

    def text(self, value: float | None) -> str:
        """Return a value for people."""
        if value is None:
            return "–"
        return share(value) if self.unit else plain(value)

    def axis(self, value: float) -> str:
        """Return a round value for an axis."""
        return f"{100 * value:g}%" if self.unit else f"{value:g}"

    def row(self, entry: Any) -> dict[str, Any] | None:
        """Return value and interval of one entry of `metrics`, ready to be shown."""
        if not isinstance(entry, Mapping) or (value := number(entry.get("value"))) is None:
            return None
        low, high = number(entry.get("low")), number(entry.get("high"))
        interval = None
        if low is not None and high is not None and high > low:
            unit = "" if self.unit else None
            interval = (
                f"{share(low, unit)} to {share(high, unit)}" if unit is not None
                else f"{plain(low)} to {plain(high)}"
            )  # fmt: skip
        low, high = (value if low is None else low), (value if high is None else high)
        return {"value": value, "low": low, "high": high, "text": self.text(value), "interval": interval}


def axis(value: float) -> str:
    """Return a round value for an axis."""
    return f"{value:g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.0e}"


def setting(value: Any) -> str:
    """Return a value of a plan for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(key)} {setting(one)}" for key, one in value.items())
    return visible(value)
