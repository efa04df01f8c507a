"""Sets with known faults, and real sets that have none."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omniconv.core.errors import DataError
from omniconv.data.audit import audit
from omniconv.data.sources import open_images
from omniconv.papers.check import shared_data


def photograph(seed: int, size: int = 64) -> Image.Image:
    """A picture with coarse and fine structure, unlike any other."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).filter(
        ImageFilter.GaussianBlur(1)
    )
    return Image.blend(coarse, fine, 0.35)


def write(root: Path, files: dict[str, Image.Image]) -> Path:
    for name, image in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def by_kind(problems) -> dict:
    return {problem.kind: problem for problem in problems}


def digest(root: Path) -> str:
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    contents = [(root / name).read_bytes() for name in names if (root / name).is_file()]
    return hashlib.sha256(repr((names, contents)).encode()).hexdigest()


def test_a_good_set_has_no_problems(tmp_path):
    root = write(
        tmp_path, {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    )
    before = digest(root)
    calls = []
    assert audit(open_images(root), progress=lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (12, 12)
    assert digest(root) == before


def test_unreadable_files_are_named_once(tmp_path):
    root = write(
        tmp_path, {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    )
    (root / "a/0.png").write_bytes(b"")
    content = (root / "b/3.png").read_bytes()
    (root / "b/3.png").write_bytes(content[: len(content) // 2])  # the header is good
    found = [problem for problem in audit(open_images(root)) if problem.kind == "unreadable"]
    assert [problem.ids for problem in found] == [("a/0.png",), ("b/3.png",)]
    assert all(problem.ids[0] in problem.message and problem.severity == "error" for problem in found)


def test_duplicates_and_conflicts(tmp_path):
    files = {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    files |= {"a/copy.bmp": files["a/0.png"], "b/copy.png": files["a/0.png"], "b/again.png": files["b/5.png"]}
    problems = by_kind(audit(open_images(write(tmp_path, files))))
    assert set(problems) == {"duplicate", "conflict"}
    assert set(problems["duplicate"].groups) == {
        ("a/0.png", "a/copy.bmp", "b/copy.png"),
        ("b/5.png", "b/again.png"),
    }
    assert problems["duplicate"].message.startswith("3 exact copies among the images: ")
    assert problems["conflict"].message == (
        "1 image with different labels on identical copies: a/0.png (a) and b/copy.png (b)"
    )


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: recoded(image, "JPEG", quality=60),
        lambda image: recoded(image, "WEBP", quality=60),
        lambda image: image.resize((96, 96), Image.Resampling.LANCZOS),
        lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
        lambda image: image.point(lambda value: min(255, int(value * 1.02))),
        lambda image: image.convert("L").convert("RGB"),
    ],
)
def test_edited_copies_are_found(tmp_path, edit):
    files = {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    problems = by_kind(audit(open_images(write(tmp_path, files | {"b/copy.png": edit(files["b/2.png"])}))))
    assert problems["near-duplicate"].groups == (("b/2.png", "b/copy.png"),)
    assert "conflict" not in problems
    assert "near-duplicate" not in by_kind(audit(open_images(tmp_path), near=False))


def recoded(image: Image.Image, format: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def test_different_pictures_on_one_background_are_not_copies(tmp_path):
    # Icons: the same frame, one glyph of another shape in each.
    files = {}
    for number in range(12):
        image = Image.new("L", (28, 28), 230)
        rng = np.random.default_rng(number)
        image.paste(
            Image.fromarray(rng.integers(0, 2, (5, 5), np.uint8) * 255).resize(
                (15, 15), Image.Resampling.NEAREST
            ),
            (6, 6),
        )
        files[f"{'ab'[number % 2]}/{number}.png"] = image
    assert audit(open_images(write(tmp_path, files))) == []


def test_leakage_between_given_splits(tmp_path):
    splits = {"train": range(6), "val": range(6, 12), "test": range(12, 18)}
    files = {f"{s}/{'ab'[i % 2]}/{i}.png": photograph(i) for s, numbers in splits.items() for i in numbers}
    files |= {"val/a/exact.png": photograph(0), "test/b/near.png": recoded(photograph(1), "JPEG", quality=70)}
    files |= {"val/b/other.png": photograph(13)}
    found = [p for p in audit(open_images(write(tmp_path, files))) if p.kind == "leakage"]
    assert {(p.message, p.ids) for p in found} == {
        ("1 duplicate spans train and val; kept in train only", ("val/a/exact.png",)),
        ("1 near-duplicate spans train and test; kept in train only", ("test/b/near.png",)),
        ("1 duplicate spans test and val; kept in test only", ("val/b/other.png",)),
    }


def test_groups_that_span_given_splits(tmp_path):
    write(tmp_path, {f"{i}.png": photograph(i) for i in range(4)})
    lines = [
        "path,label,split,who",
        "0.png,a,train,p",
        "1.png,b,test,p",
        "2.png,a,train,q",
        "3.png,b,train,q",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    problems = by_kind(audit(open_images(tmp_path, group="who")))
    assert problems["group-leakage"].message == "1 group in more than one of the given splits: p"


def test_look_alikes_are_not_grouped(tmp_path):
    # A fixed camera: the same scene with a little noise, more than fifty times.
    rng = np.random.default_rng(0)
    scene = np.asarray(photograph(0, 32)).astype(int)
    files = {}
    for number in range(60):
        noisy = np.clip(scene + rng.integers(-2, 3, scene.shape), 0, 255).astype(np.uint8)
        files[f"{'ab'[number % 2]}/{number}.png"] = Image.fromarray(noisy)
    problems = by_kind(audit(open_images(write(tmp_path, files))))
    assert set(problems) == {"look-alikes"}
    assert "60 images look so much alike" in problems["look-alikes"].message


def test_constant_images(tmp_path):
    files = {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    files |= {"a/blue.png": Image.new("RGB", (9, 9), (0, 0, 200)), "a/black.png": Image.new("RGB", (9, 7))}
    problems = by_kind(audit(open_images(write(tmp_path, files))))
    assert problems["constant"].ids == ("a/black.png", "a/blue.png")
    assert "near-duplicate" not in problems


def table(tmp_path: Path, counts: dict[str, int], extra: str = "") -> Path:
    lines, number = ["path,label"], 0
    for name, count in counts.items():
        for _ in range(count):
            photograph(number, 16).save(tmp_path / f"{number}.png")
            lines.append(f"{number}.png,{name}")
            number += 1
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_classes(tmp_path):
    problems = by_kind(audit(open_images(table(tmp_path, {"cat": 60, "dog": 40, "yak": 4})), near=False))
    assert problems["imbalance"].message == "classes are unbalanced 15 to 1: 60 images of cat, 4 of yak"
    assert problems["tiny-class"].message == "1 of 3 classes with fewer than 5 images: yak (4)"
    assert set(problems) == {"imbalance", "tiny-class"}


@pytest.mark.parametrize(
    ("counts", "pairs"),
    [
        ({"cat": 20, "Cat": 15}, {("Cat", "cat")}),
        ({"sea lion": 20, "sea_lion": 6}, {("sea_lion", "sea lion")}),
        ({"dog": 30, "dgo": 1}, {("dgo", "dog")}),
        ({"airplane": 40, "airplne": 2, "ship": 20}, {("airplne", "airplane")}),
        ({"male": 20, "female": 18}, set()),
        ({"class 1": 30, "class 2": 1}, set()),
        ({"cat": 30, "dog": 1}, set()),
        ({"1": 30, "11": 1}, set()),
    ],
)
def test_label_typos(tmp_path, counts, pairs):
    problems = audit(open_images(table(tmp_path, counts)), near=False)
    assert {p.ids for p in problems if p.kind == "label-typo"} == pairs


def test_classes_without_training_images(tmp_path):
    files = {f"train/{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(5)}
    files |= {f"test/c/{i}.png": photograph(50 + i) for i in range(5)}
    problems = by_kind(audit(open_images(write(tmp_path, files))))
    assert problems["class-missing"].message == "1 class without training images: c"


def test_multilabel_and_regression(tmp_path):
    for i in range(12):
        photograph(i, 16).save(tmp_path / f"{i}.png")
    several = ["path,cat,dog", *(f"{i}.png,1,{int(i == 0)}" for i in range(12))]
    (tmp_path / "labels.csv").write_text("\n".join(several))
    problems = by_kind(audit(open_images(tmp_path, task="multilabel"), near=False))
    assert problems["imbalance"].ids == ("dog", "cat")
    (tmp_path / "labels.csv").write_text("\n".join(["path,x", *(f"{i}.png,{i / 2}" for i in range(12))]))
    assert audit(open_images(tmp_path, task="regression"), near=False) == []


def test_problems_of_opening_are_kept(tmp_path):
    files = {f"{c}/{i}.png": photograph(10 * n + i) for n, c in enumerate("ab") for i in range(6)}
    write(tmp_path, files)
    (tmp_path / "notes.txt").write_text("x")
    assert [p.kind for p in audit(open_images(tmp_path))] == ["ignored"]


def test_digits_and_tiny_images():
    # 1,797 handwritten digits of 8 x 8 pixels, of which none is a copy.
    assert audit(open_images("digits")) == []


def test_images_of_one_pixel(tmp_path):
    files = {f"{c}/{i}.png": Image.new("L", (1, 1), 20 * i + n) for n, c in enumerate("ab") for i in range(6)}
    assert set(by_kind(audit(open_images(write(tmp_path, files))))) == {"constant"}


@pytest.mark.slow
def test_real_sets():
    try:
        mnist, fashion = shared_data("mnist"), shared_data("fashion-mnist")
    except DataError as error:
        pytest.skip(str(error))
    # The published test set of MNIST has no copies.
    assert audit(open_images(mnist)) == []
    # Fashion-MNIST is known to hold some.
    problems = by_kind(audit(open_images(fashion)))
    assert 5 <= len(problems["near-duplicate"].groups) <= 100
    assert "duplicate" not in problems
