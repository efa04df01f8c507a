"""What the house promises: light imports, and nothing beside what pyproject says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import omniconv

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

HEAVY = ("torch", "sklearn", "scipy", "matplotlib", "pandas", "onnx", "onnxruntime", "openvino", "fastapi")


def _imported(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:-1] == [], "imports are silent"
    assert done.stderr == "", "imports are silent"
    return set(json.loads(lines[-1]))


def test_import_omniconv_is_light_and_silent():
    assert _imported("import omniconv").isdisjoint({*HEAVY, "numpy", "pydantic", "rich", "typer"})


def test_the_command_line_imports_nothing_heavy_before_a_command_runs():
    assert _imported("import omniconv.cli.main").isdisjoint({*HEAVY, "numpy", "pydantic", "jinja2"})


def test_listing_papers_needs_no_torch():
    statement = (
        "from omniconv.papers.records import load_records, state, changed_files\n"
        "for r in load_records(): state(r), changed_files(r)"
    )
    assert _imported(statement).isdisjoint({*HEAVY, "numpy", "pydantic"})


@pytest.mark.parametrize(
    "name", ["create_model", "list_models", "check", "fit", "load", "Run", "OmniconvError"]
)
def test_public_names_resolve(name):
    assert name in omniconv.__all__
    assert getattr(omniconv, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'omniconv' has no attribute 'conv'"):
        _ = omniconv.conv


def test_the_house_has_no_room_without_a_floor():
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    floors = {name.strip() for layer in layers for name in layer.split("|")}
    rooms = {path.parent.name for path in (ROOT / "omniconv").glob("*/__init__.py")}
    assert rooms == floors


def test_no_file_is_much_over_500_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("omniconv", "benchmarks", "tools", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 550
    }
    assert long == {}


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) == 202
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {omniconv.__version__}\n" in citation
