"""The ground truth of Revisited Oxford and Paris, two benchmarks of landmark retrieval.

Paper: Radenovic et al., Revisiting Oxford and Paris, https://arxiv.org/abs/1803.11285. It is published as pickles,
of plain lists, dicts, numbers and strings; anything else in one is refused before it can run.
"""

import os
import pickle
from dataclasses import dataclass
from typing import Any

from omniconv.core.errors import DataError

__all__ = ["Query", "Revisited", "read_revisited"]


@dataclass(frozen=True)
class Query:
    """One query and what it should find.

    Attributes:
        name: of the query's image.
        box: left, top, right and bottom of the landmark in it, in pixels.
        easy, hard: indices of the gallery's images that show the landmark well, and barely.
        junk: indices of those that count neither for nor against.
    """

    name: str
    box: tuple[float, ...]
    easy: tuple[int, ...]
    hard: tuple[int, ...]
    junk: tuple[int, ...]


@dataclass(frozen=True)
class Revisited:
    """A benchmark: names of the gallery's images, and the queries."""

    gallery: tuple[str, ...]
    queries: tuple[Query, ...]


class _PlainUnpickler(pickle.Unpickler):
    """Reads only what needs no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"the file asks for {module}.{name}, which plain data does not need; it was not run")


def read_revisited(path: str | os.PathLike[str]) -> Revisited:
    """Read `gnd_roxford5k.pkl` or `gnd_rparis6k.pkl`.

    Raises:
        DataError: if the file cannot be read, holds anything but plain data, or lacks a key.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        queries = [
            Query(
                query,
                tuple(truth["bbx"]),
                *(tuple(int(index) for index in truth[key]) for key in ("easy", "hard", "junk")),
            )
            for query, truth in zip(content["qimlist"], content["gnd"], strict=True)
        ]
        return Revisited(tuple(content["imlist"]), tuple(queries))
    except DataError as error:
        raise DataError(f"{name} is refused: {error}") from None
    except KeyError as error:
        raise DataError(
            f"{name} has no {error}; is it the ground truth of the revisited benchmark?"
        ) from None
    except (OSError, pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        raise DataError(f"cannot read {name}: {error}") from None
