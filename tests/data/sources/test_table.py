"""Tables of paths and labels, as they come out of spreadsheets and competitions."""

from pathlib import Path

import pytest
from PIL import Image

from omniconv.core.errors import DataError, UsageError
from omniconv.data.sources import open_images

NAMES = [f"{i}.png" for i in range(6)]


@pytest.fixture
def root(tmp_path) -> Path:
    for number, name in enumerate(NAMES):
        for place in (tmp_path / name, tmp_path / "sub" / f"s{name}"):
            place.parent.mkdir(exist_ok=True)
            Image.new("L", (4, 3), number).save(place)
    return tmp_path


def table(root: Path, *lines: str, name: str = "labels.csv") -> Path:
    path = root / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(values: list[str], header: str = "path,label") -> list[str]:
    return [header, *(f"{name},{value}" for name, value in zip(NAMES, values, strict=True))]


def found(data) -> tuple:
    return data.schema.task, data.schema.classes, [sample.target for sample in data.samples]


def test_one_class_each(root):
    path = table(root, *rows(["b", "a", "b", "a", "c", "c"]))
    data = open_images(path)
    assert found(data) == ("classification", ("a", "b", "c"), [1, 0, 1, 0, 2, 2])
    assert [s.id for s in data.samples] == NAMES
    assert data.read(4).unique().tolist() == [4]
    assert (data.name, data.source) == ("labels", path)


@pytest.mark.parametrize(
    "header",
    [
        "path,label",
        "file,class",
        "filename,target",
        "image,category",
        "id,y",
        "Image Index,Finding Labels",
        "img,other",
    ],
)
def test_columns_are_guessed(root, header):
    assert found(open_images(table(root, *rows(list("abcabc"), header))))[0] == "classification"


def test_folder_with_its_table(root):
    table(root, *rows(list("aabbab")))
    data = open_images(root)
    assert (data.name, data.source, len(data)) == (root.name, root, 6)
    kinds = {problem.kind: problem for problem in data.problems}
    assert len(kinds["unlabelled"].ids) == 6  # the pictures below sub/
    assert open_images(root, task="none").schema.task == "none"


def test_labels_of_a_folder(root, tmp_path_factory):
    elsewhere = table(tmp_path_factory.mktemp("x"), *rows(list("aabbab")), name="train.csv")
    assert open_images(root, labels=elsewhere).schema.classes == ("a", "b")
    table(root, *rows(list("aabbab")), name="train.csv")
    assert open_images(root, labels="train.csv").schema.classes == ("a", "b")
    hint = [p.message for p in open_images(root / "sub").problems + open_images(root, task="none").problems]
    assert not any("train.csv may hold" in message for message in hint)
    with pytest.raises(DataError, match=r"no file x\.csv"):
        open_images(root, labels="x.csv")
    with pytest.raises(UsageError, match="labels belong to a folder"):
        open_images(root / "0.png", labels=elsewhere)


def test_a_table_of_another_name_is_hinted_at(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "0.png")
    table(tmp_path, "path,label", "0.png,a", name="train.csv")
    hints = [problem.message for problem in open_images(tmp_path).problems if problem.kind == "hint"]
    assert hints == ["train.csv may hold labels; to use it, give --labels train.csv"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path;label\n0.png;a\n1.png;b\n", "l.csv"),
        ("path\tlabel\n0.png\ta\n1.png\tb\n", "l.tsv"),
        ("path,label\r\n0.png,a\r\n\r\n1.png,b\r\n", "l.csv"),
        ("\ufeffpath,label\n0.png,a\n1.png,b", "l.csv"),
        ('path,label\n"0.png","a"\n"1.png","b"\n', "l.csv"),
        ("0.png,a\n1.png,b\n", "l.csv"),
        ("path,label\n 0.png , a \n./1.png,b\n", "l.csv"),
        ("path,label\nsub\\s0.png,a\nsub/s1.png,b\n", "l.csv"),
        ("path,label\n0,a\n1,b\n", "l.csv"),
        ("path,label\ns0.png,a\ns1,b\n", "l.csv"),
    ],
)
def test_dialects(root, text, name):
    (root / name).write_bytes(text.encode())
    data = open_images(root / name)
    assert found(data) == ("classification", ("a", "b"), [0, 1])
    assert data.read(1).unique().tolist() == [1]


def test_utf16_and_absolute_paths(root):
    (root / "l.csv").write_text(f"path,label\n{root}/0.png,ä\n{root}/1.png,b\n", encoding="utf-16")
    data = open_images(root / "l.csv")
    assert data.schema.classes == ("b", "ä")
    assert [s.id for s in data.samples] == ["0.png", "1.png"]


