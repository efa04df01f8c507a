"""What an inspection hands back: numbers, a picture of them, and a file."""

import base64
import html
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omniconv.core.errors import UsageError
from omniconv.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Artifact"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{margin:2rem auto;max-width:70rem;padding:0 1rem;
font-family:system-ui,sans-serif}}img{{max-width:100%;background:#fff}}</style></head>
<body><h1>{title}</h1><img src="data:image/png;base64,{picture}" alt="{title}"></body></html>
"""


class Artifact:
    """Base of everything that `omniconv.inspect` returns.

    A kind of artifact implements `plot` and sets `title`.

    Args:
        data: the numbers, by name; the names are part of the artifact's interface.
    """

    title = "Artifact"

    def __init__(self, data: Mapping[str, np.ndarray]) -> None:
        self.data = dict(data)

    def plot(self) -> "Figure":
        """Draw the numbers as a matplotlib figure (no window is opened and no global state is touched)."""
        raise NotImplementedError

    def png(self) -> bytes:
        """Return the drawing as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self.plot().savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact, atomically: numbers as `.npz`, the drawing as `.png` or as a page `.html`.

        Raises:
            UsageError: if the name ends otherwise.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".png":
            content = self.png()
        elif suffix == ".npz":
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self.data)  # type: ignore[arg-type]  # the names are not numpy's
            content = buffer.getvalue()
        elif suffix == ".html":
            picture = base64.b64encode(self.png()).decode()
            content = _PAGE.format(title=html.escape(self.title), picture=picture).encode()
        else:
            raise UsageError(f"cannot write {os.fspath(path)}: the name must end in .html, .png or .npz")
        atomic_write(path, content)
