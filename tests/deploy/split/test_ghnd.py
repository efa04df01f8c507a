import pytest
import torch

from omniconv.deploy.split.ghnd import EightBitCodec, NeuralFilter, recall_threshold


def test_eight_bits_err_by_half_a_step_at_most():
    codec = EightBitCodec(3).eval()
    y = torch.randn(4, 3, 5, 7) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None, None, None] + 3
    step = (y.flatten(1).amax(1) - y.flatten(1).amin(1)) / 255
    error = (codec.quantise(y) - y).abs().flatten(1).amax(1)
    assert (error <= 0.5 * step + 1e-6 * y.abs().max()).all()
    messages = codec.compress(y)
    assert {len(message) for message in messages} == {8 + 3 * 5 * 7}
    torch.testing.assert_close(codec.decompress(messages, (5, 7)), codec.quantise(y))
    assert codec.train().quantise(y) is y
    with pytest.raises(ValueError, match="must be finite"):
        codec.compress(torch.full((1, 3, 1, 1), float("inf")))


@pytest.mark.parametrize(("recall", "threshold"), [(1.0, 0.1), (0.75, 0.4), (0.7, 0.4), (0.2, 0.9)])
def test_thresholds_keep_the_wished_share(recall, threshold):
    scores = torch.tensor([0.9, 0.8, 0.4, 0.1, 0.95, 0.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, 1, 1, 0, 0])
    assert recall_threshold(scores, labels, recall) == threshold
    assert (scores[labels > 0] >= threshold).double().mean() >= recall


def test_thresholds_without_images_to_keep_are_refused():
    with pytest.raises(ValueError, match="some image have an object"):
        recall_threshold(torch.ones(3), torch.zeros(3), 0.9)


@pytest.mark.parametrize("size", [(1, 1), (9, 31), (80, 70)])
def test_filter_takes_any_size(size):
    assert NeuralFilter(5).eval()(torch.randn(2, 5, *size)).shape == (2,)


def test_filter_is_the_authors_on_large_maps():
    torch.manual_seed(0)
    model = NeuralFilter(3).eval()
    pool = torch.nn.AdaptiveAvgPool2d
    plain = torch.nn.Sequential(
        pool(64), model.first, pool(16), model.second, pool(4), torch.nn.Flatten(), model.linear
    )
    x = torch.randn(2, 3, 70, 90)
    torch.testing.assert_close(model(x), plain(x).flatten())
