"""How a paper's claim is checked: thresholds written down before anything is measured.

A check is a module `omniconv/papers/checks/<slug>.py` with a docstring that states the claim and a function
`run(check)`, which measures and calls `check.require` once for every part of the claim.
"""

import importlib
import json
import operator
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omniconv.core.errors import DataError
from omniconv.core.files import atomic_write

__all__ = ["Check", "Requirement", "run_check", "shared_data"]

RESULTS = Path(__file__).parent / "results"
_RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Requirement:
    """One part of a claim and what was measured.

    Attributes:
        claim: what must hold, in words.
        measured: the number found.
        relation: how it must stand to the threshold.
        threshold: the number fixed beforehand.
        baseline: what the alternative reached under the same budget, where there is one.
        unit: of all three.
        passed: whether it held.
    """

    claim: str
    measured: float
    relation: Literal["<=", ">=", "==", "<", ">"]
    threshold: float
    baseline: float | None
    unit: str
    passed: bool


@dataclass
class Check:
    """Collects what a check measures.

    Attributes:
        slug: name of the check.
        requirements: the parts of the claim, in the order in which they were measured.
        notes: what a reader of the result should know.
    """

    slug: str
    requirements: list[Requirement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require(
        self,
        claim: str,
        measured: float,
        relation: Literal["<=", ">=", "==", "<", ">"],
        threshold: float,
        *,
        baseline: float | None = None,
        unit: str = "",
    ) -> bool:
        """Record a part of the claim; NaN never passes. Returns whether it held."""
        measured = float(measured)
        passed = bool(_RELATIONS[relation](measured, threshold))
        base = None if baseline is None else float(baseline)
        self.requirements.append(Requirement(claim, measured, relation, float(threshold), base, unit, passed))
        return passed

    def note(self, text: str) -> None:
        """Record a sentence for the reader of the result."""
        self.notes.append(text)

    @property
    def passed(self) -> bool:
        """Whether something was required and all of it held."""
        return bool(self.requirements) and all(requirement.passed for requirement in self.requirements)


def shared_data(name: str) -> Path:
    """Return the path of a data set that checks and tests use, such as `fashion-mnist`.

    It is looked for in the folder that the variable OMNICONV_DATA names, and in `shared/data` beside the
    repository.

    Raises:
        DataError: if it is not there.
    """
    places = [Path(__file__).resolve().parents[3] / "shared" / "data", Path.cwd().parent / "shared" / "data"]
    if "OMNICONV_DATA" in os.environ:
        places.insert(0, Path(os.environ["OMNICONV_DATA"]))
    for place in places:
        if (place / name).exists():
            return place / name
    raise DataError(f"data set {name!r} is not here; set OMNICONV_DATA to the folder that holds it")


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def run_check(number: int, slug: str, *, write: bool = True) -> dict[str, Any]:
    """Run the check `slug` of paper `number` and return its result, written to `results/NNN.json` if `write`."""
    import torch

    module = importlib.import_module(f"omniconv.papers.checks.{slug}")
    check = Check(slug)
    started = time.perf_counter()
    module.run(check)
    result = {
        "number": number,
        "check": slug,
        "claim": (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
        "passed": check.passed,
        "requirements": [asdict(requirement) for requirement in check.requirements],
        "notes": check.notes,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if write:
        atomic_write(RESULTS / f"{number:03d}.json", json.dumps(result, indent=1) + "\n")
    return result
