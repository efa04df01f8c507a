"""From an image file to an array: every common format, one set of rules, and DataError for whatever is wrong.

The rules: EXIF orientation is applied; of several pages or frames the first is taken; alpha (also that of a
palette) is laid over white and dropped; palettes, CMYK, YCbCr and Lab become RGB; black and white becomes 0
and 255. Four channels of which none is alpha (TIFF with an unspecified extra sample, NPY) stay four. Sixteen
bits stay sixteen in grey images; of 16-bit colour Pillow keeps the upper eight, which `Header.reduced` tells.
"""

import io
import logging
import math
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, TiffImagePlugin

from omniconv.core.errors import DataError, OmniconvError, ResourceError
from omniconv.data.schema import printable

__all__ = ["EXTENSIONS", "MAX_PIXELS", "Header", "channels_last", "read_header", "read_image"]

MAX_PIXELS = 178_956_970
"""Larger images are refused from their header: what Pillow, too, calls a decompression bomb."""

# Only formats that decode pixels in-process; Pillow's others include some that start programs (EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(
    ".bmp .dib .gif .jpg .jpeg .jpe .jfif .png .apng .pgm .ppm .pbm .pnm .tif .tiff .webp .npy".split()
)
_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_NPY_MAGIC = b"\x93NUMPY"
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_GREY = {"1", "L", "LA", "La"}
_PHOTOMETRIC, _SAMPLES_PER_PIXEL, _EXTRA_SAMPLES, _ORIENTATION = 262, 277, 338, 0x0112
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3, 9: 3}  # channels by photometric interpretation: RGB, CMYK, YCbCr, Lab

Kind = Literal["uint8", "uint16", "float32"]


@dataclass(frozen=True)
class Header:
    """What the header of an image file says, before any pixel is decoded.

    Attributes:
        width: in pixels, orientation applied.
        height: in pixels, orientation applied.
        channels: of the array that `read_image` will return.
        kind: dtype of the array that `read_image` will return.
        pages: whether there are more pages or frames than the one that is read.
        reduced: whether 16-bit colour is read with 8 bits.
    """

    width: int
    height: int
    channels: int
    kind: Kind
    pages: bool = False
    reduced: bool = False


class _Quiet:
    """Silences Pillow's warnings while any thread decodes; alone, `catch_warnings` mixes up threads."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.saved.__exit__(None, None, None)


_quiet = _Quiet()


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that omniconv reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text[:200])


def _check_size(name: str, height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise DataError(f"{name} is unreadable: its header says {width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise DataError(
            f"{name} was not decoded: its header says {width} x {height} pixels, "
            f"more than the limit of {MAX_PIXELS // 10**6} million; make it smaller"
        )


def channels_last(array: np.ndarray) -> np.ndarray:
    """Return an image array as (H, W, C): (H, W) gets one channel, and of three axes the channels are the
    last one, or the first one if that is shorter.
    """
    if array.ndim == 2:
        return array[:, :, None]
    return np.moveaxis(array, 0, 2) if array.shape[0] < array.shape[2] else array


def _as_kind(array: np.ndarray, name: str) -> np.ndarray:
    """Return uint8, uint16 or finite float32 of any numeric array."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return np.ascontiguousarray(array, dtype=np.uint8 if array.dtype.itemsize == 1 else np.uint16)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{name} is unreadable: it holds values that are not finite numbers")
    return array


def _kind(dtype: np.dtype) -> Kind:
    if dtype == np.bool_ or dtype == np.uint8:
        return "uint8"
    return "uint16" if dtype.kind == "u" and dtype.itemsize == 2 else "float32"


# NPY


def _npy_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in "buif":
        raise DataError(f"{name} is unreadable: it holds {dtype}, not numbers")
    if len(shape) not in (2, 3):
        raise DataError(f"{name} is unreadable: an image has 2 or 3 axes, this array has {len(shape)}")
    if 0 in shape:
        raise DataError(f"{name} is unreadable: its array is empty")
    return shape, dtype


def _npy_layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (height, width, channels) that `channels_last` will give."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    return (shape[1], shape[2], shape[0]) if shape[0] < shape[2] else (shape[0], shape[1], shape[2])


def _read_npy(file: BinaryIO, name: str) -> np.ndarray:
    shape, dtype = _npy_header(file, name)
    _check_npy(file, name, shape, dtype)
    file.seek(0)
    return _as_kind(channels_last(np.lib.format.read_array(file, allow_pickle=False)), name)


