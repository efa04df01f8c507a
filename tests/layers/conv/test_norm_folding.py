import pytest
import torch
from torch import nn

from omniconv.layers.conv.norm_folding import conv_norm_calls, fold_batch_norms
from omniconv.models.factory import create_model


@pytest.mark.parametrize("name", ["resnet_test", "repvgg_test"])
def test_networks_compute_the_same_without_their_norms(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5)
    x = torch.randn(4, 3, 40, 48)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-1, 1)
        folded = fold_batch_norms(model)
        torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) < sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )


def test_only_what_nothing_else_uses_is_folded():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.na, self.nb, self.nc = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            x = self.na(y) + y
            x = self.nb(self.b(x))
            x = self.nc(self.c(x))
            return self.nc(x)

    assert [(a.target, b.target) for a, b in conv_norm_calls(Net())] == [("b", "nb")]


def test_what_cannot_be_traced_stays():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = Net(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert isinstance(fold_batch_norms(model)[1], nn.BatchNorm2d)
