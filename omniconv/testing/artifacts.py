"""The contract of an artifact: numbers, a figure, and files that need nothing else; `check_artifact` runs it."""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omniconv.core.cases import Raises
from omniconv.core.errors import UsageError
from omniconv.inspect.artifact import Artifact
from omniconv.testing.harness import Check, require, run_checks, seeded
from omniconv.testing.layers import expect

__all__ = ["ARTIFACT_CHECKS", "ArtifactCase", "check_artifact"]


@dataclass(frozen=True)
class ArtifactCase:
    """One artifact.

    Attributes:
        name: of what makes it.
        make: makes it.
    """

    name: str
    make: Callable[[], Artifact]


def _make(case: ArtifactCase) -> Artifact:
    with seeded():
        return case.make()


def _save(artifact: Artifact, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"artifact{suffix}"
        artifact.save(path)
        names = [p.name for p in Path(folder).iterdir()]
        require(names == [path.name], f"save wrote {names}", "write one file")
        return path.read_bytes()


def data_is_numbers(case: ArtifactCase) -> None:
    """`data` maps names to numpy arrays, and floating numbers among them are finite."""
    data = _make(case).data
    require(isinstance(data, dict) and bool(data), f"data is {type(data).__name__}", "give arrays by name")
    for name, array in data.items():
        require(
            isinstance(array, np.ndarray), f"data[{name!r}] is {type(array).__name__}", "make it an array"
        )
        if array.dtype.kind == "f":
            require(bool(np.isfinite(array).all()), f"data[{name!r}] is not finite", "mind empty maps")


def plot_gives_a_figure(case: ArtifactCase) -> None:
    """`plot` returns a matplotlib figure with something on it, and opens no window."""
    figure = _make(case).plot()
    from matplotlib.figure import Figure

    require(isinstance(figure, Figure), f"plot gives {type(figure).__name__}", "return the figure")
    require(bool(figure.get_axes()), "the figure is empty", "draw the data")
    pyplot: Any = sys.modules.get("matplotlib.pyplot")
    left = pyplot.get_fignums() if pyplot else []
    require(not left, f"figures {left} stay open", "use matplotlib.figure.Figure, not pyplot")


def page_is_self_contained(case: ArtifactCase) -> None:
    """The saved page is whole HTML that loads nothing from outside itself."""
    page = _save(_make(case), ".html").decode()
    require("<html" in page and "</html>" in page, "the page is not whole", "write <html> ... </html>")
    links = re.findall(r"""(?:src|href|srcset|poster|action)\s*=\s*["']?(?!data:|#)([^"'\s>]+)""", page)
    links += re.findall(r"""(?:url\(|@import)\s*["']?(?!data:|#)([^"')\s;]+)""", page)
    links += re.findall(r"""(?:fetch|import)\(\s*["']([^"']+)""", page)
    require(not links, f"the page loads {links[:3]}", "put it into the page as data:")


def picture_and_numbers_are_files(case: ArtifactCase) -> None:
    """The saved picture is a PNG of some size, and the saved numbers come back equal."""
    from PIL import Image

    artifact = _make(case)
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "a.png")
        with Image.open(Path(folder) / "a.png") as picture:
            require(
                picture.format == "PNG" and min(picture.size) > 8, f"picture {picture.size}", "write a PNG"
            )
        artifact.save(Path(folder) / "a.npz")
        with np.load(Path(folder) / "a.npz") as loaded:
            same = set(loaded) == set(artifact.data)
            same = same and all(np.array_equal(loaded[name], array) for name, array in artifact.data.items())
        require(same, "the .npz holds other numbers than data", "save data as it is")


def same_twice(case: ArtifactCase) -> None:
    """Made twice under one seed, it holds the same numbers."""
    first, second = _make(case).data, _make(case).data
    same = first.keys() == second.keys() and all(np.array_equal(second[name], first[name]) for name in first)
    require(same, "the numbers differ", "draw from the given seed or torch's generator only")


def other_endings_are_refused(case: ArtifactCase) -> None:
    """A file name with another ending is a UsageError that names the three."""
    artifact = _make(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.xyz"
        message = f"cannot write {path}: the name must end in .html, .png or .npz"
        expect(Raises(UsageError, message), lambda: artifact.save(path))
        require(not list(Path(folder).iterdir()), "a file was left behind", "refuse before writing")


ARTIFACT_CHECKS: tuple[Check, ...] = (
    data_is_numbers,
    plot_gives_a_figure,
    page_is_self_contained,
    picture_and_numbers_are_files,
    same_twice,
    other_endings_are_refused,
)


def check_artifact(case: ArtifactCase) -> None:
    """Run the whole contract of an artifact.

    Raises:
        ContractError: naming every check that failed, the fault and the mend.
    """
    run_checks(ARTIFACT_CHECKS, case.name, case)
