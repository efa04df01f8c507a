"""Look at data before anything is learned from it."""

import os
from collections.abc import Callable
from typing import Any

from omniconv.core.errors import DataError
from omniconv.data.audit import audit
from omniconv.data.schema import Problem
from omniconv.data.sources import ImageData, open_images
from omniconv.pipeline.config import FitConfig

__all__ = ["check_data", "open_labelled"]


def check_data(
    path: str | os.PathLike[str],
    *,
    labels: str | None = None,
    task: Any = None,
    target: str | list[str] | None = None,
    group: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageData, list[Problem]]:
    """Open pictures and look at every one of them; nothing is written.

    Returns:
        The data, and every problem found, the gravest first.
    """
    data = open_images(path, labels=labels, task=task, target=target, group=group)
    problems = audit(data, progress=progress)
    grave = ("error", "warning", "info")
    return data, sorted(problems, key=lambda problem: grave.index(problem.severity))


def open_labelled(config: FitConfig) -> ImageData:
    """Open the pictures that a run is to learn from.

    Raises:
        DataError: if they cannot be read, or have no labels.
    """
    data = open_images(
        config.data, labels=config.labels, task=config.task, target=config.target, group=config.group
    )
    if data.schema.task == "none":
        raise DataError(
            f"{data.name}: {len(data)} images, no labels. Give --labels FILE, or put the pictures of each "
            "class in a folder of its own"
        )
    return data
