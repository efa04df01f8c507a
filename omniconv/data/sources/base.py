"""A set of images, whatever it was read from."""

import hashlib
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniconv.core.errors import DataError, OmniconvError, ResourceError
from omniconv.data.decode import Header, read_header, read_image
from omniconv.data.schema import Problem, Sample, Schema, Split, Task, counted

__all__ = ["ArrayImages", "FileImages", "ImageData", "ordered_classes", "split_name"]

_SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_HEADER_THREADS = 8


def split_name(word: str) -> Split | None:
    """Return the split that a folder, a key or a cell names, or None."""
    return _SPLITS.get(word.strip().casefold())


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names in the order of their indices: numbers by value, everything else by name."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def _size(file: Path) -> str:
    try:
        return str(file.stat().st_size)
    except OSError:
        return "-"


class ImageData:
    """A set of images with their labels; nothing is decoded before it is read.

    Attributes:
        name: what to call the set.
        source: where it was read from.
        schema: what all samples have in common.
        samples: one entry an image, in a fixed order.
        problems: what was found while opening; `audit` looks deeper.
        fingerprint: changes when samples, labels, splits or file sizes change.
        stacked: all images as one tensor (N, C, H, W) if they are in memory already, else None.
    """

    name: str
    source: Path
    schema: Schema
    samples: list[Sample]
    problems: list[Problem]
    fingerprint: str
    stacked: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what `read` returns: uint8, or float32 for 16-bit and float data."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def read(self, index: int) -> Tensor:
        """Return image `index` as (C, H, W): uint8, or float32 with the raw values of 16-bit and float data.

        Raises:
            DataError: if the image cannot be read; the message names it.
        """
        raise NotImplementedError

    def path(self, index: int) -> Path | None:
        """Return the file of image `index`, or None if it lives in an array."""
        return None

    def _fingerprint(self, contents: Iterable[str | memoryview]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.schema.task, self.schema.classes)).encode())
        for sample in self.samples:
            digest.update(repr((sample.id, sample.target, sample.group, sample.split)).encode())
        for content in contents:
            digest.update(content.encode() if isinstance(content, str) else content)
        return digest.hexdigest()


