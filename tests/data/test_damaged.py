"""Five hundred damaged inputs: only DataError may come out, every bad file is named, nothing is written."""

import gzip
import hashlib
import io
import os
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniconv.core.errors import DataError, UsageError
from omniconv.data.audit import audit
from omniconv.data.decode import read_image
from omniconv.data.schema import Task
from omniconv.data.sources import open_images
from omniconv.data.splits import make_splits

FORMATS = [
    ("JPEG", "jpg", {"quality": 85}),
    ("PNG", "png", {}),
    ("TIFF", "tif", {}),
    ("TIFF", "tiff", {"compression": "tiff_lzw"}),
    ("WEBP", "webp", {}),
    ("BMP", "bmp", {}),
    ("GIF", "gif", {}),
]
IMAGES = 420


def snapshot(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*"), key=os.fsencode):
        state = path.lstat()
        digest.update(os.fsencode(path) + repr((state.st_mode, state.st_size, state.st_mtime_ns)).encode())
        if path.is_file() and os.access(path, os.R_OK):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def damaged(rng: random.Random, content: bytes) -> bytes:
    kind = rng.choice(["cut", "flip", "flip", "many", "zeros", "insert", "empty", "text"])
    data = bytearray(content)
    if kind == "cut":
        return bytes(data[: rng.randrange(len(data))])
    if kind == "insert":
        place = rng.randrange(len(data))
        return bytes(data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:])
    if kind == "zeros":
        place = rng.randrange(len(data))
        data[place : place + 64] = bytes(len(data[place : place + 64]))
        return bytes(data)
    if kind == "empty":
        return b""
    if kind == "text":
        return rng.choice(
            [b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"\xff\xd8\xff\xe0", b"RIFF"]
        )
    for _ in range(1 if kind == "flip" else 30):
        # Half of the flips hit the header, where they hurt most.
        place = rng.randrange(min(64, len(data)) if rng.random() < 0.5 else len(data))
        data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def originals() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    out = []
    for format, suffix, options in FORMATS:
        for mode in ("RGB", "L"):
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (24, 20, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(file, format, **options)
            out.append((suffix, file.getvalue()))
    for array in (rng.integers(0, 256, (24, 20, 3), np.uint8), rng.random((24, 20)).astype(np.float32)):
        file = io.BytesIO()
        np.save(file, array)
        out.append(("npy", file.getvalue()))
    return out


def refusal(call: Callable[[], object], *errors: type[Exception]) -> str:
    """Return the message with which a call refuses, or nothing; any other exception fails the test."""
    message = ""
    try:
        call()
    except errors as error:
        message = str(error)
    message.encode()
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.mark.filterwarnings("error")
def test_damaged_images(tmp_path, capfd):
    rng = random.Random(7)
    sources = originals()
    bad = set()
    for number in range(IMAGES):
        suffix, content = sources[number % len(sources)]
        name = f"{'ab'[number % 2]}/{number}.{suffix}"
        content = damaged(rng, content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        if refusal(partial(read_image, content), DataError):
            bad.add(name)
    for number in range(IMAGES, IMAGES + 20):
        suffix, content = sources[number % 2]
        (tmp_path / f"{'ab'[number % 2]}/{number}.{suffix}").write_bytes(content)
    assert len(bad) > IMAGES / 3
    before = snapshot(tmp_path)
    data = open_images(tmp_path)
    problems = audit(data)
    unreadable = [problem for problem in problems if problem.kind == "unreadable"]
    named = {problem.ids[0] for problem in unreadable}
    assert bad <= named
    assert all(problem.ids[0] in problem.message for problem in unreadable)
    splits = make_splits(data, problems, seed=0)
    kept = [i for indices in splits.values() for i in indices]
    assert {data.samples[i].id for i in kept} == {sample.id for sample in data.samples} - named
    for i in kept:
        assert data.read(i).shape[0] == data.schema.channels
    assert snapshot(tmp_path) == before
    assert capfd.readouterr().out == ""


def open_and_audit(path: Path, task: Task | None = None) -> None:
    data = open_images(path, task=task)
    assert all(sample.id.isprintable() for sample in data.samples)
    for problem in audit(data, near=False):
        problem.message.encode()


@pytest.mark.filterwarnings("error")
def test_damaged_tables(tmp_path):
    for i in range(6):
        Image.new("L", (4, 3), i).save(tmp_path / f"{i}.png")
    rng = random.Random(3)
    good = "path,label,split,age\n" + "".join(f"{i}.png,{'ab'[i % 2]},train,{i}\n" for i in range(6))
    pieces = [
        "..",
        "/etc/passwd",
        "\0",
        '"',
        ",,,,",
        "\n\n",
        "\r",
        "\ufeff",
        "\x1b[31m",
        "\u202e",
        "é" * 300,
        "nan",
        "1e999",
    ]
    refused = 0
    for number in range(120):
        text = bytearray(good.encode())
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(text))
            choice = rng.random()
            if choice < 0.4:
                text[place:place] = rng.choice(pieces).encode()
            elif choice < 0.6:
                text[place] ^= 1 << rng.randrange(8)
            elif choice < 0.8:
                del text[place : place + rng.randrange(20)]
            else:
                text[place:place] = rng.randbytes(8)
        path = tmp_path / f"table{number}.csv"
        path.write_bytes(bytes(text))
        before = snapshot(tmp_path)
        task = rng.choice([None, "classification", "multilabel", "regression"])
        message = refusal(partial(open_and_audit, path, task), DataError, UsageError)
        refused += bool(message)
        assert not message or path.name in message or "column" in message
        assert snapshot(tmp_path) == before
    assert 30 < refused < 115


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["idx", "idx.gz", "npz", "parquet"])
def test_damaged_arrays(tmp_path, kind):
    rng = random.Random(11)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    file = io.BytesIO()
    name, labels = "set.npz", b""
    if kind.startswith("idx"):
        name, labels = "train-images-idx3-ubyte", struct.pack(">HBBI", 0, 8, 1, 6) + bytes(range(6))
        file.write(struct.pack(">HBBIII", 0, 8, 3, 6, 8, 8) + images.tobytes())
        if kind == "idx.gz":
            name, file = name + ".gz", io.BytesIO(gzip.compress(file.getvalue()))
    elif kind == "npz":
        np.savez_compressed(file, x_train=images, y_train=np.arange(6))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = "labels.parquet"
        for i in range(6):
            Image.new("L", (4, 3), i).save(tmp_path / f"{i}.png")
        pq.write_table(pa.table({"path": [f"{i}.png" for i in range(6)], "label": list("ababab")}), file)
    if labels:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    path = tmp_path / name
    refused = 0
    for _ in range(40):
        path.write_bytes(damaged(rng, file.getvalue()))
        before = snapshot(tmp_path)
        errors = (DataError, UsageError) if kind == "parquet" else (DataError,)  # a column may be renamed
        refused += bool(refusal(partial(open_and_audit, tmp_path if labels else path), *errors))
        assert snapshot(tmp_path) == before
    assert refused > 8
