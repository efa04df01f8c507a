import json
import re

import numpy as np
import pytest

from omniconv.pipeline.report import render_report
from tests.pipeline.report_runs import Page, digits, interval, multilabel, regression, species

EVERYTHING = [
    "data",
    "training",
    "metrics",
    "confusion",
    "calibration",
    "per_class",
    "examples",
    "filters",
    "cost",
    "export",
    "plan",
    "use",
]


def render(summary, pictures=None):
    text = render_report(json.loads(json.dumps(summary)), pictures or {})
    page = Page(text)
    # Nothing comes from outside: links lead into the page, pictures are part of it.
    for link in page.links:
        assert link.startswith(("#", "data:image/"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'data:image/\w+;base64,[^"]*', "", text))
    assert "<script src" not in text
    assert "default-src 'none'" in text
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
    for leftover in ("{{", "{%", "None", "nan", "NaN", "Undefined"):
        assert leftover not in page.text
    return page, text


def test_every_section_of_a_usual_run():
    page, text = render(*digits())
    assert page.sections == EVERYTHING
    assert len(text) < 3_000_000
    assert len(page.images) == 2 * 8 + 2 * 5 + 2 * 3 + 10 + 1
    assert "<h1>" in text


def test_the_headline_is_the_result_beside_its_baselines():
    page, _ = render(*digits())
    assert "97.4% of 270 test pictures right" in page.text
    assert "95% interval 94.8 to 98.7." in page.text
    assert "A linear model: 92.2%; always guessing the commonest class: 10.4%." in page.text
    # 94.85 is not above 94.9: the sentence must not claim more than the intervals show.
    assert "the 95% intervals overlap" in page.text


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        (
            interval(0.80, 0.75, 0.85),
            "Better than a linear model; the 95% intervals are clear of each other.",
        ),
        (interval(0.93, 0.90, 0.96), "the 95% intervals overlap"),
        (interval(0.98, 0.96, 0.99), "It does no better than a linear model"),
    ],
)
def test_the_verdict_follows_the_numbers(linear, words):
    summary, _ = digits()
    summary["baselines"]["linear"]["accuracy"] = linear
    assert words in render(summary)[0].text


def test_numbers_of_the_other_sections():
    page, _ = render(*digits())
    for words in (
        "7 of 270 test pictures are taken for something else; most often 8 for 1 (2 of 26)",
        "Best validation accuracy:",
        "Expected calibration error: 1.8%",
        "14 near-duplicates span train and val",
        "269,434",
        "40.8 million",
        "1.1 MB",
        "ONNX Runtime, int8",
        "0.39 ms",
        "4.2e-07",
        "omniconv predict runs/001 NEW --out pred.csv",
        "omniconv serve runs/001",
        "omniconv.load('runs/001')",
        "out of memory at batch 64",
        "5212 pictures/s",
        "int8: 330 kB instead of 1.1 MB, 2.1 times as fast",
        "rotate10",
        "4a1f09c2d77be310",
    ):
        assert words in page.text
    assert "crop scale" not in page.text  # a setting without effect is not shown as if it had one


@pytest.mark.parametrize("count", [2, 3, 20, 21, 40, 61, 200])
def test_confusions_of_two_to_two_hundred_classes(count):
    summary, _ = species(count, photos=False)
    page, text = render(summary)
    if count <= 20:
        assert text.count('<th scope="col">' + summary["data"]["classes"][0]) == 1
        assert "<image" not in text
    else:
        assert text.count("<image") == 1
    assert len(text) < 400_000
    wrong = sum(map(sum, summary["confusion"])) - sum(summary["confusion"][i][i] for i in range(count))
    assert f"{wrong:,} of" in page.text


def test_the_large_matrix_is_a_picture_of_the_shares():
    import base64
    import io

    from PIL import Image

    summary, _ = species(70, photos=False)
    _, text = render(summary)
    content = base64.b64decode(re.search(r'<image[^>]*base64,([^"]*)"', text)[1])
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    matrix = np.array(summary["confusion"])
    assert pixels.shape == (70, 70, 4)
    np.testing.assert_array_equal(pixels[..., 3] > 0, matrix > 0)
    shares = matrix / matrix.sum(1, keepdims=True)
    np.testing.assert_allclose(pixels[..., 3][matrix > 0], 255 * (0.2 + 0.8 * shares[matrix > 0]), atol=0.51)


def test_photographs_stay_small():
    summary, pictures = species()
    page, text = render(summary, pictures)
    assert page.sections == EVERYTHING
    assert len(text) < 3_000_000
    assert any(image.startswith("data:image/webp") for image in page.images)
    assert "omniconv serve 'runs/wild animals'" in page.text


