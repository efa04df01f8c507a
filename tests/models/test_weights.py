"""Weights from elsewhere: where they lie, their names, other classes and channels."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from omniconv.core.errors import DataError, RefusedError, ResourceError, UsageError
from omniconv.core.weights import save_weights
from omniconv.models.backbone import Backbone
from omniconv.models.factory import create_model
from omniconv.models.hub import HubWeights
from omniconv.models.weights import adapt, read_pretrained, rename


def test_rules_apply_one_after_another_and_drop_empty_names():
    tensors = {
        "blocks.0.conv.weight": torch.ones(1),
        "blocks.1.conv.weight": torch.zeros(1),
        "extra": torch.ones(2),
    }
    rules = ((r"^blocks\.(\d+)", r"stages.\1"), (r"conv\.", "dw."), (r"^extra$", ""))
    renamed = rename(tensors, rules)
    assert list(renamed) == ["stages.0.dw.weight", "stages.1.dw.weight"]
    assert renamed["stages.1.dw.weight"] is tensors["blocks.1.conv.weight"]


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(UsageError, match="a and b would both be called x"):
        rename({"a": torch.ones(1), "b": torch.ones(1)}, ((r"[ab]", "x"),))


@pytest.fixture
def donor() -> tuple[Backbone, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=10).eval()
    return model, model.state_dict()


def test_other_classes_leave_the_classifier_and_take_everything_else(donor):
    model, tensors = donor
    other = create_model("resnet_test", num_classes=3)
    kept = other.get_classifier().get_parameter("weight").clone()
    other.load_state_dict(adapt(other, {f"module.{name}": tensor for name, tensor in tensors.items()}))
    assert torch.equal(other.get_classifier().get_parameter("weight"), kept)
    x = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(other.eval().forward_features(x), model.forward_features(x))
    headless = create_model("resnet_test", num_classes=0)
    headless.load_state_dict(adapt(headless, tensors))
    torch.testing.assert_close(
        headless.eval()(x), model.forward_head(model.forward_features(x), pre_logits=True)
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_keep_the_answer_to_grey_pictures(donor, channels):
    model, tensors = donor
    other = create_model("resnet_test", num_classes=10, in_chans=channels)
    other.load_state_dict(adapt(other, tensors))
    grey = torch.randn(2, 1, 32, 40)
    wanted = model(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other.eval()(grey.expand(-1, channels, -1, -1)), wanted, rtol=1e-4, atol=1e-5)


def test_colours_stay_apart_beside_a_fourth_channel(donor):
    _, tensors = donor
    first = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    other = adapt(create_model("resnet_test", num_classes=10, in_chans=4), tensors)[first]
    torch.testing.assert_close(other[:, :3], tensors[first] * 3 / 4)


def test_what_does_not_fit_is_named(donor):
    model, tensors = donor
    name = next(reversed([name for name in tensors if "fc" not in name and "tracked" not in name]))
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(UsageError, match=f"the weights have no {name}"):
        adapt(model, without)
    with pytest.raises(UsageError, match="the weights have extra, which the network has not"):
        adapt(model, tensors | {"extra": torch.ones(1)})
    with pytest.raises(UsageError, match=rf"the weights' {name} has the shape \(1,\), the network's \(24,\)"):
        adapt(model, tensors | {name: torch.ones(1)})


def test_axes_of_length_one_make_no_difference(donor):
    model, tensors = donor
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 1)
    adapted = adapt(model, tensors | {name: tensors[name][:, None, None]})
    assert torch.equal(adapted[name], tensors[name])


def test_old_weights_without_counters_load(donor):
    model, tensors = donor
    model.load_state_dict(adapt(model, {k: t for k, t in tensors.items() if "num_batches_tracked" not in k}))


def test_files_of_every_kind_start_a_network(donor, tmp_path):
    model, tensors = donor
    x = torch.randn(1, 3, 32, 40)
    save_weights(tmp_path / "w.safetensors", tensors, {"network": "resnet_test"})
    torch.save({"state_dict": tensors}, tmp_path / "w.pth")
    torch.save(model, tmp_path / "program.pth")
    for file, trust in (("w.safetensors", False), ("w.pth", False), ("program.pth", True)):
        ours = create_model("resnet_test", num_classes=10, pretrained=tmp_path / file, trust=trust).eval()
        assert torch.equal(ours(x), model(x))
    with pytest.raises(RefusedError, match="can run code when loaded"):
        create_model("resnet_test", num_classes=10, pretrained=tmp_path / "program.pth")
    with pytest.raises(UsageError, match=r"w.pth does not fit resnext_test: the weights have no conv1"):
        create_model("resnext_test", pretrained=tmp_path / "w.pth")
    assert read_pretrained(tmp_path / "w.safetensors").network == "resnet_test"


def test_official_names_are_tried(tmp_path):
    tensors = create_model("resnet20_cifar", num_classes=10).state_dict()
    official = {name.replace("fc.", "linear."): tensor for name, tensor in tensors.items()}
    save_weights(tmp_path / "w.safetensors", official)
    ours = create_model("resnet20_cifar", num_classes=10, pretrained=tmp_path / "w.safetensors")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in tensors.items())


def in_cache(folder: Path, repository: str, content: bytes) -> Path:
    """Lay a file as the Hub's client does: under its hash, and linked from the commit that a branch names."""
    root = folder / f"models--{repository.replace('/', '--')}"
    commit = "a" * 40
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True)
    blob = root / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (root / "refs/main").write_text(commit)
    (root / f"snapshots/{commit}/model.safetensors").symlink_to(blob)
    return blob


def test_weights_of_the_hub_come_from_its_cache_alone(donor, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = "hub:someone/resnet_test.a1"
    with pytest.raises(ResourceError) as error:
        create_model("resnet_test", num_classes=10, pretrained=source)
    assert str(error.value) == (
        f"{source} is not on this machine, and nothing was downloaded. omniconv weights fetch {source} downloads "
        "model.safetensors from https://huggingface.co/someone/resnet_test.a1, under the licence on that page"
    )

    model, tensors = donor
    blob = in_cache(tmp_path, "someone/resnet_test.a1", save(tensors))
    weights = read_pretrained(source)
    assert weights.network == "resnet_test"
    x = torch.randn(1, 3, 32, 40)
    assert torch.equal(create_model("resnet_test", num_classes=10, pretrained=weights).eval()(x), model(x))
    assert read_pretrained(f"{source}@{'a' * 40}").tensors.keys() == tensors.keys()

    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="is damaged: its hash is not"):
        read_pretrained(source)


@pytest.mark.parametrize("source", ["hub:", "hub:timm", "hub:timm/a/b", "hub:timm/../x", "hub:a/b@"])
def test_names_on_the_hub_are_read_strictly(source):
    with pytest.raises(UsageError, match="should read hub:OWNER/NAME"):
        read_pretrained(source)


def test_a_fetch_that_fails_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(hub, "model_info", unreachable)
    message = "hub:a/b cannot be fetched from https://huggingface.co/a/b: no route to host"
    with pytest.raises(ResourceError, match=re.escape(message) + "$"):
        HubWeights.parse("hub:a/b").fetch()
