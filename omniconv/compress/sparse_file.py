"""Weight files in which zeros take one bit each, so that an unstructured sparse model is really smaller.

Tensors with enough zeros are stored as a bit mask and their other values, tensor by tensor where that is
smaller, and come back bit for bit. With b bits a value and a share s of zeros the file shrinks by
b / (1 + (1 - s) b): a float32 model of 90% zeros is 7.6 times smaller. `omniconv.core.weights.load_weights`
reads such a file like any other weight file.
"""

import os
from typing import Any

import torch

from omniconv.core.weights import load_weights, save_weights

__all__ = ["load_sparse", "save_sparse"]


def save_sparse(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], header: dict[str, Any] | None = None
) -> None:
    """Write `tensors` and a JSON-serialisable `header` to one file, atomically, zeros packed.

    The file is never larger than the plain one.

    Raises:
        RefusedError: if a floating tensor holds a value that is not finite.
    """
    save_weights(path, tensors, header, packed=True)


def load_sparse(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, header) of a weight file, packed or plain.

    Raises:
        DataError: if the file is missing or damaged.
        RefusedError: if the file is a pickle, which can run code when loaded.
    """
    return load_weights(path)
