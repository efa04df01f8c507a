"""What a person who types commands sees: messages, exit codes, files."""

import json
import subprocess
import sys

import pytest

from omniconv.cli.main import _share, run
from omniconv.core.errors import UsageError


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "digits", "--eppochs", "3"], "no option --eppochs; did you mean --epochs?"),
        (["fitt", "digits"], "no command fitt; did you mean fit?"),
        (["fit"], "name the data, or a run to continue with --resume RUN"),
        (
            ["fit", "digits", "--time", "soon"],
            "cannot read the time 'soon'; write a number and a unit, such as 10ms, 90s, 10m or 2h",
        ),
        (["fit", "digits", "--size", "5"], "cannot read the size '5'; write a number and a unit, such as 500kB or 5MB"),
        (["fit", "digits", "--export", "onx"], "no export format 'onx'; did you mean onnx?"),
        (["predict", "nowhere", "x"], "nowhere is not a run folder (no config.yaml in it)"),
        (["models", "convnxt_tiny"], "no network matches 'convnxt_tiny'; did you mean convnext_tiny?"),
    ],
)  # fmt: skip
def test_a_mistyped_command_is_one_sentence_and_exit_code_2(
    capsys, monkeypatch, tmp_path, arguments, message
):
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *arguments)
    assert (code, out, err) == (2, "", message + "\n")
    assert not list(tmp_path.iterdir())


def test_a_share_is_a_percentage_or_a_number():
    assert _share("1%") == _share("0.01") == 0.01
    with pytest.raises(UsageError, match="cannot read the share 'much'; write 1% or"):
        _share("much")


def test_missing_data_is_exit_code_3(capsys, tmp_path):
    code, _, err = said(capsys, "fit", str(tmp_path / "nothing"), "--out", str(tmp_path / "run"))
    assert code == 3
    assert err.count("\n") == 1
    assert "nothing" in err


def test_check_reports_and_fails_on_unreadable_pictures(capsys, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("L", (8, 8), index * 40 + len(name)).save(tmp_path / name / f"{index}.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, _ = said(capsys, "check", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 3
    assert found["samples"] == 13
    assert ["a/broken.png"] in [
        problem["ids"] for problem in found["problems"] if problem["kind"] == "unreadable"
    ]
    code, out, _ = said(capsys, "check", str(tmp_path))
    assert code == 3
    assert "broken.png" in out


def test_whole_story(capsys, tmp_path, quick_plan):
    out = str(tmp_path / "run")
    code, text, err = said(capsys, "fit", "digits", "--plan", str(quick_plan), "--out", out)
    assert code == 0, err
    assert "accuracy on" in text
    assert "epoch   6/6" in err
    code, text, _ = said(capsys, "predict", out, "digits", "--out", str(tmp_path / "pred.csv"))
    assert code == 0
    assert (tmp_path / "pred.csv").read_text().count("\n") == 1798
    code, text, _ = said(capsys, "eval", out, "digits", "--json")
    assert json.loads(text)["metrics"]["accuracy"]["value"] > 0.9
    code, text, _ = said(capsys, "bench", out, "--json")
    assert {"eager", "torch.export", "onnxruntime"} <= set(json.loads(text)["latency_ms"])
    code, text, _ = said(capsys, "fit", "--resume", out)
    assert code == 2


def test_models_lists_published_figures(capsys):
    _, text, _ = said(capsys, "models", "resnet50", "--json")
    assert json.loads(text) == [
        {"name": "resnet50", "parameters": 25557032, "multiply_adds": 4.11e9, "size": 224}
    ]


def test_convert_refuses_a_program_and_takes_it_with_trust(capsys, tmp_path):
    import torch
    from safetensors.torch import load_file

    plain, program = tmp_path / "plain.pt", tmp_path / "w.pt"
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, plain)
    torch.save(torch.nn.Linear(2, 2), program)
    assert said(capsys, "convert", str(plain))[0] == 0
    assert torch.equal(load_file(tmp_path / "plain.safetensors")["a"], torch.arange(3.0))
    code, _, err = said(capsys, "convert", str(program))
    assert code == 5
    assert err == f"{program} can run code when loaded. If you trust it: omniconv convert w.pt --trust\n"
    assert not (tmp_path / "w.safetensors").exists()
    assert said(capsys, "convert", str(program), "--trust")[0] == 0
    assert set(load_file(tmp_path / "w.safetensors")) == {"weight", "bias"}


def test_convert_gives_official_weights_the_names_here(capsys, tmp_path):
    import torch
    from safetensors.torch import load_file

    import omniconv

    tensors = omniconv.create_model("resnet20_cifar", num_classes=7).state_dict()
    official = {f"module.{name.replace('fc.', 'linear.')}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": official}, tmp_path / "w.th")
    out = tmp_path / "ours.safetensors"
    arguments = ["weights", "convert", str(tmp_path / "w.th"), "--model", "resnet20_cifar", "--out", str(out)]
    assert said(capsys, *arguments)[:2] == (0, f"wrote {out}\n")
    assert {name: len(tensor) for name, tensor in load_file(out).items() if tensor.ndim} == {
        name: len(tensor) for name, tensor in tensors.items() if tensor.ndim
    }
    code, _, err = said(
        capsys, "convert", str(out), "--model", "resnet32_cifar", "--out", str(tmp_path / "x.safetensors")
    )
    assert (code, err) == (
        2,
        f"{out} does not fit resnet32_cifar: the weights have no layer1.3.conv1.weight\n",
    )
    assert (
        said(capsys, "convert", str(out))[2] == f"{out} would be overwritten; name another file with --out\n"
    )


def test_doctor_names_versions(capsys):
    import torch

    _, text, _ = said(capsys, "doctor", "--json")
    assert json.loads(text)["versions"]["torch"] == torch.__version__


def test_help_needs_no_torch():
    code = (
        "import sys; from omniconv.cli.main import run; run(['--help']); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
