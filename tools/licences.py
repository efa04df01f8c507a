"""The licence gate: no package that omniconv or one of its extras installs may be under the GPL or AGPL.

Weak copyleft (LGPL, MPL) passes: these packages are imported as they are and users can replace them. A
licence that this script cannot read fails too, until someone reads it and adds the package to `READ`.

Usage: python tools/licences.py
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Packages whose metadata names no licence that is understood -> what a person found in the package.
READ: dict[str, str] = {}

_WEAK = re.compile(r"\bLGPL|lesser general public|library general public", re.IGNORECASE)
_STRONG = re.compile(r"GPL|general public licen[cs]e", re.IGNORECASE)
_FREE = re.compile(
    r"\b(MIT|0?BSD|Apache|ISC|ISCL|MPL|Mozilla Public|PSF|Python Software Foundation|Zlib|CC0|BSL-1\.0|HPND"
    r"|Unlicense)\b",
    re.IGNORECASE,
)


def verdict(licence: str) -> str:
    """Return `allowed`, `forbidden` or `unknown` for an SPDX expression, a classifier or a name.

    All parts of an AND must be allowed, and one choice of an OR. GCC's runtime exception makes its GPL part
    (libgfortran in the wheels of numpy and scipy) harmless.
    """
    if re.search(r" AND ", licence):
        parts = {verdict(part) for part in licence.split(" AND ")}
        return next(v for v in ("forbidden", "unknown", "allowed") if v in parts)
    if re.search(r" OR ", licence):
        choices = {verdict(choice) for choice in licence.strip("() ").split(" OR ")}
        return next(v for v in ("allowed", "unknown", "forbidden") if v in choices)
    if _WEAK.search(licence) or "GCC-exception" in licence:
        return "allowed"
    if _STRONG.search(licence):
        return "forbidden"
    return "allowed" if _FREE.search(licence) else "unknown"


def stated(package: metadata.PackageMetadata) -> list[str]:
    """Return what a distribution says about its licence, from the most to the least exact place."""
    if expression := package.get("License-Expression"):
        return [expression]
    if classifiers := [c for c in package.get_all("Classifier", []) if c.startswith("License :: OSI")]:
        return classifiers
    # Some packages put the whole text here; its beginning names it.
    return [text[:200] for text in [package.get("License")] if text]


def needed(name: str, extras: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield (name, who needs it) of the packages that `name` with `extras` installs, itself included."""
    queue, seen = [(name, extras, "")], set()
    while queue:
        current, wanted, parent = queue.pop()
        if (key := (canonicalize_name(current), wanted)) in seen:
            continue
        if key[0] not in {done for done, _ in seen}:
            yield current, parent
        seen.add(key)
        try:
            lines = metadata.requires(current) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
                queue.append((requirement.name, frozenset(requirement.extras), current))


def main() -> int:
    """Print what is wrong and return the exit code."""
    extras = frozenset(metadata.metadata("omniconv").get_all("Provides-Extra", []))
    faults, count = [], 0
    for name, parent in needed("omniconv", extras):
        count += 1
        try:
            licences = stated(metadata.metadata(name))
        except metadata.PackageNotFoundError:
            faults.append(
                f"{name} (needed by {parent}) is not installed, so its licence is unread: make venv"
            )
            continue
        # Several classifiers are several licences that all apply.
        result = verdict(" AND ".join(licences)) if licences else "unknown"
        if result == "forbidden":
            faults.append(f"{name} (needed by {parent}) is under {licences[0]}; take another package")
        elif result == "unknown" and canonicalize_name(name) not in READ:
            faults.append(
                f"{name} (needed by {parent}): licence unknown {licences}; read it and add it to READ"
            )
    print("\n".join(faults) or f"licences of {count} packages allow what omniconv does")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
