import numpy as np
import pytest
import torch
from torch import nn

from omniconv.compress.quantize.formats import Integer
from omniconv.compress.quantize.integer import dyadic, integer_network, requantize
from omniconv.compress.quantize.quantize import fake_quantize
from omniconv.compress.quantize.quantizer import Scheme

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 12, 5),
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(5):
            model.train()(images())
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(64, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def test_dyadic_numbers_round_as_fractions_do():
    factor = torch.tensor([0.3, 1.7e-3, 12.5, 2.0**-9], dtype=torch.float64)
    m, n = dyadic(factor)
    assert (m % 2 == 1).all()
    assert (m < 2**24).all()
    torch.testing.assert_close(m.double() / 2.0**n, factor, rtol=2.0**-23, atol=0)
    sums = torch.randint(-(2**20), 2**20, (1000, 1))
    assert torch.equal(requantize(sums, m, n), (sums * (m.double() / 2.0**n)).round().long())


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 5)])
def test_whole_numbers_equal_the_simulation_bit_for_bit(weights, activations):
    fake = fake_quantize(network(), images(), weights=weights, activations=activations)
    whole, simulated = integer_network(fake)
    x = torch.randn(32, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    codes = whole.codes(x)
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: inputs.append((layer.input_quantizer, args[0])))
        for layer in (simulated[0], simulated[4], simulated[7], simulated[9])
    ]
    with torch.no_grad():
        output = simulated(x.double())
    for hook in hooks:
        hook.remove()
    for (quantizer, value), found in zip(inputs, codes, strict=True):
        assert torch.equal(quantizer.encode(value), found)
        assert len(found.unique()) > 2**activations / 4
    torch.testing.assert_close(whole(x), output, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert (output.float() - fake(x)).norm() < 0.05 * output.norm()


def test_onnx_runtime_s_int8_gives_the_same_codes_to_one_step(tmp_path):
    import onnxruntime

    from omniconv.deploy.int8 import _quantize

    # ONNX Runtime's weights cover their extremes.
    fake = fake_quantize(network(), images(), weights=Scheme(Integer(8), per="channel"))
    whole, simulated = integer_network(fake)
    quantizers = [simulated[i].input_quantizer for i in (0, 4, 7)]
    weights = [(simulated[i]._parameters["weight"].detach(), simulated[i].bias.detach()) for i in (0, 4)]
    nodes, constants, last = [], [], "x"
    for index, (weight, bias) in enumerate(weights):
        constants += [
            onnx.numpy_helper.from_array(weight.float().numpy(), f"w{index}"),
            onnx.numpy_helper.from_array(bias.float().numpy(), f"b{index}"),
        ]
        nodes.append(
            onnx.helper.make_node(
                "Conv",
                [last, f"w{index}", f"b{index}"],
                [f"c{index}"],
                name=f"conv{index}",
                group=simulated[4 * index].groups,
                pads=[1] * 4,
                strides=[index + 1] * 2,
            )
        )
        nodes.append(onnx.helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        last = f"r{index}"
        if index == 0:
            nodes.append(
                onnx.helper.make_node(
                    "MaxPool", [last], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]
                )
            )
            last = "p"
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "chain", [onnx.helper.make_tensor_value_info("x", kind, [None, 3, 12, 16])],
        [onnx.helper.make_tensor_value_info("r1", kind, None)], constants,
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    spans = [tuple(float(v) for v in ((0 - q.zero) * q.scale, (255 - q.zero) * q.scale)) for q in quantizers]
    ranges = {
        "x": spans[0],
        **dict.fromkeys(("c0", "r0", "p"), spans[1]),
        **dict.fromkeys(("c1", "r1"), spans[2]),
    }
    _quantize(model, [node.name for node in nodes], ranges, tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(16, 3, 12, 16, generator=torch.Generator().manual_seed(2))
    theirs = session.run(None, {"x": x.numpy()})[0]
    ours = whole.codes(x)[2] - int(quantizers[2].zero)
    steps = np.abs(theirs / float(quantizers[2].scale) - ours.numpy())
    assert steps.max() <= 1.001
    assert (steps > 0.5).mean() < 0.01
    assert len(np.unique(np.round(theirs / float(quantizers[2].scale)))) > 50


def test_what_is_wrong_is_said():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid())
    with pytest.raises(ValueError, match="1: a Sigmoid has no form in whole numbers"):
        integer_network(fake_quantize(model, images()))
    with pytest.raises(ValueError, match="inputs must be integers with one static range"):
        integer_network(fake_quantize(model[:1], activations=None))
    with pytest.raises(ValueError, match="must begin with a quantized layer"):
        integer_network(nn.Sequential(nn.ReLU()))
