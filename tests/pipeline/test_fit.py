"""The main job from data to report, and what is done with a run."""

import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import omniconv
from omniconv.core.errors import DataError, RefusedError, UsageError
from omniconv.core.units import bytes_text
from omniconv.core.weights import read_header
from omniconv.data.sources import open_images
from omniconv.data.splits import load_splits
from omniconv.deploy.accelerate import bears_channels_last
from omniconv.pipeline.config import FitConfig, Plan
from omniconv.pipeline.use import write_predictions

DIGITS = open_images("digits")


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory) -> Path:
    """Digits 0, 1 and 2 as PNG files in class folders, 40 of each."""
    root = tmp_path_factory.mktemp("pictures")
    counts = {0: 0, 1: 0, 2: 0}
    for index, sample in enumerate(DIGITS.samples):
        label = sample.target
        if label in counts and counts[label] < 40:
            folder = root / f"digit {label}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(DIGITS.read(index)[0].numpy()).save(folder / f"{counts[label]:02d}.png")
            counts[label] += 1
    return root


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


def test_run_folder_is_complete(digits_run):
    names = {path.name for path in digits_run.path.iterdir()}
    wanted = {
        "config.yaml", "plan.yaml", "model.safetensors", "metrics.csv", "summary.json", "report.html", "export",
        "log.txt", "splits.csv",
    }  # fmt: skip
    assert wanted <= names
    assert not list(digits_run.path.rglob("*.tmp"))
    header = read_header(digits_run.weights_path)
    assert header["classes"] == [str(d) for d in range(10)]
    assert header["network"] == "resnet8_small"
    assert header["preprocess"]["size"] == [16, 16]


def test_summary_counts_every_picture_once(digits_run):
    splits = load_splits(digits_run.path / "splits.csv", DIGITS)
    together = sorted(index for part in splits.values() for index in part)
    assert together == list(range(len(DIGITS)))
    sizes = digits_run.summary["data"]["sizes"]
    assert sizes == {name: len(part) for name, part in splits.items()}
    assert sum(map(sum, digits_run.summary["confusion"])) == sizes["test"]


def test_reported_accuracy_is_what_the_saved_network_does(digits_run):
    splits = load_splits(digits_run.path / "splits.csv", DIGITS)
    images = torch.stack([DIGITS.read(i) for i in splits["test"]])
    targets = np.array([DIGITS.samples[i].target for i in splits["test"]])
    with torch.no_grad():
        guess = digits_run.model(digits_run.preprocess(images)).argmax(1).numpy()
    assert digits_run.summary["metrics"]["accuracy"]["value"] == pytest.approx((guess == targets).mean())


