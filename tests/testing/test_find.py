import pytest

from omniconv.testing.find import find_artifacts, find_cases, find_transforms, missing_cases, public_names

LAYERS = """
from torch import nn
from omniconv.core.cases import Case, Raises
__all__ = ["Covered", "Forgotten", "Raises", "helper"]
class Covered(nn.Module): pass
class Forgotten(nn.Module): pass
class Private(nn.Module): pass
def helper(): pass
CASES = (Case(Covered, {}, inputs=((1,),), output=(1,)),)
"""

INSPECT = """
from torch import nn
from omniconv.compress.report import CompressionReport
from omniconv.inspect.artifact import Artifact
__all__ = ["Kind", "draw", "number", "shrink"]
class Kind(Artifact): pass
def draw(model: nn.Module) -> Kind: ...
def number(model: nn.Module) -> float: ...
def shrink(model: nn.Module) -> tuple[nn.Module, CompressionReport]: ...
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A package whose name is that of the test, so that nothing is imported twice."""

    def make(text):
        name = request.node.name
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "part.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return make


def test_forgotten_layer(package):
    name = package(LAYERS)
    assert missing_cases(name) == [f"{name}.part.Forgotten"]
    assert [case.make.__name__ for case in find_cases(name)] == ["Covered"]
    assert set(public_names(name)) == {f"{name}.part.{part}" for part in ("Covered", "Forgotten", "helper")}


def test_wrong_cases(package):
    with pytest.raises(TypeError, match=r"CASES of test_wrong_cases.part must hold cases: got int"):
        find_cases(package("CASES = (3,)"))


def test_transforms_and_artifacts_by_annotation(package):
    name = package(INSPECT)
    assert list(find_artifacts(name)) == [f"{name}.part.draw"]
    assert list(find_transforms(name)) == [f"{name}.part.shrink"]
