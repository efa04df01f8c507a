import struct

import pytest
import torch
from torch import nn

from omniconv.deploy.split.distill import distill_head, distill_tail, feature_errors
from omniconv.deploy.split.entropic_student import EntropicBottleneck
from omniconv.deploy.split.ghnd import QuantizedBottleneck
from omniconv.deploy.split.network import cut, split
from omniconv.models.factory import create_model

LAYERS = ("layer1", "layer2", "layer3")


def make(seed=0):
    torch.manual_seed(seed)
    return create_model("resnet_test", num_classes=5).eval(), torch.randn(3, 3, 9, 14)


@pytest.mark.parametrize(
    ("name", "at"),
    [("resnet_test", "layer1.0"), ("convnext_test", "stages.0"), ("densenet_test", "features.denseblock1")],
)
def test_both_sides_of_a_cut_give_the_network(name, at):
    model = create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 48)
    before, layer, after = cut(model, at)
    with torch.no_grad():
        torch.testing.assert_close(after(layer(before(images))), model(images), rtol=0, atol=0)


def test_what_flows_around_the_cut_is_refused():
    model, images = make()
    with pytest.raises(ValueError, match="does not cut the network"):
        cut(model, "layer2.0.conv1")
    with pytest.raises(ValueError, match="has no layer 'layer9'"):
        split(model, "layer9", EntropicBottleneck(2), images)
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    twice.append(twice[0])
    with pytest.raises(ValueError, match="called once"):
        cut(twice, "0")


@pytest.mark.parametrize("bottleneck", [EntropicBottleneck(4), QuantizedBottleneck(3)])
@pytest.mark.parametrize("size", [(15, 22), (17, 9), (16, 16)])
def test_decoders_give_the_layers_shape(bottleneck, size):
    model = create_model("resnet18", num_classes=5, depths=(1, 1), widths=(8, 16)).eval()
    images = torch.randn(2, 3, *size)
    student = split(model, "layer1", bottleneck, images)
    assert student.decoder(student.encoder(student.stem(images))).shape == (
        2,
        8,
        -(-size[0] // 4),
        -(-size[1] // 4),
    )
    assert student(images).shape == (2, 5)


@pytest.mark.parametrize("bottleneck", [EntropicBottleneck(4), QuantizedBottleneck(3)])
def test_only_the_bottleneck_learns_and_messages_carry_everything(bottleneck):
    model, images = make()
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = split(model, "layer1", bottleneck, images)
    frozen = {n: t.clone() for n, t in student.state_dict().items() if n.startswith(("stem", "tail"))}
    before = sum(feature_errors(student, model, images, LAYERS)[0].values())
    distill_head(
        student, model, [images] * 6, layers=LAYERS, beta=1e-3 * isinstance(bottleneck, EntropicBottleneck)
    )
    assert sum(feature_errors(student, model, images, LAYERS)[0].values()) < 0.9 * before
    for name, tensor in frozen.items():
        assert torch.equal(student.state_dict()[name], tensor), name
    for name, tensor in untouched.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in student.parameters())

    messages = student.encode(images)
    distill_tail(student, model, [(images, torch.tensor([0, 1, 2]))] * 2, epochs=1, lr=1e-2)
    assert student.encode(images) == messages
    assert not torch.equal(student.tail.fc.weight, model.fc.weight)
    with torch.no_grad():
        wanted = student(images)
    answers = torch.cat([student.decode(message) for message in messages])
    torch.testing.assert_close(answers, wanted)


def test_distillation_without_batches_is_refused():
    model, images = make()
    student = split(model, "layer1", EntropicBottleneck(4), images)
    with pytest.raises(ValueError, match="a batch and an epoch: got 0 and 10"):
        distill_head(student, model, [], layers=LAYERS)
    assert all(p.requires_grad for p in student.parameters())


def test_report_counts_both_sides():
    model, images = make()
    student = split(model, "layer1", QuantizedBottleneck(3), images)
    report = student.report(images)
    total = sum(p.numel() for p in student.parameters())
    assert report.device_parameters + report.server_parameters == total
    assert report.image_bytes == 3 * 9 * 14
    assert report.sent_bytes == 4 + 8 + 3 * (9 + 4) * (14 + 4)
    assert report.device_macs > 0 < report.server_macs


def test_hostile_messages_are_refused_before_memory_is_taken():
    model, images = make()
    student = split(model, "layer1", QuantizedBottleneck(3), images)
    for message, reason in (
        (b"\0", "at least 4 bytes"),
        (struct.pack("!HH", 65535, 65535), "must have 1 to 1048576 pixels"),
        (struct.pack("!HH", 0, 5), "must have 1 to"),
        (struct.pack("!HH", 2, 2) + bytes(9), "has 20 bytes: got 9"),
        (struct.pack("!HHff", 1, 1, float("nan"), 0) + bytes(3), "must be finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            student.decode(message)


def test_bottlenecks_say_where_they_do_not_fit():
    model, images = make()
    with pytest.raises(ValueError, match="must keep the resolution"):
        split(model, "layer2", QuantizedBottleneck(3), images)
    with pytest.raises(ValueError, match=r"got \(5, 7\) of \(15, 22\)"):
        split(
            nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.ReLU()),
            "0",
            EntropicBottleneck(3),
            torch.randn(1, 3, 15, 22),
        )
    with pytest.raises(ValueError, match="must give maps"):
        split(model, "fc", EntropicBottleneck(3), images)
