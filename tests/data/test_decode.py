"""Every format against arrays that are known, or against Pillow's own operations."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from omniconv.core.errors import DataError, ResourceError
from omniconv.data.decode import MAX_PIXELS, channels_last, read_header, read_image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), np.uint16)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def agrees(content: bytes, expected: np.ndarray) -> None:
    array = read_image(content)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
    header = read_header(content)
    assert (header.height, header.width, header.channels) == array.shape
    assert header.kind == str(array.dtype)


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("BMP", {})]
)
def test_lossless_colour(format, options):
    agrees(encoded(Image.fromarray(RGB), format, **options), RGB)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_lossless_grey(format):
    agrees(encoded(Image.fromarray(GREY), format), GREY[:, :, None])


def test_jpeg_is_what_pillow_decodes():
    content = encoded(Image.fromarray(RGB), "JPEG", quality=90)
    agrees(content, np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_stay(format):
    agrees(encoded(Image.fromarray(DEEP), format), DEEP[:, :, None])


def test_sixteen_bits_big_endian():
    file = io.BytesIO()
    tifffile.imwrite(file, DEEP, byteorder=">")
    agrees(file.getvalue(), DEEP[:, :, None])


def test_sixteen_bit_colour_is_reduced_and_says_so():
    file = io.BytesIO()
    deep = RGB.astype(np.uint16) * 257
    tifffile.imwrite(file, deep, photometric="rgb")
    agrees(file.getvalue(), RGB)
    assert read_header(file.getvalue()).reduced


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_one_bit(format):
    bits = GREY > 127
    agrees(encoded(Image.fromarray(bits), format), (bits * np.uint8(255))[:, :, None])


def test_palette():
    image = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    agrees(encoded(image, "PNG"), np.asarray(image.convert("RGB")))
    agrees(encoded(image, "GIF"), np.asarray(Image.open(io.BytesIO(encoded(image, "GIF"))).convert("RGB")))


def over_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :-1].astype(float), rgba[..., -1:] / 255
    return np.floor(colour * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_laid_over_white(channels):
    pixels = RNG.integers(0, 256, (5, 7, channels), np.uint8)
    agrees(encoded(Image.fromarray(pixels), "PNG"), over_white(pixels))


def test_opaque_alpha_changes_nothing():
    pixels = np.dstack([RGB, np.full((5, 7), 255, np.uint8)])
    agrees(encoded(Image.fromarray(pixels), "PNG"), RGB)


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 1, 0])
    image.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(image, "PNG", transparency=0)
    np.testing.assert_array_equal(read_image(content), [[[255] * 3, [40, 50, 60]], [[40, 50, 60], [255] * 3]])


def test_cmyk_jpeg():
    # Adobe stores CMYK inverted; Pillow writes that, so a round trip must give the picture back.
    flat = np.broadcast_to(np.array([200, 60, 20], np.uint8), (16, 16, 3))
    content = encoded(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=95)
    array = read_image(content)
    assert array.shape == (16, 16, 3)
    assert np.abs(array.astype(int) - flat).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(
        Image.fromarray(RGB), format, exif=exif, **({"lossless": True} if format == "WEBP" else {})
    )
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
    if format == "TIFF":
        # Pillow turns TIFF files when it loads them: compare with the turned original instead.
        turned = Image.fromarray(RGB)
        turned.getexif()[0x0112] = orientation
        expected = ImageOps.exif_transpose(turned)
    agrees(content, np.asarray(expected))


def test_damaged_exif_does_not_spoil_the_picture():
    content = encoded(
        Image.fromarray(RGB), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\x99" * 20
    )
    assert read_image(content).shape == (5, 7, 3)


def test_first_page_and_first_frame():
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    for format in ("TIFF", "GIF"):
        content = encoded(pages[0], format, save_all=True, append_images=pages[1:])
        agrees(content, GREY[:, :, None])
        assert read_header(content).pages
        assert not read_header(encoded(pages[0], format)).pages


def test_npy_layouts():
    agrees(npy(GREY), GREY[:, :, None])
    agrees(npy(RGB), RGB)
    agrees(npy(np.moveaxis(RGB, 2, 0)), RGB)
    agrees(npy(DEEP.astype(">u2")), DEEP[:, :, None])
    agrees(npy(GREY > 9), (GREY > 9)[:, :, None] * np.uint8(255))
    many = RNG.random((13, 40, 30)).astype(np.float64)
    agrees(npy(many), np.moveaxis(many, 0, 2).astype(np.float32))
    assert channels_last(np.zeros((4, 4, 4))).shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "has 2 or 3 axes, this array has 4"),
        (np.zeros((0, 3), np.uint8), "is empty"),
        (np.array([[np.nan]], np.float32), "not finite"),
        (np.array([["a"]]), "not numbers"),
        (np.array([[{}]], dtype=object), "not numbers"),
    ],
)
def test_npy_that_is_no_picture(array, reason):
    with pytest.raises(DataError, match=reason):
        read_image(npy(array))


def test_npy_cut_off_or_lying():
    with pytest.raises(DataError, match="cut off"):
        read_image(npy(RGB)[:-1])
    with pytest.raises(DataError, match="cut off"):
        read_image(bytes_of_header((9999, 9999)) + b"abc")
    with pytest.raises(DataError, match="unreadable"):
        read_image(npy(np.zeros((2, 2), np.uint8)).replace(b"(2, 2)", b"(2**2,"))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_many_channels_through_tifffile(planar):
    pixels = RNG.integers(0, 65536, (5, 7, 6), np.uint16)
    file = io.BytesIO()
    stored = pixels if planar == "contig" else np.moveaxis(pixels, 2, 0)
    tifffile.imwrite(file, stored, photometric="minisblack", planarconfig=planar)
    agrees(file.getvalue(), pixels)


def test_a_set_needs_tifffile_only_if_all_of_it_does(tmp_path):
    tifffile.imwrite(tmp_path / "six.tif", np.zeros((5, 7, 6), np.uint8), planarconfig="contig")
    code = (
        "import sys; sys.modules['tifffile'] = None\n"
        "from omniconv.data.sources import open_images\n"
        "try: print(open_images(sys.argv[1]).problems[0].message)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert alone.startswith("ResourceError six.tif has more channels than Pillow reads; install tifffile")
    Image.fromarray(RGB).save(tmp_path / "three.png")
    beside = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert beside.startswith("six.tif has more channels than Pillow reads")


def test_four_channels_without_alpha_stay_four():
    pixels = RNG.integers(0, 256, (5, 7, 4), np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", extrasamples=["unspecified"])
    agrees(file.getvalue(), pixels)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_tiff_alpha_is_alpha(mode):
    pixels = RNG.integers(0, 256, (5, 7, len(mode)), np.uint8)
    agrees(encoded(Image.fromarray(pixels), "TIFF"), over_white(pixels))


def test_many_channels_without_tifffile(tmp_path):
    tifffile.imwrite(tmp_path / "six.tif", np.zeros((5, 7, 6), np.uint8), planarconfig="contig")
    code = (
        "import sys; sys.modules['tifffile'] = None\n"
        "from omniconv.data.decode import read_image\n"
        "try: read_image(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "six.tif"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(ResourceError.__name__)
    assert "pip install tifffile" in result.stdout


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_from_the_header():
    for read in (read_header, read_image):
        with pytest.raises(DataError, match="million"):
            read(bomb(30000, 30000))
        with pytest.raises(DataError, match="million"):
            read(bytes_of_header((99999, 9999)))


def bytes_of_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def test_tiff_bomb_is_refused_from_the_header():
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 4, 6), np.uint8), photometric="minisblack", planarconfig="contig")
    content = bytearray(file.getvalue())
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        tags = tiff.pages[0].tags
        for name in ("ImageWidth", "ImageLength"):
            tag = tags[name]
            content[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 60000)
    for read in (read_header, read_image):
        with pytest.raises(DataError, match="million"):
            read(bytes(content))


def test_large_but_allowed_gives_no_warning():
    width = MAX_PIXELS // 10000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header(bomb(width, 9999)).width == width


def test_truncated_files_are_errors():
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8))
    for format in ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"):
        content = encoded(noise, format)
        for share in (0.05, 0.5, 0.9):
            with pytest.raises(DataError, match="the image"):
                read_image(content[: int(len(content) * share)])


def test_flipped_bits_in_png_are_errors():
    content = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "PNG")
    for place in RNG.integers(8, len(content) - 12, 200).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(RNG.integers(8))
        with pytest.raises(DataError):
            read_image(bytes(damaged))
    with pytest.raises(DataError, match="unreadable"):
        read_image(content[:-12])  # the pixels are there, the end is not


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    for name, reason in [
        ("empty.png", "empty"),
        ("text.jpg", "no image"),
        ("folder.png", "folder"),
        ("no.png", "no file"),
    ]:
        for read in (read_header, read_image):
            with pytest.raises(DataError, match=reason) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)


def test_programs_are_never_started():
    # Pillow would hand this to Ghostscript.
    with pytest.raises(DataError, match="no image format"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def test_wrong_extension_is_read_by_content(tmp_path):
    (tmp_path / "png.jpg").write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "png.jpg"), RGB)


def test_names_are_shown_in_one_line(tmp_path):
    path = tmp_path / "a\nb\udcff.png"
    path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert r"a\nb\xff.png is unreadable" in str(caught.value)
    str(caught.value).encode()


def test_channels():
    png = encoded(Image.fromarray(RGB), "PNG")
    np.testing.assert_array_equal(
        read_image(png, channels=1)[:, :, 0], np.asarray(Image.fromarray(RGB).convert("L"))
    )
    grey = encoded(Image.fromarray(GREY), "PNG")
    np.testing.assert_array_equal(read_image(grey, channels=3), np.dstack([GREY] * 3))
    floats = RNG.random((5, 7, 3)).astype(np.float32)
    expected = floats @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read_image(npy(floats), channels=1)[:, :, 0], expected, rtol=1e-6)
    with pytest.raises(DataError, match="3 channels where 5 are needed"):
        read_image(png, channels=5)


def test_open_files_stay_open():
    file = io.BytesIO(encoded(Image.fromarray(RGB), "PNG"))
    file.read()
    np.testing.assert_array_equal(read_image(file), RGB)
    np.testing.assert_array_equal(read_image(file), RGB)
    assert not file.closed


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    content = encoded(Image.fromarray(RGB), "PNG")
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_image, [content] * 200))) == 200
    assert warnings.filters == before


def test_path_types(tmp_path):
    path = Path(tmp_path / "x.png")
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    np.testing.assert_array_equal(read_image(path), RGB)
