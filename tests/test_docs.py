"""README and documentation show commands, options and code that exist."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer

from omniconv.papers.records import load_records

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("guide/*.md")),
]


def _blocks(page, *languages):
    for language, code in re.findall(
        r"^ *```(\w+)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        if language in languages:
            yield code


def _commands(page):
    """Yield the arguments of every `omniconv ...` in code blocks and in the text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in _blocks(page, "bash") for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(omniconv [^`]+)`", text)]:
        words = shlex.split(line.replace("| ", "; "), comments=True)
        if words[:1] == ["omniconv"] and words[1:] and "..." not in words:
            yield words[1:]


def _known(words):
    """Raise AssertionError if the command line has no such command or option."""
    from omniconv.cli.main import app

    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0].startswith("-"):
            break
        name = words.pop(0)
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{command.name} has no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for words in _commands(page):
        _known(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles(page):
    for code in _blocks(page, "python"):
        compile(textwrap.dedent(code), page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target
        generated = path.parent.name in ("papers", "api", "benchmarks")
        assert generated or path.exists(), f"{page.name} links {target}"


def test_the_commands_are_found_at_all():
    assert ["fit", "digits"] in list(_commands(ROOT / "README.md"))
    with pytest.raises(AssertionError, match="fit has no --eppochs"):
        _known(["fit", "digits", "--eppochs", "3"])
    with pytest.raises(AssertionError, match="no command fitt"):
        _known(["fitt"])


@pytest.fixture(scope="module")
def generate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("generate")


def test_every_paper_gets_a_page_that_the_index_links(generate):
    index = generate.papers_index()
    for record in load_records():
        page = generate.paper_page(record)
        assert f"**{record.number} " in page
        assert record.url in page
        assert f"({record.number:03d}_{record.slug}.md)" in index
        assert ("## Evidence" in page) == bool(record.implements), record.slug


def test_pages_are_written_and_what_is_left_over_goes(generate, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "401_gone.md").write_text("old")
    generate.main(tmp_path)
    assert len(list((tmp_path / "papers").glob("*.md"))) == 401
    assert not (tmp_path / "papers" / "401_gone.md").exists()
    assert "automodule:: omniconv.layers.attention.se" in (tmp_path / "api" / "layers.md").read_text()
    before = (tmp_path / "papers" / "index.md").stat().st_mtime_ns
    generate.main(tmp_path)
    assert (tmp_path / "papers" / "index.md").stat().st_mtime_ns == before
