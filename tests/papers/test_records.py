import json
import shutil

import pytest

from omniconv.core.errors import DataError, OmniconvError, UsageError
from omniconv.core.registry import resolve
from omniconv.papers import records as records_module
from omniconv.papers.records import (
    KINDS,
    RECORDS,
    STATES,
    changed_files,
    get_record,
    load_records,
    load_result,
    result_path,
    state,
    usage,
)
from omniconv.papers.sources import CHECKS, ROOT, fingerprint, locate

ALL = load_records()
BUILT = [record for record in ALL if record.implements]


def test_there_is_one_record_for_each_of_the_400_papers():
    assert [record.number for record in ALL] == list(range(1, 401))
    assert len({record.slug for record in ALL}) == len({record.arxiv for record in ALL}) == 400


def test_every_record_says_what_a_reader_needs():
    for record in ALL:
        assert record.authors, record.slug
        assert 3 <= len(record.keywords) <= 8, record.slug
        assert record.summary.count(". ") + record.summary.endswith(".") >= 1, record.slug
        assert record.year is None or 1990 <= record.year <= 2026, record.slug
        assert not record.code or record.code.startswith("https://"), record.slug
        assert record.home.endswith((".py", "/")) or "/" in record.home, record.slug


def test_every_kind_is_used():
    assert {record.kind for record in ALL} == set(KINDS)


@pytest.mark.parametrize("record", BUILT, ids=lambda record: record.slug)
def test_what_a_record_names_exists(record):
    for name in record.implements:
        assert locate(name) is not None, f"{name} is not defined in the source"
        resolve(name)
    assert record.check, "an implemented paper needs a check of its claim"
    assert (CHECKS / f"{record.check}.py").exists()
    compile(usage(record), record.slug, "exec")


@pytest.mark.parametrize(
    "record", [record for record in BUILT if record.usage], ids=lambda record: record.slug
)
def test_the_usage_that_a_record_shows_runs(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(record.usage, record.slug, "exec"), {})


def test_every_check_belongs_to_a_record_and_states_a_claim():
    named = {record.check for record in ALL}
    for file in CHECKS.glob("[!_]*.py"):
        assert file.stem in named, f"{file.name} belongs to no record"
        assert file.read_text().startswith('"""'), f"{file.name} must begin with its claim"


def test_every_committed_result_belongs_to_a_record():
    numbers = {result_path(record).name: record for record in ALL if record.check}
    for file in result_path(ALL[0]).parent.glob("*.json"):
        record = numbers[file.name]
        result = load_result(record)
        assert result is not None
        assert result["number"] == record.number
        assert result["passed"] == (
            bool(result["requirements"]) and all(part["passed"] for part in result["requirements"])
        )


@pytest.mark.parametrize("key", [23, "23", "023", "convnext", "ConvNeXt", "2201.03545", "arXiv:2201.03545v2"])
def test_a_paper_is_found_by_number_slug_and_arxiv_id(key):
    assert get_record(key).slug == "convnext"


