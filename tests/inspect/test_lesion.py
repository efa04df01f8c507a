"""Lesions of blocks whose worth is known."""

import pytest
import torch
from torch import nn

from omniconv.core.errors import UsageError
from omniconv.inspect.lesion import lesion_study


class Add(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value


def test_every_block_is_missed_by_what_it_adds():
    model = nn.Sequential(Add(1.0), Add(0.0), Add(5.0), nn.Flatten()).train()
    study = lesion_study(model, ["0", "1", "2"], lambda m: float(m(torch.zeros(1, 2, 1))[0, 0]))
    assert study.data["whole"] == 6
    assert study.loss.tolist() == [1, 0, 5]
    assert model.training
    assert study.plot().axes
    with pytest.raises(UsageError, match="block '3' changes the shape"):
        lesion_study(model, ["3"], lambda m: float(m(torch.zeros(1, 2, 1))[0, 0]))
    # Nothing of the lesions is left behind.
    assert model(torch.zeros(1, 2, 1))[0, 0] == 6
