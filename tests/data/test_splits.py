"""Properties that every division must have, and the sizes that it should have."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniconv.core.errors import DataError
from omniconv.data.schema import Problem, Sample, Schema
from omniconv.data.sources import ImageData, open_images
from omniconv.data.splits import load_splits, make_splits, save_splits


def made(samples: list[Sample], task="classification", classes: int = 5) -> ImageData:
    """A set without pixels: splits look at labels alone."""
    data = ImageData()
    data.name, data.source, data.problems, data.fingerprint = "made", Path("made"), [], ""
    data.samples = samples
    data.schema = Schema(task, tuple(f"c{i}" for i in range(classes)), 1, 0, 255, 8, 8)
    return data


def labelled(counts: list[int], **more) -> ImageData:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return made([Sample(str(i), label, **more) for i, label in enumerate(labels)], classes=len(counts))


def sizes(splits) -> tuple[int, int, int]:
    return tuple(len(splits[name]) for name in ("train", "val", "test"))


@st.composite
def sets(draw):
    n = draw(st.integers(1, 80))
    task = draw(st.sampled_from(["classification", "multilabel", "regression", "none"]))
    given_splits = draw(
        st.sampled_from([(None,), ("train", "test"), ("train", "val"), ("train", "val", "test", None)])
    )
    groups = draw(st.sampled_from([0, 3, 20]))
    pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    samples = []
    for i in range(n):
        target = {
            "classification": lambda: draw(st.integers(0, 4)),
            "multilabel": lambda: tuple(float(draw(st.booleans())) for _ in range(5)),
            "regression": lambda: tuple(draw(st.floats(-9, 9)) for _ in range(5)),
            "none": lambda: None,
        }[task]()
        group = f"g{draw(st.integers(0, groups))}" if groups else None
        samples.append(Sample(str(i), target, group, pick(given_splits)))
    members = st.lists(st.integers(0, n - 1), min_size=2, max_size=4, unique=True) if n > 1 else st.nothing()
    pairs = draw(st.lists(members, max_size=5)) if n > 1 else []
    problems = [Problem("duplicate", "", (), "warning", tuple(tuple(map(str, p)) for p in pairs))]
    bad = draw(st.sets(st.integers(0, n - 1), max_size=3))
    problems.append(Problem("unreadable", "", tuple(map(str, bad)), "error"))
    return made(samples, task), problems, bad, pairs


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(sets(), st.integers(0, 5))
def test_every_division(case, seed):
    data, problems, bad, pairs = case
    splits = make_splits(data, problems, seed=seed)
    home = {i: name for name, indices in splits.items() for i in indices}
    # Nothing is lost, nothing is there twice, nothing unreadable is there at all.
    assert sum(map(len, splits.values())) == len(home)
    assert set(home) == set(range(len(data))) - bad
    assert make_splits(data, problems, seed=seed) == splits
    splittable = {s.split for s in data.samples} - {None}
    for i, sample in enumerate(data.samples):
        if i in home and sample.split in ("val", "test"):
            assert home[i] == sample.split
    if splittable == set():
        # No group and no pair of copies spans two splits.
        for group in {s.group for s in data.samples} - {None}:
            assert len({home[i] for i, s in enumerate(data.samples) if s.group == group and i in home}) <= 1
        for pair in pairs:
            assert len({home[i] for i in pair if i in home}) <= 1


@pytest.mark.parametrize("counts", [[100, 100], [1000, 50, 20], [7] * 30, [40, 41, 39, 5]])
def test_stratified(counts):
    splits = make_splits(labelled(counts), [], seed=1)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        found = Counter(labels[i] for i in splits[name])
        for label, count in enumerate(counts):
            assert abs(found[label] - share * count) <= 1
        assert abs(len(splits[name]) - share * len(labels)) <= 0.02 * len(labels) + 1


@pytest.mark.parametrize("counts", [[1] * 100, [2] * 100, [3] * 100, [1, 1, 1], [1, 2]])
def test_tiny_classes_leave_no_split_empty(counts):
    train, val, test = sizes(make_splits(labelled(counts), [], seed=0))
    assert train >= val >= 0
    if max(counts) > 1 and sum(counts) > 9:
        assert min(val, test) >= 0.07 * sum(counts)
    if max(counts) > 2:
        assert min(val, test) >= 0.1 * sum(counts)


def test_every_class_is_in_training():
    counts = [1, 2, 3, 4, 50]
    data = labelled(counts)
    train = make_splits(data, [], seed=3)["train"]
    assert {data.samples[i].target for i in train} == set(range(5))


def test_seeds_differ():
    data = labelled([50, 50])
    divisions = [make_splits(data, [], seed=seed) for seed in range(3)]
    assert divisions[0] != divisions[1] != divisions[2]
    assert len({sizes(d) for d in divisions}) == 1


def test_a_large_group_goes_to_training():
    samples = [Sample(str(i), i % 2, "big" if i < 60 else None) for i in range(100)]
    splits = make_splits(made(samples), [], seed=0)
    assert set(range(60)) <= set(splits["train"])
    assert min(sizes(splits)) >= 8


def test_regression_is_stratified_by_value():
    data = made([Sample(str(i), (float(i),)) for i in range(200)], "regression", 1)
    splits = make_splits(data, [], seed=0)
    for name in ("val", "test"):
        assert abs(sum(splits[name]) / len(splits[name]) - 99.5) < 12
        assert {i * 10 // 200 for i in splits[name]} == set(range(10))


def test_multilabel_is_stratified():
    data = made(
        [Sample(str(i), (float(i % 2), float(i % 10 == 0), float(i % 3 == 0), 0.0, 0.0)) for i in range(300)],
        "multilabel",
    )
    splits = make_splits(data, [], seed=0)
    for label, step in ((1, 10), (2, 3)):
        total = sum(sample.target[label] for sample in data.samples)
        found = sum(data.samples[i].target[label] for i in splits["val"])
        assert abs(found - 0.15 * total) <= 3, step


def test_given_splits_are_kept():
    def of(*names):
        return made([Sample(str(i), i % 2, None, names[i % len(names)]) for i in range(600)])

    whole = make_splits(of("train", "val", "test"), [], seed=0)
    assert whole == {
        "train": list(range(0, 600, 3)),
        "val": list(range(1, 600, 3)),
        "test": list(range(2, 600, 3)),
    }
    assert sizes(make_splits(of("train", "test"), [], seed=0)) == (270, 30, 300)
    assert sizes(make_splits(of("train", "val"), [], seed=0)) == (270, 300, 30)
    assert sizes(make_splits(of("train"), [], seed=0)) == (420, 90, 90)
    assert sizes(make_splits(of("test"), [], seed=0)) == (0, 0, 600)
    assert sizes(make_splits(of("train", None, "val", "test"), [], seed=0)) == (300, 150, 150)


def test_held_out_images_are_at_most_five_thousand():
    data = made([Sample(str(i), i % 5, None, "test" if i < 1000 else "train") for i in range(81000)])
    assert sizes(make_splits(data, [], seed=0)) == (75000, 5000, 1000)


def test_leaked_copies_are_left_out():
    data = made([Sample(str(i), i % 2, None, ("train", "val", "test")[i % 3]) for i in range(30)])
    leak = Problem("leakage", "", ("1", "2"), "warning", (("0", "1"), ("0", "2")))
    splits = make_splits(data, [leak], seed=0)
    assert 1 not in splits["val"]
    assert 2 not in splits["test"]
    assert 0 in splits["train"]


def test_shares():
    assert sizes(make_splits(labelled([50, 50]), [], seed=0, val=0.2, test=0)) == (80, 20, 0)
    with pytest.raises(ValueError, match="leave some for training"):
        make_splits(labelled([5]), [], seed=0, val=0.5, test=0.5)


def test_round_trip(tmp_path):
    data = open_images("digits")
    splits = make_splits(data, [Problem("unreadable", "", ("digits/7",), "error")], seed=0)
    save_splits(tmp_path / "splits.csv", data, splits)
    lines = (tmp_path / "splits.csv").read_text().splitlines()
    assert lines[0] == "id,split,target"
    assert lines[8] == "digits/7,,7"
    assert len(lines) == 1798
    assert load_splits(tmp_path / "splits.csv", data) == splits


def test_round_trip_of_odd_names_and_targets(tmp_path):
    samples = [Sample('a,"b"\\n.png', (1.0, 0.0)), Sample("ü.png", (1.0, 1.0)), Sample("c", (0.0, 0.0))]
    data = made(samples, "multilabel", 2)
    splits = {"train": [0], "val": [2], "test": [1]}
    save_splits(tmp_path / "s.csv", data, splits)
    assert load_splits(tmp_path / "s.csv", data) == splits
    assert "c0|c1" in (tmp_path / "s.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must begin with the line"),
        (b"\xff\xfe", "unreadable"),
        (b"id,split,target\n0,train\n", "line 2 must be"),
        (b"id,split,target\n0,trian,c0\n", "line 2 must be"),
        (b"id,split,target\n9,train,c0\n", "line 2 names 9, which the data does not have"),
        (b"id,split,target\n0,train,c0\n0,val,c0\n", "line 3 names 0 again"),
        (b"id,split,target\n0,train,c0\n", "no line for 1"),
        (b'id,split,target\n"0,train,c0\n', "unreadable"),
    ],
)
def test_damaged_files(tmp_path, content, reason):
    (tmp_path / "s.csv").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_splits(tmp_path / "s.csv", labelled([1, 1]))
    with pytest.raises(DataError, match="unreadable: no such file"):
        load_splits(tmp_path / "none.csv", labelled([1, 1]))
