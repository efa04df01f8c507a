import math

import pytest

from omniconv.pipeline.wording import Metric, big, count, number, plain, setting, share, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "100%"),
        (0, "0%"),
        (0.5, "50.0%"),
        (0.9996, "99.96%"),
        (0.99999, "99.999%"),
        (0.0001, "0.01%"),
        (None, "–"),
    ],
)
def test_only_what_is_all_or_nothing_reads_so(value, text):
    assert share(value) == text


def test_invisible_characters_are_written_out():
    assert visible("a\nb\tc\u202ed\x00\u2028") == r"a\nb\tc\u202ed\x00\u2028"
    assert visible("\ud800") == r"\ud800"
    for name in ("日本", "👩\u200d🔬", "naïve", "a b"):
        assert visible(name) == name


def test_numbers_have_three_digits():
    assert [plain(v) for v in (4.1, 18.44, 0.08712, 0, 123.4, 2500, -0.25, 1e9)] == [
        "4.10", "18.4", "0.0871", "0", "123", "2,500", "\u22120.250", "1e+09",
    ]  # fmt: skip
    assert [big(v) for v in (812, 269434, 40_812_288, 1.82e9)] == [
        "812",
        "269,434",
        "40.8 million",
        "1.82 billion",
    ]
    assert count(1234567) == "1,234,567"


def test_what_is_no_number_is_none():
    assert [number(v) for v in (None, math.nan, math.inf, "3", True, [])] == [None] * 6
    assert number(3) == 3.0


def test_metrics_by_name():
    row = Metric("accuracy").row({"value": 0.979, "low": 0.954, "high": 0.991})
    assert (row["text"], row["interval"]) == ("97.9%", "95.4 to 99.1")
    assert Metric("mae").row({"value": 2.0, "low": 1.5, "high": 2.5})["interval"] == "1.50 to 2.50"
    assert not Metric("mae").higher
    assert not Metric("huber_loss").higher
    assert Metric("cohen_kappa").label == "cohen kappa"
    assert Metric("accuracy").row({"value": None}) is None
    assert Metric("accuracy").row({"value": 0.5, "low": 0.5, "high": 0.5})["interval"] is None


def test_settings():
    assert [setting(v) for v in (True, False, 0.00050001, "a\n", {"b": 1})] == [
        "yes",
        "no",
        "0.0005",
        r"a\n",
        "b 1",
    ]