def test_parquet(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"file": NAMES, "label": [1.0, 2.0, 1.0, 2.0, 1.0, None]}), root / "labels.parquet"
    )
    data = open_images(root / "labels.parquet")
    assert found(data) == ("classification", ("1", "2"), [0, 1, 0, 1, 0])
    assert [p.ids for p in data.problems] == [("5.png",)]
    pq.write_table(pa.table({"file": NAMES[:2], "tags": [["a", "b"], []]}), root / "labels.parquet")
    assert found(open_images(root / "labels.parquet")) == ("multilabel", ("a", "b"), [(1, 1), (0, 0)])
    (root / "labels.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"labels\.parquet is unreadable"):
        open_images(root / "labels.parquet")


def test_several_labels(root):
    for separator in "|;":
        cells = ["x", f'"x{separator}y"', "y", "", f'"z{separator} x"', "z"]
        data = open_images(table(root, *rows(cells)))
        assert data.schema.task == "multilabel"
        assert data.schema.classes == ("x", "y", "z")
        assert data.samples[1].target == (1, 1, 0)
        assert data.samples[3].target == (0, 0, 0)
        assert data.samples[4].target == (1, 0, 1)
        assert [p.kind for p in data.problems] == ["guess"]
    spaced = ["clear", "clear water", "cloudy", "cloudy road water", "clear road", "cloudy water"]
    assert open_images(table(root, *rows(spaced))).schema.classes == ("clear", "cloudy", "road", "water")
    names = ["golden retriever", "poodle", "labrador retriever", "poodle", "golden retriever", "poodle"]
    assert open_images(table(root, *rows(names))).schema.task == "classification"
    assert open_images(table(root, *rows(names)), task="multilabel").schema.classes == (
        "golden", "labrador", "poodle", "retriever",
    )  # fmt: skip


def test_columns_of_zeros_and_ones(root):
    cells = ["1,0,1", "0,0,0", "1,1,1", "0,1,0", "0,0,1", "1,0,0"]
    data = open_images(table(root, *rows(cells, "path,cat,dog,bird")))
    assert data.schema.task == "multilabel"
    assert data.schema.classes == ("cat", "dog", "bird")
    assert data.samples[0].target == (1, 0, 1)
    one = ["1,0", "0,1", "1,0", "0,1", "0,1", "1,0"]
    path = table(root, *rows(one, "path,cat,dog"))
    assert found(open_images(path)) == ("classification", ("cat", "dog"), [0, 1, 0, 1, 1, 0])
    assert open_images(path, task="multilabel").schema.task == "multilabel"
    assert open_images(path, target="cat").schema.classes == ("0", "1")
    with pytest.raises(DataError, match=r"labels\.csv line 4: b must be 0 or 1, got '2'"):
        open_images(
            table(root, *rows(["1,0", "0,1", "1,2", "0,1", "0,1", "1,0"], "path,a,b")),
            target=["a", "b"],
            task="multilabel",
        )


def test_numbers(root):
    data = open_images(
        table(root, *rows(["1.5", "2", "-3e-1", "0", "nan", "7"], "path,age")), task="regression"
    )
    assert found(data) == ("regression", ("age",), [(1.5,), (2.0,), (-0.3,), (0.0,), (7.0,)])
    assert [p.kind for p in data.problems] == ["unlabelled"]
    two = open_images(table(root, *rows([f"{i},{i / 2}" for i in range(6)], "path,x,y")), target=["x", "y"])
    assert found(two)[:2] == ("regression", ("x", "y"))
    assert two.samples[3].target == (3.0, 1.5)
    with pytest.raises(DataError, match="line 3: age must be a finite number, got 'old'"):
        open_images(table(root, *rows(["1", "old", "3", "4", "5", "6"], "path,age")), task="regression")


def test_many_numbers_are_a_regression(tmp_path):
    for i in range(30):
        Image.new("L", (4, 3), i).save(tmp_path / f"{i}.png")
    fractions = ["path,age", *(f"{i}.png,{i + 0.5}" for i in range(30))]
    data = open_images(table(tmp_path, *fractions))
    assert data.schema.task == "regression"
    assert data.problems[0].kind == "guess"
    assert (
        open_images(table(tmp_path, "path,age", *(f"{i}.png,{i}" for i in range(30)))).schema.task
        == "regression"
    )
    digits = open_images(table(tmp_path, "path,age", *(f"{i}.png,{i % 10}" for i in range(30))))
    assert digits.schema.task == "classification"


def test_split_and_group(root):
    lines = [
        "path,label,split,patient",
        "0.png,a,train,p1",
        "1.png,b,Test,p2",
        "2.png,a,valid,p1",
        "3.png,b,,p3",
    ]
    data = open_images(table(root, *lines), group="patient")
    assert [(s.split, s.group) for s in data.samples] == [
        ("train", "p1"), ("test", "p2"), ("val", "p1"), (None, "p3"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="several columns"):
        open_images(table(root, "path,a,b", "0.png,x,y"))
    with pytest.raises(UsageError, match="no column 'patients' for the group; did you mean patient"):
        open_images(table(root, *lines), group="patients")
    with pytest.raises(DataError, match=r"labels\.csv line 2: split must be train, val or test, got 'tra'"):
        open_images(table(root, "path,label,split", "0.png,a,tra"))


def test_columns_that_are_not_used_are_mentioned(root):
    data = open_images(table(root, "path,label,sex,age", "0.png,0,1,40", "1.png,1,0,50"))
    assert found(data) == ("classification", ("0", "1"), [0, 1])
    assert [p.message for p in data.problems] == ["labels are taken from label; not used: sex, age"]


def test_table_without_labels(root):
    data = open_images(table(root, "path", "0.png", "1.png"))
    assert (data.schema.task, len(data)) == ("none", 2)
    with pytest.raises(DataError, match="no column of labels"):
        open_images(root / "labels.csv", task="classification")


def test_rows_that_repeat(root):
    data = open_images(table(root, "path,label", "0.png,a", "1.png,b", "0.png,a"))
    assert len(data) == 2
    assert [p.kind for p in data.problems] == ["repeated"]
    lines = ["path,label", "0.png,a", "1.png,b", "0.png,b"]
    with pytest.raises(DataError, match=r"labels\.csv line 4 and line 2 give 0\.png different labels"):
        open_images(table(root, *lines))
    merged = open_images(root / "labels.csv", task="multilabel")
    assert [s.target for s in merged.samples] == [(1, 1), (0, 1)]


def test_missing_files_are_unreadable(root):
    data = open_images(table(root, "path,label", "0.png,a", "none.png,b", "1.png,b"))
    (problem,) = data.problems
    assert (problem.kind, problem.ids, problem.message) == ("unreadable", ("none.png",), "no file none.png")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["path,label", "../x.png,a"], r"line 2: '\.\./x\.png' leads out of"),
        (["path,label", "0.png,a", "/etc/passwd,a"], "line 3: '/etc/passwd' leads out of"),
        (["path,label", "sub/../../x.png,a"], "leads out of"),
        (["path,label", "link.png,a"], "line 2: 'link.png' leads out of"),
        (["path,label", "0.png,a,b"], "line 2 has 3 cells where the header has 2"),
        (["path,label", ",a"], "line 2 names no image file"),
        (["path,label", "0.png,"], "the column label is empty"),
        (["path,label"], "has a header and no lines"),
        ([""], "is empty"),
        (["path,path", "0.png,a"], "two columns called 'path'"),
        (["a,b", "x,y"], "no column of image files"),
        (["path,label", '"0.png,a', "1.png,b"], "is unreadable"),
        (["path,label", '"0.png"x,a'], "line 2 is unreadable"),
        (["0.png,a,b", "1.png,b,c"], "has no header"),
        (["path,label", "a\0b.png,x"], "line 2 names no image file"),
    ],
)
def test_wrong_tables(root, lines, reason):
    (root / "link.png").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match=reason):
        open_images(table(root, *lines))


def test_ambiguous_names(root):
    (root / "sub2").mkdir()
    Image.new("L", (4, 3)).save(root / "sub2/s0.png")
    with pytest.raises(DataError, match=r"line 2: 's0\.png' may be sub/s0\.png, sub2/s0\.png"):
        open_images(table(root, "path,label", "s0.png,a", "0.png,b"))


def test_names_that_are_not_utf8(root):
    import os

    name = b"\xff\xfe.png"
    os.rename(root / "0.png", os.path.join(os.fsencode(root), name))
    (root / "labels.csv").write_bytes(b"path,label\n" + name + b",a\n1.png,b\n")
    data = open_images(root / "labels.csv")
    assert data.samples[0].id == r"\xff\xfe.png"
    assert data.read(0).unique().tolist() == [0]