def test_one_picture_takes_what_one_picture_takes():
    summary, _ = digits()
    summary["cost"]["latency_ms"] = {
        "onnxruntime": {"median": 0.83, "batch": 1},
        "int8, 32 pictures": {"median": 3.2, "batch": 32},
    }
    page, _ = render(summary)
    assert "One picture takes0.83 msONNX Runtime" in page.text
    assert "ONNX Runtime, int83.2 ms3210,000" in page.text


def test_regression():
    page, _ = render(*regression())
    assert page.sections == [
        "data",
        "training",
        "metrics",
        "scatter",
        "examples",
        "cost",
        "export",
        "plan",
        "use",
    ]
    assert "4.13 off on average over 300 test pictures" in page.text
    assert "always guessing the mean: 18.4" in page.text
    assert "says 88.2" in page.text
    assert "Every picture was decoded; no problems found." in page.text


def test_lower_is_better_for_errors():
    summary, _ = regression()
    summary["baselines"]["linear"]["mae"] = interval(3.5, 3.2, 3.7)
    assert "It does no better than a linear model" in render(summary)[0].text
    assert "at epoch 30 of 30" in render(summary)[0].text  # the lowest error is the best


def test_multilabel():
    page, _ = render(*multilabel())
    assert "confusion" not in page.sections
    assert "Label by label" in page.text
    assert "88.4% mean average precision on the test pictures" in page.text
    assert "says nothing" in page.text
    assert "labelled cloud, forest" in page.text


@pytest.mark.parametrize("make", [digits, regression, multilabel])
def test_whatever_is_missing_is_left_out(make):
    summary, pictures = make()
    for key in summary:
        page, _ = render({name: value for name, value in summary.items() if name != key}, pictures)
        assert "use" in page.sections
    for key, part in summary.items():
        if isinstance(part, dict):
            for inner in part:
                render(
                    {**summary, key: {name: value for name, value in part.items() if name != inner}}, pictures
                )
    for key in pictures:
        render(summary, {name: value for name, value in pictures.items() if name != key})
    page, _ = render({})
    assert page.sections == []


def test_numbers_that_are_none():
    summary, pictures = digits()
    for row in summary["history"]:
        row["val_loss"] = row["val_metric"] = None
    summary["metrics"]["nll"] = interval(None, None, None)
    summary["metrics"]["macro_f1"] = interval(0.9, None, None)
    summary["per_class"][0]["f1"] = None
    summary["cost"]["latency_ms"]["eager"] = None
    summary["cost"]["file_bytes"] = None
    summary["export"]["files"][0]["max_difference"] = None
    summary["export"]["files"][0]["verified"] = False
    summary["calibration"]["ece"] = None
    for one in pictures["best"]:
        one["cam"] = one["confidence"] = None
    page, _ = render(summary, pictures)
    assert "✗ no" in page.text


def test_one_epoch_one_class_no_mistake():
    summary, _ = digits()
    summary["history"] = summary["history"][:1]
    summary["confusion"] = [[5]]
    summary["data"]["classes"] = ["only"]
    page, _ = render(summary)
    assert "No test picture was taken for something else." in page.text


def test_names_cannot_break_out():
    evil = '<script>alert("1")</script>\n\u202e"\'&</style></title><img src=x onerror=alert(1)>'
    summary, pictures = digits()

    def poison(value):
        if isinstance(value, dict):
            return {
                (evil if key in summary["data"]["classes"] else key): poison(one)
                for key, one in value.items()
            }
        if isinstance(value, list):
            return [poison(one) for one in value]
        return evil if isinstance(value, str) else value

    poisoned = {
        key: value if key in ("task", "main_metric") else poison(value) for key, value in summary.items()
    }
    for items in pictures.values():
        for one in items if isinstance(items, list) else []:
            one.update(id=evil, target=evil, prediction=evil)
    page, text = render_unchecked(poisoned, pictures)
    assert text.count("<script>") == 1
    assert "onerror=alert(1)>" not in text
    assert page.images == [image for image in page.images if image.startswith("data:image/")]
    assert "\u202e" not in text
    assert r"\n\u202e" in page.text


def render_unchecked(summary, pictures):
    text = render_report(summary, pictures)
    return Page(text), text


def test_the_run_is_quoted_for_the_shell():
    summary, _ = digits()
    summary["path"] = "runs/a b; rm -rf ~"
    assert "omniconv serve 'runs/a b; rm -rf ~'" in render(summary)[0].text


def test_the_script_is_the_one_that_the_policy_allows():
    import base64
    import hashlib

    _, text = render(*digits())
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "innerHTML" not in script
