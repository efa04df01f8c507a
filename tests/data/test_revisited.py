"""The benchmark's ground truth: read when plain, refused before it can run anything."""

import os
import pickle

import pytest

from omniconv.core.errors import DataError
from omniconv.data.revisited import Query, read_revisited


def test_plain_ground_truth_is_read(tmp_path):
    truth = {"bbx": [1.0, 2.0, 30.5, 40.0], "easy": [0], "hard": [1, 2], "junk": []}
    file = tmp_path / "gnd_roxford5k.pkl"
    file.write_bytes(pickle.dumps({"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [truth]}, protocol=2))
    found = read_revisited(file)
    assert found.gallery == ("a", "b", "c")
    assert found.queries == (Query("q", (1.0, 2.0, 30.5, 40.0), (0,), (1, 2), ()),)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "it was not run"),
        (pickle.dumps({"imlist": []}), "has no 'qimlist'"),
        (pickle.dumps([1]), "cannot read"),
        (b"\x80", "cannot read"),
        (b"", "cannot read"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_revisited(tmp_path / "x.pkl")
    assert not (tmp_path / "owned").exists()
