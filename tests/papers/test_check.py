import dataclasses
import json
import math
import sys
import types

import pytest

from omniconv.core.errors import ResourceError, UsageError
from omniconv.papers import check as check_module
from omniconv.papers import records as records_module
from omniconv.papers.check import Check, run_check, run_checks
from omniconv.papers.records import get_record, load_result, state


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A paper whose check is written by the test: senet's record with a check named toy_check."""
    checks = tmp_path / "checks"
    checks.mkdir()
    monkeypatch.setattr(check_module, "CHECKS", checks)
    monkeypatch.setattr("omniconv.papers.sources.CHECKS", checks)
    monkeypatch.setattr("omniconv.papers.sources.ROOT", tmp_path)
    monkeypatch.setattr(records_module, "RESULTS", tmp_path / "results")
    record = dataclasses.replace(get_record("senet"), check="toy_check", implements=())
    monkeypatch.setattr(check_module, "get_record", lambda key: record)

    def write(run):
        (checks / "toy_check.py").write_text("# the file whose fingerprint is kept\n")
        module = types.ModuleType("omniconv.papers.checks.toy_check", "The claim,\non two lines.\n\nMore.")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return record

    return write


def test_a_check_must_require_something_and_hold_it_all():
    check = Check("x")
    assert not check.passed, "a check that requires nothing proves nothing"
    assert check.require("is small", 1, "<=", 2)
    assert check.passed
    assert not check.require("is a number", math.nan, "<=", math.inf)
    assert not check.passed


def test_a_result_is_written_with_what_was_measured_and_a_fingerprint(toy):
    def run(check):
        check.require("is large", 5, ">=", 3, baseline=1, unit="%")
        check.note("seen")

    record = toy(run)
    result = run_check(record.number, "toy_check")
    assert result["passed"] is True
    assert result["claim"] == "The claim, on two lines."
    assert result["requirements"] == [
        {
            "claim": "is large", "measured": 5.0, "relation": ">=", "threshold": 3.0, "baseline": 1.0,
            "unit": "%", "passed": True,
        }
    ]  # fmt: skip
    assert result["notes"] == ["seen"]
    assert list(result["code"]) == ["checks/toy_check.py"]
    assert load_result(record) == result


def test_a_failed_claim_is_written_as_failed_with_its_number(toy):
    record = toy(lambda check: check.require("is large", 2, ">=", 3))
    assert run_check(record.number, "toy_check")["passed"] is False
    assert load_result(record)["requirements"][0]["measured"] == 2


def test_nothing_is_written_without_write(toy):
    record = toy(lambda check: check.require("is large", 5, ">=", 3))
    run_check(record.number, "toy_check", write=False)
    assert load_result(record) is None


def test_a_check_of_another_name_is_a_usage_error(toy):
    toy(lambda check: None)
    with pytest.raises(UsageError, match=r"paper 322 \(senet\) has no check 'other' in"):
        run_check(322, "other")


def test_a_read_only_installation_is_refused_before_anything_is_measured(toy, tmp_path, monkeypatch):
    ran = []
    record = toy(ran.append)
    # A file where the folder should be fails for every user, root too.
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(records_module, "RESULTS", tmp_path / "file" / "results")
    with pytest.raises(ResourceError, match=r"results cannot be written to .*--no-write"):
        run_check(record.number, "toy_check")
    with pytest.raises(ResourceError, match="results cannot be written to"):
        list(run_checks([record]))
    assert ran == []


def test_a_check_that_cannot_run_is_told_from_one_that_fails(monkeypatch, tmp_path):
    # In a process of its own this record has no such number, so the child ends with a message.
    record = dataclasses.replace(get_record("senet"), number=401)
    outcomes = list(run_checks([record, record], jobs=2, write=False))
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome.result is None
        assert not outcome.passed
        assert "no paper '401'" in outcome.error


def test_the_state_of_a_paper_follows_its_result(toy, monkeypatch):
    record = toy(lambda check: check.require("is large", 5, ">=", 3))
    run_check(record.number, "toy_check")
    implemented = dataclasses.replace(record, implements=("omniconv.checks.toy_check",))
    (check_module.CHECKS / "__init__.py").write_text("")
    assert state(implemented) == "works"
    assert json.loads(records_module.result_path(record).read_text())["number"] == 322
