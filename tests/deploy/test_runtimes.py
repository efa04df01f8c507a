import pytest

from omniconv.core.errors import DataError, UsageError
from omniconv.deploy.runtimes import open_exported


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "model.xml"])
def test_missing_and_damaged_files_are_data_errors(tmp_path, name):
    with pytest.raises(DataError, match=r"^no exported network "):
        open_exported(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x08 this is no network at all \xff" * 9)
    with pytest.raises(DataError, match=rf"{name} is not a network that \w+ can run \(.*\)$"):
        open_exported(tmp_path / name)


def test_unknown_endings_are_usage_errors(tmp_path):
    with pytest.raises(
        UsageError, match=r"model\.pkl is not an exported network; known endings: \.pt2, \.onnx, \.xml$"
    ):
        open_exported(tmp_path / "model.pkl")
