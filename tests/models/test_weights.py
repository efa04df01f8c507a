"""Weights from elsewhere: names."""

import pytest
import torch

from omniconv.core.errors import UsageError
from omniconv.models.weights import rename


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