def test_metrics_file_holds_every_epoch(digits_run):
    with open(digits_run.path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_exported_files_agree_with_the_network(digits_run):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(digits_run.path / "export" / "model.onnx")
    images = torch.stack([DIGITS.read(i) for i in range(20)])
    (ours,) = session.run(None, {"image": images.numpy()})
    with torch.no_grad():
        theirs = digits_run.model(digits_run.preprocess(images)).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_same_config_and_plan_give_the_same_weights(digits_run, tmp_path, quick_plan):
    again = omniconv.fit("digits", plan=quick_plan, out=tmp_path / "again", export=())
    ours, theirs = again.model.state_dict(), digits_run.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_predict_folder_and_single_picture(digits_run, picture_folder, tmp_path):
    rows = digits_run.predict(picture_folder)
    assert len(rows) == 120
    truth = [int(row["id"].split("/")[0].split()[1]) for row in rows]
    assert np.mean([row["label"] == str(t) for row, t in zip(rows, truth, strict=True)]) > 0.9
    single = digits_run.predict(picture_folder / "digit 0" / "00.png")
    assert single[0]["probabilities"] == pytest.approx(rows[0]["probabilities"], abs=1e-5)
    write_predictions(rows, tmp_path / "pred.csv")
    with open(tmp_path / "pred.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["prediction"] for row in written] == [row["label"] for row in rows]


def test_predict_names_the_unreadable_picture(digits_run, tmp_path):
    Image.new("L", (8, 8), 3).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    rows = {row["id"]: row for row in digits_run.predict(tmp_path)}
    assert "label" in rows["good.png"]
    assert "bad.png" in rows["bad.png"]["error"]


def test_eval_matches_counting_by_hand(digits_run, picture_folder, tmp_path):
    renamed = tmp_path / "test"
    for folder in picture_folder.iterdir():
        target = renamed / folder.name.removeprefix("digit ")
        target.mkdir(parents=True)
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    rows = digits_run.predict(renamed)
    right = sum(row["label"] == row["id"].split("/")[0] for row in rows)
    result = digits_run.evaluate(renamed)
    assert result["pictures"] == 120
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(right / 120)


def test_eval_refuses_classes_it_does_not_know(digits_run, picture_folder):
    with pytest.raises(DataError, match=r"classes that .* was not trained on: digit 0, digit 1, digit 2"):
        digits_run.evaluate(picture_folder)


def test_explain_writes_a_picture_beside_the_run_only(digits_run, picture_folder, tmp_path):
    before = digest(picture_folder)
    result = digits_run.explain(picture_folder / "digit 1" / "00.png", tmp_path / "map.png")
    with Image.open(result["map"]) as drawn:
        assert drawn.size[0] >= 96
    assert result["label"] in digits_run.header["classes"]
    assert digest(picture_folder) == before


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, picture_folder, quick_plan):
    """A run on class folders, with the digest of the folder before it."""
    before = digest(picture_folder)
    run = omniconv.fit(picture_folder, plan=quick_plan, out=tmp_path_factory.mktemp("runs") / "r", export=())
    return run, before


def test_class_folders_stay_untouched(folder_run, picture_folder):
    run, before = folder_run
    assert digest(picture_folder) == before
    assert run.header["classes"] == ["digit 0", "digit 1", "digit 2"]
    assert run.summary["baselines"]["majority"]["accuracy"]["value"] == pytest.approx(1 / 3, abs=0.05)


def test_multilabel_table(tmp_path, quick_plan):
    rows = [["file", "round", "upright"]]
    for index in range(200):
        label = DIGITS.samples[index].target
        Image.fromarray(DIGITS.read(index)[0].numpy()).save(tmp_path / f"{index}.png")
        rows.append([f"{index}.png", int(label in (0, 6, 8, 9)), int(label in (1, 4, 7))])
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    run = omniconv.fit(tmp_path / "labels.csv", plan=quick_plan, out=tmp_path / "run", export=())
    assert run.header["task"] == "multilabel"
    assert run.header["classes"] == ["round", "upright"]
    metric = run.summary["metrics"]["mean_average_precision"]["value"]
    assert metric > run.summary["baselines"]["majority"]["mean_average_precision"]["value"]


def test_regression_table(tmp_path, quick_plan):
    rows = [["path", "ink"]]
    for index in range(200):
        image = DIGITS.read(index)[0].numpy()
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        rows.append([f"{index}.png", f"{image.mean():.3f}"])
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    run = omniconv.fit(tmp_path / "table.csv", plan=quick_plan, out=tmp_path / "run", export=())
    assert run.header["task"] == "regression"
    metrics = run.summary["metrics"]
    assert metrics["mae"]["value"] < run.summary["baselines"]["majority"]["mae"]["value"]
    row = run.predict(tmp_path / "7.png")[0]
    assert set(row["values"]) == {"ink"}


def test_unlabelled_folder_says_what_to_do(tmp_path):
    for index in range(3):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"3 images, no labels. Give --labels FILE"):
        omniconv.fit(tmp_path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_many_unreadable_pictures_stop_unless_allowed(tmp_path, picture_folder, quick_plan):
    root = tmp_path / "data"
    for file in picture_folder.rglob("*.png"):
        target = root / file.relative_to(picture_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes()[: 50 if file.name in ("03.png", "04.png") else None])
    with pytest.raises(
        DataError, match=r"6 of 120 images unreadable \(limit 1%\): .*bad.csv. Go on with --skip-bad"
    ):
        omniconv.fit(root, plan=quick_plan, out=tmp_path / "one", export=())
    with open(tmp_path / "one" / "bad.csv", newline="") as file:
        named = {row["id"] for row in csv.DictReader(file)}
    assert named == {f"digit {d}/0{n}.png" for d in range(3) for n in (3, 4)}
    run = omniconv.fit(root, plan=quick_plan, out=tmp_path / "two", export=(), skip_bad=True)
    assert sum(run.summary["data"]["sizes"].values()) == 114


def test_budgets_that_are_met_are_met_by_what_is_measured(tmp_path):
    run = omniconv.fit("digits", latency_ms=20, size="500kB", epochs=1, out=tmp_path / "run")
    (exported,) = (f for f in run.summary["export"]["files"] if f["format"] == "onnx")
    assert exported["bytes"] == (run.path / "export" / "model.onnx").stat().st_size <= 500_000
    timed = run.summary["cost"]["latency_ms"]["onnxruntime"]
    assert timed["batch"] == 1
    assert timed["median"] <= 20
    assert any("networks fit 500 kB" in reason for reason in run.plan.reasons)
    assert any("take at most 20 ms" in reason for reason in run.plan.reasons)


@pytest.mark.parametrize(
    ("budget", "planned", "said"),
    [
        (
            {"size": "1kB"},
            r"no network fits 1 kB in float32; the smallest, resnet8_small, takes [\d.]+ kB and is trained",
            r"^1 kB is unreachable here; smallest is [\d.]+ kB at [\d.]+%; the run is kept: .*report\.html$",
        ),
        (
            {"latency_ms": 0.001},
            r"no network takes at most 0.001 ms a picture in float32; the fastest, resnet\w+ at 16 pixels",
            r"^0.001 ms is unreachable here; fastest is [\d.]+ ms at [\d.]+%; the run is kept: .*report\.html$",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(tmp_path, budget, planned, said):
    with pytest.raises(RefusedError, match=said) as refused:
        omniconv.fit("digits", **budget, epochs=1, out=tmp_path / "run")
    run = omniconv.load(tmp_path / "run")
    assert any(re.match(planned, reason) for reason in run.plan.reasons)
    assert run.report.exists()
    assert str(refused.value).startswith(run.summary["notes"][-1])
    smallest = min(f.stat().st_size for f in (run.path / "export").glob("*.onnx"))
    if "size" in budget:
        assert bytes_text(smallest) in run.summary["notes"][-1]


def test_training_starts_from_given_weights(digits_run, picture_folder, tmp_path):
    plan = digits_run.plan.model_copy(update={"epochs": 1, "lr": 1e-12, "ema": 0.0, "batch": 16})
    plan.save(tmp_path / "plan.yaml")
    run = omniconv.fit(
        picture_folder, plan=tmp_path / "plan.yaml", pretrained=digits_run.weights_path, out=tmp_path / "run"
    )
    before, after = digits_run.model, run.model
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if name.startswith("fc."):
            assert (len(old), len(new)) == (10, 3)
        else:
            torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-7)
    assert "starting from" in (run.path / "log.txt").read_text()


def test_trained_weights_must_name_and_fit_a_network(digits_run, picture_folder, tmp_path):
    torch.save(digits_run.model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UsageError, match=r"w\.pth does not say which network it is for; name it with --model"
    ):
        omniconv.fit(picture_folder, pretrained=tmp_path / "w.pth", out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"w\.pth does not fit convnext_test: the weights have no stem"):
        omniconv.fit(
            picture_folder, pretrained=tmp_path / "w.pth", model="convnext_test", out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_not_written_into(tmp_path, quick_plan):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists already"):
        omniconv.fit("digits", plan=quick_plan, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_finished_run_is_not_resumed(digits_run):
    from omniconv.pipeline.api import resume

    with pytest.raises(UsageError, match="is finished"):
        resume(digits_run.path)


def test_unknown_network_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="no model 'resnet5'; did you mean resnet50"):
        omniconv.fit("digits", model="resnet5", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_misspelt_setting_in_a_plan_is_an_error(tmp_path, quick_plan):
    edited = tmp_path / "plan.yaml"
    edited.write_text(quick_plan.read_text().replace("epochs:", "epoch:"))
    with pytest.raises(UsageError, match="epoch"):
        omniconv.fit("digits", plan=edited, out=tmp_path / "run")


def test_config_and_plan_survive_the_file(tmp_path, quick_plan):
    config = FitConfig(data="x", latency=0.01, target=["a", "b"])
    config.save(tmp_path / "c.yaml", comment="two\nlines")
    assert FitConfig.load(tmp_path / "c.yaml") == config
    plan = Plan.load(quick_plan)
    plan.save(tmp_path / "p.yaml")
    assert Plan.load(tmp_path / "p.yaml") == plan


def test_narrow_strided_shortcuts_stay_out_of_channels_last():
    narrow = omniconv.create_model("resnet18", widths=(8, 16, 32, 64), device="meta")
    assert not bears_channels_last(narrow)
    assert bears_channels_last(omniconv.create_model("resnet18", device="meta"))


def test_compress_keeps_what_meets_the_budget(digits_run, tmp_path):
    result = digits_run.compress(max_drop=0.05, out=tmp_path / "small")
    small = omniconv.load(tmp_path / "small")
    kept = [row for row in result["tried"] if row["path"]]
    assert len(kept) == 1
    assert kept[0]["bytes"] < digits_run.weights_path.stat().st_size
    before = result["tried"][0]["value"]
    assert before - kept[0]["value"] <= 0.05
    assert small.predict("digits")[0]["id"] == digits_run.predict("digits")[0]["id"]
    assert json.loads((tmp_path / "small" / "compress.json").read_text()) == result
    assert {"float32", "slim", "sparse"} <= {row["form"] for row in result["tried"]}
    page = (tmp_path / "small" / "compress.html").read_text()
    assert page.count("<tr><td>") == len(result["tried"])


def test_a_slim_run_is_a_whole_run(digits_run, tmp_path, monkeypatch):
    """Where int8 is of no use, fewer channels meet the budget; the folder predicts, exports and evaluates."""

    def refuse(*_, **__):
        raise RefusedError("int8 is slower than float here")

    monkeypatch.setattr("omniconv.pipeline.shrink.quantize", refuse)
    monkeypatch.setattr("omniconv.pipeline.shrink.SLIM", (0.5,))
    size = (digits_run.path / "export" / "model.onnx").stat().st_size
    result = digits_run.compress(size=size * 3 // 4, latency=10.0, max_drop=1.0, out=tmp_path / "small")
    assert result["notes"] == [
        "int8 is slower than float here",
        "slim int8 -50%: int8 is slower than float here",
    ]
    small = omniconv.load(tmp_path / "small")
    kept = next(row for row in result["tried"] if row["path"])
    assert kept["form"] == "slim"
    assert kept["bytes"] <= size * 3 // 4
    before, after = (sum(p.numel() for p in run.model.parameters()) for run in (digits_run, small))
    assert after < 0.7 * before
    assert set(small.header["kept"]) <= {name for name, _ in digits_run.model.named_modules()}
    assert small.evaluate("digits")["metrics"]["accuracy"]["value"] == pytest.approx(kept["value"], abs=0.3)
    made = Path(small.export("triton")["triton"])
    assert (made / "labels.txt").read_text().split() == list(small.task.classes)
    assert (small.path / "export" / "model.onnx").stat().st_size < size


def test_compress_refuses_what_it_cannot_do(digits_run, tmp_path, monkeypatch):
    monkeypatch.setattr("omniconv.pipeline.shrink.SLIM", (0.5,))
    with pytest.raises(RefusedError, match=r"100 B is unreachable within a drop of 1\.0%"):
        digits_run.compress(size=100, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()
