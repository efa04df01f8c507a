import json

import pytest
from typer.testing import CliRunner

from omniconv.cli.papers import app
from omniconv.core.errors import UsageError
from omniconv.papers import records as records_module
from omniconv.papers.check import Outcome
from omniconv.papers.records import STATES, get_record, load_records, result_path, state
from omniconv.papers.sources import fingerprint


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _json(*arguments):
    result = _run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _usage_error(*arguments):
    result = _run(*arguments)
    assert isinstance(result.exception, UsageError)
    return str(result.exception)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, and a way to put one there for senet."""
    monkeypatch.setattr(records_module, "RESULTS", tmp_path)
    record = get_record("senet")

    def write(**changes):
        part = {
            "claim": "parameters added", "measured": 2514944.0, "relation": "==", "threshold": 2514944.0,
            "baseline": 0.125, "unit": "", "passed": True,
        }  # fmt: skip
        result = {
            "number": 322, "check": record.check, "claim": "A gate helps.", "passed": True,
            "requirements": [part], "notes": ["on a small net"], "seconds": 3.0, "threads": 2,
            "machine": "x86_64", "torch": "2.13.0", "commit": "abc1234", "date": "2026-11-21",
            "code": fingerprint(record.check, record.implements),
        }  # fmt: skip
        result_path(record).write_text(json.dumps(result | changes))
        return result | changes

    return write


def test_list_gives_every_paper_and_filters():
    rows = _json("list")
    assert [row["number"] for row in rows] == list(range(1, 401))
    assert all(row["state"] == state(get_record(row["number"])) for row in rows[::40])
    chosen = _json("list", "--kind", "layer", "--tier", 1, "--state", "open")
    assert 0 < len(chosen) < 400
    assert all((row["kind"], row["tier"], row["state"]) == ("layer", 1, "open") for row in chosen)
    text = _run("list", "--kind", "op").stdout
    assert len(text.splitlines()) == 1 + sum(record.kind == "op" for record in load_records())
    assert "pytorch_direct" in text


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("state", "done", "works, failed, built, open"), ("kind", "net", "backbone, ")],
)
def test_list_names_what_may_be_asked_for(option, value, known):
    message = _usage_error("list", f"--{option}", value)
    assert message.startswith(f"--{option} must be one of {known}")
    assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("key", ["322", "senet", "1709.01507"])
def test_show_says_what_it_is_what_implements_it_how_to_use_it_and_the_evidence(results, key):
    results()
    text = _run("show", key).stdout
    for part in (
        "322 senet  works", "Squeeze-and-Excitation Networks. Jie Hu", "https://arxiv.org/abs/1709.01507",
        "omniconv.layers.attention.se.SqueezeExcite", "import SqueezeExcite", "A gate helps.", "2514944",
        "0.125", "holds", "note: on a small net", "2026-11-21, 3 s with 2 threads, torch 2.13.0, commit abc1234",
    ):  # fmt: skip
        assert part in text, part
    assert "changed since" not in text


def test_show_as_json_has_the_record_the_state_and_the_result(results):
    result = results(passed=False)
    values = _json("show", "senet")
    assert values["state"] == "failed"
    assert values["result"] == result
    assert values["changed"] == []
    assert values["title"] == "Squeeze-and-Excitation Networks"
    assert values["url"] == "https://arxiv.org/abs/1709.01507"
    assert "SqueezeExcite" in values["usage"]


def test_show_tells_stale_evidence_and_none(results):
    text = _run("show", "senet").stdout
    assert "none yet; run: omniconv papers check senet" in text
    results(code={"layers/attention/se.py": "0"})
    assert "changed since: layers/attention/se.py" in _run("show", "senet").stdout


def test_show_of_an_open_paper_names_its_place():
    record = next(record for record in load_records() if state(record) == "open")
    text = _run("show", record.number).stdout
    assert f"Not built yet; its place is omniconv/{record.home}." in text
    assert "Evidence" not in text


def test_an_unknown_paper_is_named_with_the_nearest():
    assert _usage_error("show", "convnex") == "no paper 'convnex'; did you mean convnext?"
    assert _usage_error("check", "convnex") == "no paper 'convnex'; did you mean convnext?"


def test_search_ranks_and_limits():
    hits = _json("search", "large", "kernel", "--limit", 5)
    assert len(hits) == 5
    assert {hit["slug"] for hit in hits[:2]} == {"unireplknet", "unireplknet_universal"}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert "unireplknet" in _run("search", "large kernel").stdout
    assert _run("search", "zzzqqq").stdout == "no paper matches 'zzzqqq'\n"


def test_status_counts_and_names_what_is_stale_or_never_ran(results):
    results(code={"layers/attention/se.py": "0"})
    values = _json("status")
    assert values["papers"] == sum(values["states"].values()) == 400
    assert {s: values["states"][s] for s in STATES} == {
        s: sum(state(record) == s for record in load_records()) for s in STATES
    }
    assert sum(sum(kind.values()) for kind in values["kinds"].values()) == 400
    assert "layers/attention/se.py" in values["stale"]["senet"]
    assert "senet" not in values["unrun"]
    assert set(values["unrun"]) == {r.slug for r in load_records() if r.check and r.slug != "senet"}
    text = _run("status").stdout
    assert "stale: senet (layers/attention/se.py" in text
    assert "renew with: omniconv papers check --changed" in text


def test_check_wants_to_know_which():
    wanted = "say which: papers by number, slug or arXiv id, or --all, or --changed"
    assert _usage_error("check") == _usage_error("check", "eca", "--all") == wanted
    unbuilt = next(record for record in load_records() if not record.check)
    assert _usage_error("check", unbuilt.slug) == f"paper {unbuilt.slug} has no check (it is open)"


@pytest.fixture
def outcomes(monkeypatch):
    """Stands in for the minutes of measuring; returns what check asked for and lets the test say the end."""
    asked = {}

    def run_checks(chosen, *, jobs, write):
        asked.update(slugs=[record.slug for record in chosen], jobs=jobs, write=write)
        for record in chosen:
            yield asked.get("ends", {}).get(record.slug) or Outcome(record, _measured(record, True))

    monkeypatch.setattr("omniconv.papers.check.run_checks", run_checks)
    return asked


def _measured(record, passed):
    part = {
        "claim": "is large", "measured": 5.25, "relation": ">=", "threshold": 3.0, "baseline": None,
        "unit": "%", "passed": passed,
    }  # fmt: skip
    return {"claim": "It is.", "passed": passed, "requirements": [part], "notes": [], "seconds": 7.0}


def test_check_prints_what_was_measured_and_the_verdict(outcomes):
    result = _run("check", "eca", "322", "--jobs", 2)
    assert result.exit_code == 0
    assert outcomes == {"slugs": ["eca", "senet"], "jobs": 2, "write": True}
    for part in (
        "223 eca  passed in 7 s",
        "It is.",
        "is large",
        "5.25",
        ">=",
        "3",
        "%",
        "holds",
        "2 of 2 passed",
    ):
        assert part in result.stdout, part


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_check_ends_with_1_if_a_claim_fails_or_cannot_be_measured(outcomes, as_json):
    eca, senet = get_record("eca"), get_record("senet")
    outcomes["ends"] = {
        "eca": Outcome(eca, _measured(eca, False)), "senet": Outcome(senet, None, "no data set"),
    }  # fmt: skip
    result = _run("check", "eca", "senet", "repvgg", "--no-write", *as_json)
    assert result.exit_code == 1
    assert outcomes["write"] is False
    if as_json:
        rows = json.loads(result.stdout)
        assert [(row["slug"], row["error"]) for row in rows] == [
            ("eca", ""),
            ("senet", "no data set"),
            ("repvgg", ""),
        ]
        assert [row["result"] and row["result"]["passed"] for row in rows] == [False, None, True]
    else:
        for part in ("eca  failed", "fails", "senet  could not run", "no data set", "1 of 3 passed"):
            assert part in result.stdout, part


def test_changed_takes_what_is_stale_or_never_ran_and_all_takes_all(outcomes, results):
    every = [record.slug for record in load_records() if record.check]
    _run("check", "--all")
    assert outcomes["slugs"] == every
    results()
    _run("check", "--changed")
    assert outcomes["slugs"] == [slug for slug in every if slug != "senet"]
    results(code={"layers/attention/se.py": "0"})
    _run("check", "--changed")
    assert outcomes["slugs"] == every