def _check_npy(file: BinaryIO, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    height, width, _ = _npy_layout(shape)
    _check_size(name, height, width)
    start = file.tell()
    held = file.seek(0, os.SEEK_END) - start
    if held < math.prod(shape) * dtype.itemsize:
        raise DataError(f"{name} is unreadable: it is cut off")


# TIFF with more channels than Pillow has modes for


def _extra_channels(file: BinaryIO) -> bool:
    """Whether a file is a TIFF whose first page has channels beside its colours that are not alpha."""
    file.seek(0)
    header = file.read(8)
    if header[:4] not in _TIFF_MAGIC:
        return False
    if 43 in header[2:4]:  # BigTIFF has a longer header
        header += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    extra = int(tags.get(_SAMPLES_PER_PIXEL, 1)) - _COLOURS.get(int(tags.get(_PHOTOMETRIC, 1)), 1)
    alpha = extra == 1 and tuple(tags.get(_EXTRA_SAMPLES, ())) in ((1,), (2,))
    return extra > 0 and not alpha


def _read_tiff(
    file: BinaryIO, name: str, decode: bool
) -> tuple[tuple[int, int, int], np.dtype, np.ndarray | None, bool]:
    try:
        import tifffile
    except ImportError:
        raise ResourceError(
            f"{name} has more channels than Pillow reads; install tifffile with: pip install tifffile"
        ) from None
    # What is wrong with a file is said in the error; without a handler the log would go to the terminal, too.
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        shape, axes = tuple(page.shape), page.axes
        order = {"YX": None, "YXS": None, "SYX": 0}
        if axes not in order:
            raise DataError(f"{name} is unreadable: its first page has the axes {axes}, not rows and columns")
        if axes == "YX":
            shape = (*shape, 1)
        elif axes == "SYX":
            shape = (shape[1], shape[2], shape[0])
        _check_size(name, shape[0], shape[1])
        array = None
        if decode:
            array = page.asarray().reshape(page.shape)
            array = np.moveaxis(array, 0, 2) if axes == "SYX" else array.reshape(shape)
        return shape, page.dtype, array, len(tiff.pages) > 1


# Everything else, through Pillow


def _oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, and Pillow fails on it in many ways
        return 1
    return value if isinstance(value, int) else 1


def _layout(image: Image.Image) -> tuple[int, Kind]:
    """Return (channels, kind) of what `_pixels` will return."""
    if image.mode.startswith("I;16"):
        return 1, "uint16"
    if image.mode in ("I", "F"):
        return 1, "float32"
    palette = image.getpalette() if image.mode == "P" else None
    grey = image.mode in _GREY or (palette is not None and palette[::3] == palette[1::3] == palette[2::3])
    return (1 if grey else 3), "uint8"


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    mode = image.mode
    channels, kind = _layout(image)
    if kind != "uint8":
        return _as_kind(channels_last(np.asarray(image)), name)
    if mode in _ALPHA or "transparency" in image.info:
        array = np.asarray(image.convert("LA" if channels == 1 else "RGBA")).astype(np.uint32)
        colour, alpha = array[..., :-1], array[..., -1:]
        return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if channels == 1 else array


def _open(source: Path | bytes | BinaryIO, name: str | None) -> tuple[BinaryIO, str, bool]:
    if isinstance(source, bytes):
        return io.BytesIO(source), name or "the image", True
    if isinstance(source, os.PathLike | str):
        shown = name or printable(os.fspath(source))
        try:
            if not os.path.isfile(source):
                kind = "a folder" if os.path.isdir(source) else "no regular file"
                raise DataError(
                    f"{shown} is unreadable: it is {kind}" if os.path.lexists(source) else f"no file {shown}"
                )
            return open(source, "rb"), shown, True
        except (OSError, ValueError) as error:
            raise DataError(f"{shown} is unreadable: {_reason(error)}") from None
    source.seek(0)
    return source, name or "the image", False


def _start(file: BinaryIO, name: str) -> tuple[str, Image.Image | None]:
    """Return ("npy" | "tiff" | "pillow", opened image); the size is checked before anything is decoded."""
    file.seek(0)
    magic = file.read(8)
    file.seek(0)
    if not magic:
        raise DataError(f"{name} is unreadable: it is empty")
    if magic.startswith(_NPY_MAGIC):
        return "npy", None
    if _extra_channels(file):
        return "tiff", None
    file.seek(0)
    try:
        image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise DataError(
            f"{name} was not decoded: its header says more than {MAX_PIXELS // 10**6} million pixels; "
            "make it smaller"
        ) from None
    _check_size(name, image.height, image.width)
    return "pillow", image


def read_header(source: Path | bytes | BinaryIO, *, name: str | None = None) -> Header:
    """Return what the header of an image file says.

    Args:
        source: a path, the bytes of a file, or an open file.
        name: what to call it in messages; by default the path.

    Raises:
        DataError: if there is no readable header, or it announces more than `MAX_PIXELS` pixels.
        ResourceError: if it is a TIFF file with more channels than Pillow reads, and tifffile is missing.
    """
    file, name, mine = _open(source, name)
    try:
        with _quiet:
            route, image = _start(file, name)
            if route == "npy":
                shape, dtype = _npy_header(file, name)
                _check_npy(file, name, shape, dtype)
                height, width, channels = _npy_layout(shape)
                return Header(width, height, channels, _kind(dtype))
            if image is None:
                (height, width, channels), dtype, _, pages = _read_tiff(file, name, decode=False)
                return Header(width, height, channels, _kind(dtype), pages)
            channels, kind = _layout(image)
            width, height = image.size
            # Pillow itself turns TIFF files.
            if image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8):
                width, height = height, width
            # An MPO file is a photograph with a preview behind it.
            pages = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            tiles = getattr(image, "tile", None)
            raw = str(tiles[0][3]) if tiles else ""
            return Header(width, height, channels, kind, pages, kind == "uint8" and ";16" in raw)
    except OmniconvError:
        raise
    except Exception as error:  # damaged files make Pillow and numpy fail in every way there is
        raise DataError(f"{name} is unreadable: {_reason(error)}") from None
    finally:
        if mine:
            file.close()


