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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omniconv.core.errors import DataError, OmniconvError, ResourceError, UsageError
from omniconv.core.files import atomic_write
from omniconv.papers import records
from omniconv.papers.records import Record, get_record
from omniconv.papers.sources import CHECKS, fingerprint

__all__ = ["Check", "Outcome", "Requirement", "run_check", "run_checks", "shared_data"]

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
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _require_writable() -> None:
    """Refuse before minutes of measuring what could not be kept."""
    try:
        records.RESULTS.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=records.RESULTS).close()
    except OSError as error:
        raise ResourceError(
            f"results cannot be written to {records.RESULTS} ({error.strerror}); "
            "work in a clone of the repository, or measure without keeping: --no-write"
        ) from None


def run_check(number: int, slug: str, *, write: bool = True) -> dict[str, Any]:
    """Run the check `slug` of paper `number` and return its result, written to `results/NNN.json` if `write`.

    The result holds a fingerprint of the check and of the files that implement the paper, by which a later
    change of the code is noticed.

    Raises:
        UsageError: if the paper has no such check.
        ResourceError: if `write` and results cannot be written here.
    """
    record = get_record(number)
    if slug != record.check or not (CHECKS / f"{slug}.py").exists():
        raise UsageError(f"paper {number} ({record.slug}) has no check {slug!r} in {CHECKS}")
    if write:
        _require_writable()
    import torch

    module = importlib.import_module(f"omniconv.papers.checks.{slug}")
    check = Check(slug)
    # Taken before the measurement: an edit while it runs makes the result stale.
    code = fingerprint(slug, record.implements)
    started = time.perf_counter()
    module.run(check)
    result = {
        "number": number,
        "check": slug,
        "claim": " ".join((module.__doc__ or "").split("\n\n")[0].split()),
        "passed": check.passed,
        "requirements": [asdict(requirement) for requirement in check.requirements],
        "notes": check.notes,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__.split("+")[0],
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "code": code,
    }
    if write:
        atomic_write(records.result_path(record), json.dumps(result, indent=1) + "\n")
    return result


@dataclass(frozen=True)
class Outcome:
    """How a check of several ended.

    Attributes:
        record: the paper.
        result: what `run_check` returned, or None if the check could not run to its end.
        error: why it could not, or "".
    """

    record: Record
    result: dict[str, Any] | None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the check ran and its claim held."""
        return self.result is not None and self.result["passed"]


def _child(number: str, threads: str, write: str, file: str) -> None:
    """Run one check in a process of its own and leave its result in `file`; see `run_checks`."""
    import torch

    torch.set_num_threads(int(threads))
    record = get_record(int(number))
    try:
        result = run_check(record.number, record.check, write=write == "True")
    except OmniconvError as error:
        sys.exit(str(error))
    Path(file).write_text(json.dumps(result), encoding="utf-8")


def _run_child(record: Record, threads: int, write: bool) -> Outcome:
    code = "import sys; from omniconv.papers.check import _child; _child(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        arguments = [str(record.number), str(threads), str(write), str(file)]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return Outcome(record, json.loads(file.read_text(encoding="utf-8")))
    return Outcome(record, None, done.stderr.strip() or f"its process ended with code {done.returncode}")


def run_checks(chosen: Sequence[Record], *, jobs: int = 1, write: bool = True) -> Iterator[Outcome]:
    """Run the checks of several papers, each in a process of its own, and yield outcomes as they come.

    Neither seeds nor threads nor memory of one check reach the next, and one that dies leaves the others be.

    Args:
        chosen: papers with a check.
        jobs: how many run at a time; they share the machine's cores.
        write: keep the results.

    Raises:
        ResourceError: if `write` and results cannot be written here.
    """
    if write:
        _require_writable()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run_child, record, threads, write) for record in chosen]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
