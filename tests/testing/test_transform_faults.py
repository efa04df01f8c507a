"""The contract catches transforms that are broken on purpose, each by the check meant for it."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from omniconv.compress.report import compare
from omniconv.testing import transforms

SHAPE = (3, 8, 10)


def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def zero_half(network):
    with torch.no_grad():
        network[0].weight[:4] = 0
    return network


def correct(network):
    result = zero_half(copy.deepcopy(network))
    return result, compare("toy", network, result, input_shape=SHAPE)


def in_place(network):
    return zero_half(network), compare("toy", network, network)


def shares(network):
    result = nn.Sequential(*network)
    return result, compare("toy", network, result)


def changes_mode(network):
    result, report = correct(network)
    network.eval()
    return result, report


def leaves_gradients(network):
    network(torch.ones(2, *SHAPE)).sum().backward()
    return correct(network)


def leaves_hooks(network):
    result, report = correct(network)
    network[0].register_forward_hook(lambda *_: None)
    return result, report


def freezes(network):
    result, report = correct(network)
    network.requires_grad_(False)
    return result, report


def hooked(network):
    result, report = correct(network)
    result[0].register_forward_hook(lambda m, a, y: y)
    return result, report


def masked(network):
    result = copy.deepcopy(network)
    prune.l1_unstructured(result[0], "weight", 0.5)
    return result, compare("toy", network, result)


def breaks(network):
    result, report = correct(network)
    nn.init.constant_(result[3].weight, float("nan"))
    return result, report


def told(**wrong):
    def run(network):
        result, report = correct(network)
        return result, dataclasses.replace(report, after=dataclasses.replace(report.after, **wrong))

    return run


FAULTS = [
    (in_place, transforms.input_model_unchanged, "0.weight: values differ"),
    (shares, transforms.input_model_unchanged, "input and result share parameters"),
    (changes_mode, transforms.input_model_unchanged, "its mode was changed"),
    (leaves_gradients, transforms.input_model_unchanged, "left with gradients"),
    (leaves_hooks, transforms.input_model_unchanged, "left with hooks"),
    (freezes, transforms.input_model_unchanged, "were frozen"),
    (hooked, transforms.result_is_a_plain_module, "the result has hooks"),
    (masked, transforms.result_is_a_plain_module, "the result has hooks"),
    (breaks, transforms.result_is_a_plain_module, "output is not finite"),
    (told(parameters=100), transforms.report_is_true, "after: 100 parameters, counted 276"),
    (told(nonzero=276), transforms.report_is_true, "after: 276 are not zero"),
    (told(macs=1), transforms.report_is_true, "after: 1 multiply-adds"),
    (told(bytes=10), transforms.report_is_true, "after: 10 bytes, the file holds"),
]


def case(run):
    return transforms.TransformCase("toy", run, model, SHAPE)


@pytest.mark.parametrize(("run", "check", "words"), FAULTS, ids=[w for _, _, w in FAULTS])
def test_broken_transform_is_caught(assert_caught, run, check, words):
    assert_caught(check, case(run), words)


def test_every_transform_check_has_a_fault():
    assert {check for _, check, _ in FAULTS} == set(transforms.TRANSFORM_CHECKS)


def test_correct_transform_passes():
    transforms.check_transform(case(correct))