def read_image(
    source: Path | bytes | BinaryIO, *, channels: int | None = None, name: str | None = None
) -> np.ndarray:
    """Return the pixels of an image file as an array (H, W, C).

    Args:
        source: a path, the bytes of a file, or an open file.
        channels: how many channels to return: grey becomes RGB by repetition, RGB becomes grey by its ITU-R
            601 luma. By default as many as the image has.
        name: what to call it in messages; by default the path.

    Returns:
        uint8 for 8-bit images, uint16 for 16-bit grey ones, float32 for everything wider.

    Raises:
        DataError: if the file is missing, damaged, cut off, no image, announces more than `MAX_PIXELS`
            pixels, or has a number of channels that cannot become `channels`.
        ResourceError: if it is a TIFF file with more channels than Pillow reads, and tifffile is missing.
    """
    file, name, mine = _open(source, name)
    try:
        with _quiet:
            route, image = _start(file, name)
            if route == "npy":
                array = _read_npy(file, name)
            elif image is None:
                _, _, decoded, _ = _read_tiff(file, name, decode=True)
                assert decoded is not None
                array = _as_kind(decoded, name)
            else:
                if image.format == "PNG":
                    # Decoding alone does not compare checksums, so it passes over flipped bits.
                    image.verify()
                    _, image = _start(file, name)
                    assert image is not None
                image.load()
                array = _oriented(_pixels(image, name), _orientation(image))
    except OmniconvError:
        raise
    except Exception as error:  # damaged files make Pillow and numpy fail in every way there is
        raise DataError(f"{name} is unreadable: {_reason(error)}") from None
    finally:
        if mine:
            file.close()
    return np.ascontiguousarray(array if channels is None else _to_channels(array, channels, name))


def _to_channels(array: np.ndarray, channels: int, name: str) -> np.ndarray:
    have = array.shape[2]
    if have == channels:
        return array
    if (have, channels) == (1, 3):
        return np.repeat(array, 3, axis=2)
    if (have, channels) == (3, 1):
        if array.dtype == np.float32:
            return (array @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
        luma = array.astype(np.uint64) @ np.array([19595, 38470, 7471], np.uint64)
        return ((luma + 0x8000) >> 16).astype(array.dtype)[:, :, None]
    raise DataError(f"{name} has {have} channels where {channels} are needed")
