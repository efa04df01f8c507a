import torch

from omniconv.layers.scheduled_drop_path import ScheduledDropPath


def test_the_share_of_dropped_samples_rises_linearly_and_the_mean_stays():
    torch.manual_seed(0)
    layer, x = ScheduledDropPath(0.6), torch.ones(20000, 1)
    for progress in (0.0, 0.25, 0.5, 1.0):
        layer.set_progress(progress)
        y = layer(x)
        assert abs((y == 0).float().mean() - 0.6 * progress) < 0.02
        assert abs(y.mean() - 1) < 0.03


def test_eval_mode_is_the_identity_and_nothing_is_stored():
    layer, x = ScheduledDropPath(0.6).eval(), torch.randn(4, 3)
    assert layer(x) is x
    assert not layer.state_dict()