def test_a_paper_is_found_by_address_and_by_slug_with_dashes():
    assert get_record("https://arxiv.org/abs/2201.03545").number == 23
    assert get_record("https://arxiv.org/pdf/2201.03545v2.pdf").number == 23
    assert get_record("eigen-cam").number == 371


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("convnex", "no paper 'convnex'; did you mean convnext?"),
        (401, "no paper '401'; try: omniconv papers search '401'"),
        ("9999.99999", "no paper '9999.99999'; try: omniconv papers search '9999.99999'"),
    ],
)
def test_an_unknown_paper_is_a_usage_error_with_the_nearest(key, message):
    with pytest.raises(UsageError) as caught:
        get_record(key)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tier = 1", "teir = 1", "023_convnext.toml has no key 'teir'; known keys: number, slug, "),
        ("tier = 1\n", "", "023_convnext.toml misses the key 'tier'"),
        ("tier = 1", "tier = true", "023_convnext.toml: tier must be a whole number: got True"),
        ("tier = 1", "tier = 4", "023_convnext.toml: tier must be 1, 2 or 3"),
        ('check = "convnext"', "check = []", "023_convnext.toml: check must be a string: got []"),
        ("deviations = [", "deviations = [1, ", "023_convnext.toml: deviations must be a list of strings: "),
        ('kind = "backbone"', 'kind = "net"', "023_convnext.toml: kind must be one of backbone, "),
        ("number = 23", "number = 24", "023_convnext.toml: file name must be NNN_slug.toml"),
        ("number = 23", "number 23", "cannot read "),
    ],
)
def test_a_damaged_record_is_named_with_its_fault(tmp_path, old, new, message):
    text = (RECORDS / "023_convnext.toml").read_text()
    assert old in text
    (tmp_path / "023_convnext.toml").write_text(text.replace(old, new))
    with pytest.raises(DataError) as caught:
        load_records(tmp_path)
    assert str(caught.value).startswith(message)


def test_two_records_with_one_number_are_refused(tmp_path):
    text = (RECORDS / "023_convnext.toml").read_text()
    (tmp_path / "023_convnext.toml").write_text(text)
    (tmp_path / "023_other.toml").write_text(text.replace('slug = "convnext"', 'slug = "other"'))
    with pytest.raises(DataError, match="number 23 is in the records of"):
        load_records(tmp_path)


def test_a_year_may_be_missing(tmp_path):
    text = (RECORDS / "023_convnext.toml").read_text()
    (tmp_path / "023_convnext.toml").write_text(text.replace("year = 2022\n", ""))
    assert load_records(tmp_path)[0].year is None


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "RESULTS", tmp_path)
    return tmp_path


def _write(record, **changes):
    code = fingerprint(record.check, record.implements)
    result = {
        "number": record.number,
        "check": record.check,
        "passed": True,
        "requirements": [],
        "code": code,
    }
    result_path(record).write_text(json.dumps(result | changes))


def test_states_follow_from_code_and_result(results):
    senet = get_record("senet")
    unbuilt = next(record for record in ALL if not record.implements)
    assert state(unbuilt) == "open"
    assert state(senet) == "built"
    _write(senet)
    assert state(senet) == "works"
    _write(senet, passed=False)
    assert state(senet) == "failed"
    _write(senet, code={})
    assert state(senet) == "built", "a result without a fingerprint is no evidence"
    _write(senet, check="another")
    assert state(senet) == "built", "a result of another check is no evidence"
    assert set(map(state, ALL)) <= set(STATES)


def test_a_damaged_result_is_named(results):
    senet = get_record("senet")
    result_path(senet).write_text("{")
    with pytest.raises(OmniconvError, match=r"322\.json is damaged .* run: omniconv papers check senet"):
        state(senet)


def test_a_result_is_stale_once_its_code_changes(results, tmp_path, monkeypatch):
    senet = get_record("senet")
    assert changed_files(senet) == []
    _write(senet)
    assert changed_files(senet) == []

    copy = tmp_path / "omniconv"
    for name in ("layers/attention/se.py", "layers/__init__.py", "layers/attention/__init__.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    monkeypatch.setattr("omniconv.papers.sources.ROOT", copy)
    monkeypatch.setattr("omniconv.papers.sources.CHECKS", copy / "papers" / "checks")
    checked = [name for name in json.loads(result_path(senet).read_text())["code"] if "checks" in name]
    assert changed_files(senet) == checked, "only the check, which the copy lacks"
    source = copy / "layers/attention/se.py"
    text = source.read_bytes()
    source.write_bytes(text.replace(b"\n", b"\r\n"))
    assert changed_files(senet) == checked, "line ends are no change"
    source.write_bytes(text + b"\n# a change\n")
    assert changed_files(senet) == ["layers/attention/se.py", *checked]
    assert state(senet) == "works", "stale, and still what was measured"
