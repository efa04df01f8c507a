"""Damaged data at the command line: one sentence, the right exit code, every bad file named, nothing changed."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniconv.cli.main import run


def digest(root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        found.update(f"{path} {path.lstat().st_mtime_ns}".encode(errors="surrogateescape"))
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@pytest.fixture
def damaged_folder(tmp_path: Path) -> tuple[Path, set[str]]:
    """Class folders with 30 good pictures and 12 that no reader could decode; returns it and their names."""
    root, chance, bad = tmp_path / "data", random.Random(0), set()
    pixels = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for index in range(15):
            array = pixels.integers(0, 256, (12, 10, 3)).astype(np.uint8)
            Image.fromarray(array).save(root / label / f"{index}.png")
        for index in range(6):
            name = ["cut", "empty", "text", "new\nline", "cut jpeg", "flipped"][index]
            suffix = ".jpg" if "jpeg" in name else ".png"
            array = pixels.integers(0, 256, (30, 20, 3)).astype(np.uint8)
            path = root / label / f"{name}{suffix}"
            Image.fromarray(array).save(path)
            content = bytearray(path.read_bytes())
            if name == "empty":
                content = bytearray()
            elif name == "text":
                content = bytearray(b"not a picture")
            elif name == "flipped":
                content[len(content) // 2] ^= 1 << chance.randrange(8)
            else:
                content = content[: len(content) // 2]
            path.write_bytes(content)
            bad.add(f"{label}/{name}{suffix}".replace("\n", "\\n"))
    return root, bad


def test_check_names_every_bad_file(damaged_folder, capsys):
    root, bad = damaged_folder
    before = digest(root)
    assert run(["check", str(root), "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {i for p in problems if p["kind"] == "unreadable" for i in p["ids"]} == bad
    assert digest(root) == before


def test_fit_stops_names_every_bad_file_and_goes_on_when_told(damaged_folder, capsys, tmp_path, quick_plan):
    root, bad = damaged_folder
    before = digest(root)
    common = ["--plan", str(quick_plan), "--export", "none"]
    assert run(["fit", str(root), "--out", str(tmp_path / "one"), *common]) == 3
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == f"12 of 42 images unreadable (limit 1%): {tmp_path}/one/bad.csv. Go on with --skip-bad"
    named = (tmp_path / "one" / "bad.csv").read_text()
    assert all(name in named for name in bad)
    assert run(["fit", str(root), "--out", str(tmp_path / "two"), "--skip-bad", *common]) == 0
    assert digest(root) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.mkdir(),
        lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")),
        lambda p: p.write_bytes(b"\x00" * 100),
        lambda p: p.with_suffix("").mkdir(),
    ],
    ids=["empty folder", "no pictures", "no known file", "nothing there"],
)
def test_what_is_no_data_is_one_sentence(make, tmp_path, capsys):
    path = tmp_path / "thing.npz"
    make(path)
    assert run(["fit", str(path), "--out", str(tmp_path / "run")]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_bomb_is_refused_from_its_header(tmp_path, capsys):
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.new("L", (9, 9), 3).save(tmp_path / "data" / label / "good.png")
    (tmp_path / "data" / "a" / "bomb.png").write_bytes(bomb)
    assert run(["check", str(tmp_path / "data"), "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    (found,) = [p for p in problems if p["kind"] == "unreadable"]
    assert found["ids"] == ["a/bomb.png"]
    assert "30000" in found["message"] or "pixels" in found["message"]
