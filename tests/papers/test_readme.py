import pytest

from omniconv.core.errors import UsageError
from omniconv.papers.readme import BEGIN, END, README, insert, render, update
from omniconv.papers.records import load_records, state


def test_the_readme_says_what_the_records_say():
    text = README.read_text(encoding="utf-8")
    assert text == insert(text), "renew it with: python -m omniconv.papers.readme"


def test_the_counts_are_those_of_the_states():
    total = next(line for line in render().splitlines() if line.startswith("| **all**"))
    works, failed, built, unbuilt, papers = (int(cell.strip(" *")) for cell in total.split("|")[2:-1])
    states = [state(record) for record in load_records()]
    assert (works, failed, built) == tuple(states.count(s) for s in ("works", "failed", "built"))
    assert unbuilt == states.count("open")
    assert papers == works + failed + built + unbuilt == 400


def test_each_paper_with_a_verdict_is_listed_once():
    text = render()
    for record in load_records():
        listed = text.count(f"]({record.url})")
        assert listed == (state(record) in ("works", "failed")), record.slug


def test_only_the_part_between_the_markers_changes(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    update(path)
    text = path.read_text()
    assert text.startswith(f"above\n{BEGIN}\n| kind |")
    assert text.endswith(f"|\n{END}\nbelow\n")
    update(path)
    assert path.read_text() == text


def test_missing_markers_and_a_missing_readme_are_told(tmp_path):
    with pytest.raises(UsageError, match="must hold the lines"):
        insert("nothing here")
    with pytest.raises(UsageError, match="run this in a clone"):
        update(tmp_path / "README.md")