class FileImages(ImageData):
    """Images in files, one each.

    Args:
        name: what to call the set.
        source: the data folder or table.
        files: path of every sample.
        samples: the samples.
        task: what the targets are for.
        classes: class or target names.
        problems: what was found so far.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        files: list[Path],
        samples: list[Sample],
        task: Task,
        classes: tuple[str, ...],
        problems: list[Problem],
    ) -> None:
        self.name, self.source, self.samples, self.files = name, source, samples, files
        self.problems = list(problems)
        headers = self._headers()
        readable = [header for header in headers if header is not None]
        if not readable:
            first = next(problem for problem in self.problems if problem.kind == "unreadable")
            raise DataError(
                f"{source}: none of {counted(len(files), 'image')} can be read; the first: {first.message}"
            )
        # Grey and colour may be mixed and become colour; any other mixture follows the majority.
        counts = [3 if header.channels in (1, 3) else header.channels for header in readable]
        channels = max(sorted(set(counts)), key=counts.count)
        if channels == 3 and all(header.channels == 1 for header in readable if header.channels in (1, 3)):
            channels = 1
        low, high = 0.0, 255.0
        kinds = {header.kind for header in readable}
        if "float32" in kinds:
            low, high = self._range(channels)
        elif "uint16" in kinds:
            high = 65535.0
        self._kinds = kinds
        self.schema = Schema(
            task=task,
            classes=classes,
            channels=channels,
            low=low,
            high=high,
            height=round(statistics.median(header.height for header in readable)),
            width=round(statistics.median(header.width for header in readable)),
        )
        self._mention(headers, channels, kinds)
        self.fingerprint = self._fingerprint(map(_size, files))

    def _headers(self) -> list[Header | None]:
        faults: dict[int, OmniconvError] = {}

        def probe(index: int) -> Header | None:
            try:
                return read_header(self.files[index], name=self.samples[index].id)
            except (DataError, ResourceError) as error:
                faults[index] = error
                return None

        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            headers = list(pool.map(probe, range(len(self.files)), chunksize=64))
        for index, error in sorted(faults.items()):
            # One damaged TIFF file may look like one that needs a missing package; a whole set does need it.
            if len(faults) == len(headers) and isinstance(error, ResourceError):
                raise error
            self.problems.append(Problem("unreadable", str(error), (self.samples[index].id,), "error"))
        return headers

    def _range(self, channels: int) -> tuple[float, float]:
        """Return the smallest and the largest value of all readable images; float data declares none."""
        low, high = np.inf, -np.inf
        for file, sample in zip(self.files, self.samples, strict=True):
            try:
                array = read_image(file, channels=channels, name=sample.id)
            except (DataError, ResourceError):
                continue
            low, high = min(low, float(array.min())), max(high, float(array.max()))
        if low > high:
            return 0.0, 1.0
        return (low, high) if high > low else (low, low + 1.0)

    def _mention(self, headers: list[Header | None], channels: int, kinds: set[str]) -> None:
        def ids(wanted: Callable[[Header], bool]) -> tuple[str, ...]:
            pairs = zip(self.samples, headers, strict=True)
            return tuple(sample.id for sample, header in pairs if header is not None and wanted(header))

        for sample, header in zip(self.samples, headers, strict=True):
            if (
                header is not None
                and header.channels != channels
                and not {header.channels, channels} <= {1, 3}
            ):
                message = f"{sample.id} has {header.channels} channels where the others have {channels}"
                self.problems.append(Problem("unreadable", message, (sample.id,), "error"))
        if channels == 3 and (grey := ids(lambda h: h.channels == 1)):
            self._info(
                "mixed-channels", f"{counted(len(grey), 'grey image')} among colour ones, read as RGB", grey
            )
        if len(kinds) > 1:
            self._info("mixed-depth", f"pixel types are mixed ({', '.join(sorted(kinds))})", ())
        if paged := ids(lambda h: h.pages):
            self._info(
                "pages",
                f"{counted(len(paged), 'image')} with several pages or frames, of which the first is used",
                paged,
            )
        if reduced := ids(lambda h: h.reduced):
            self._info(
                "depth",
                f"{counted(len(reduced), 'image')} with 16-bit colour, of which the upper 8 bits are used",
                reduced,
            )
        sizes = {(h.height, h.width) for h in headers if h is not None}
        if len(sizes) > 1:
            heights, widths = sorted(h for h, _ in sizes), sorted(w for _, w in sizes)
            self._info(
                "mixed-sizes",
                f"images are {widths[0]} to {widths[-1]} pixels wide and {heights[0]} to {heights[-1]} high",
                (),
            )

    def _info(self, kind: str, message: str, ids: tuple[str, ...]) -> None:
        self.problems.append(Problem(kind, message, ids, "info"))

    @property
    def dtype(self) -> torch.dtype:
        """See `ImageData.dtype`."""
        return torch.uint8 if self._kinds == {"uint8"} else torch.float32

    def path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.files[index]

    def read(self, index: int) -> Tensor:
        """Decode image `index`; see `ImageData.read`."""
        array = read_image(self.files[index], channels=self.schema.channels, name=self.samples[index].id)
        if self.dtype == torch.uint8:
            if array.dtype != np.uint8:
                raise DataError(f"{self.samples[index].id} has changed since the data was opened")
        else:
            # White is 65535 in a set that has 16-bit images, and whatever the values say in one of floats.
            whiter = 257.0 if array.dtype == np.uint8 and "float32" not in self._kinds else 1.0
            array = array.astype(np.float32) * np.float32(whiter)
        return torch.from_numpy(
            np.array(array.transpose(2, 0, 1), order="C")
        )  # a copy that may be written to


class ArrayImages(ImageData):
    """Images in one array in memory.

    Args:
        name: what to call the set.
        source: the file or folder.
        images: (N, C, H, W), uint8 or float32.
        high: raw value of white for data that is not uint8; by default the largest one.
        samples: one sample an image.
        task: what the targets are for.
        classes: class or target names.
        problems: what was found so far.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        images: np.ndarray,
        samples: list[Sample],
        task: Task,
        classes: tuple[str, ...],
        problems: list[Problem],
        *,
        high: float | None = None,
    ) -> None:
        self.name, self.source, self.samples, self.problems = name, source, samples, list(problems)
        low = 0.0
        if images.dtype == np.uint8:
            high = 255.0
        elif high is None:
            low, high = float(images.min()), float(images.max())
            high = high if high > low else low + 1.0
        self._images = self.stacked = torch.from_numpy(images)
        self.schema = Schema(
            task=task,
            classes=classes,
            channels=images.shape[1],
            low=low,
            high=high,
            height=images.shape[2],
            width=images.shape[3],
        )
        self.fingerprint = self._fingerprint([np.ascontiguousarray(images).data.cast("B")])

    @property
    def dtype(self) -> torch.dtype:
        """See `ImageData.dtype`."""
        return self._images.dtype

    def read(self, index: int) -> Tensor:
        """Return a copy of image `index`; see `ImageData.read`."""
        return self._images[index].clone()
