"""Every component, found by itself, keeps its contract."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from omniconv.core.cases import Case, LossCase, OpCase
from omniconv.models.factory import create_model, get_variant, list_models
from omniconv.testing.artifacts import ARTIFACT_CHECKS, ArtifactCase
from omniconv.testing.find import find_artifacts, find_cases, find_transforms, missing_cases
from omniconv.testing.harness import Check, run_check
from omniconv.testing.layers import LAYER_CHECKS, SLOW_LAYER_CHECKS, case_name
from omniconv.testing.losses import LOSS_CHECKS, loss_name
from omniconv.testing.models import COUNT_CHECKS, MODEL_CHECKS, SLOW_MODEL_CHECKS
from omniconv.testing.ops import OP_CHECKS, op_name
from omniconv.testing.transforms import TRANSFORM_CHECKS, TransformCase

MODEL = functools.partial(create_model, "resnet_test", num_classes=5)
SHAPE = (3, 40, 48)


def images() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images()), torch.tensor([1, 3]))


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    convolutions = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: weight.detach() > 0 for name, weight in convolutions.items()}


ARGUMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "sparsity": lambda model: 0.5,
    "x": lambda model: images(),
    "images": lambda model: images(),
    "input_shape": lambda model: SHAPE,
    "loss": lambda model: loss,
    "masks": masks,
    "losses": lambda model: [loss, loss],
    "iterations": lambda model: 3,
    "steps": lambda model: 3,
    "labels": lambda model: torch.tensor([1, 3]),
    "maps": lambda model: {"first": images(), "second": images().relu()},
    "change": lambda model: "rotation",
    "levels": lambda model: (10, 20),
    "blocks": lambda model: ["layer2.1"],
    "score": lambda model: lambda m: float(m(images()).detach().mean()),
    "method": lambda model: "masks",
    "rounds": lambda model: 1,
    "other": lambda model: MODEL(),
    "batches": lambda model: [images()],
}
"""What transforms and inspections are called with, by the names of their arguments."""


def call(function: Callable[..., Any], model: nn.Module) -> Any:
    """Call a transform or inspection with the model and whatever else of ARGUMENTS it takes."""
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "model":
            given[name] = model
        elif name in ARGUMENTS:
            given[name] = ARGUMENTS[name](model)
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            pytest.fail(f"{function.__name__} needs {name!r}; add one to ARGUMENTS in {__file__}")
    return function(**given)


def pairs(subjects: Iterable[tuple[str, Any]], checks: Sequence[Check], *marks: pytest.MarkDecorator) -> Any:
    """Parametrize over every check of every subject, so that a failure names both."""
    return pytest.mark.parametrize(
        ("check", "name", "subject"),
        [
            pytest.param(check, name, subject, id=f"{name}-{check.__name__}", marks=marks)
            for name, subject in subjects
            for check in checks
        ],
    )


LAYERS = [(case_name(case), case) for case in find_cases("omniconv.layers") if isinstance(case, Case)]
OPS = [(op_name(case), case) for case in find_cases("omniconv.ops") if isinstance(case, OpCase)]
LOSSES = [(loss_name(case), case) for case in find_cases("omniconv.losses") if isinstance(case, LossCase)]
TRANSFORMS = [
    (name, TransformCase(name, functools.partial(call, function), MODEL, SHAPE))
    for package in ("omniconv.compress", "omniconv.deploy")
    for name, function in find_transforms(package).items()
]
ARTIFACTS = [
    (name, ArtifactCase(name, lambda function=function: call(function, MODEL())))
    for name, function in find_artifacts("omniconv.inspect").items()
]
SMALL = [(name, name) for name in list_models("*_test")]
PUBLISHED = [(name, name) for name in list_models()]


@pytest.mark.parametrize("package", ["omniconv.layers", "omniconv.losses", "omniconv.ops"])
def test_every_public_component_has_a_case(package):
    missing = missing_cases(package, functions=package == "omniconv.ops")
    assert not missing, f"add a case to CASES beside {', '.join(missing)}"


def test_every_family_has_a_small_variant():
    small = {get_variant(name).model for name in list_models("*_test")}
    missing = {name for name in list_models() if get_variant(name).model not in small}
    assert not missing, f"add a *_test variant to VARIANTS beside {', '.join(sorted(missing))}"


def test_names_are_unique():
    for found in (LAYERS, OPS, LOSSES):
        names = [name for name, _ in found]
        assert len(set(names)) == len(names), f"give each case its id: {sorted(names)}"


@pairs(LAYERS, LAYER_CHECKS)
def test_layer(check, name, subject):
    run_check(check, name, subject)


@pairs(LAYERS, SLOW_LAYER_CHECKS, pytest.mark.slow)
def test_layer_slowly(check, name, subject):
    run_check(check, name, subject)


@pairs(OPS, OP_CHECKS)
def test_op(check, name, subject):
    run_check(check, name, subject)


@pairs(LOSSES, LOSS_CHECKS)
def test_loss(check, name, subject):
    run_check(check, name, subject)


@pairs(SMALL, MODEL_CHECKS)
def test_model(check, name, subject):
    run_check(check, name, subject)


@pairs(SMALL, SLOW_MODEL_CHECKS, pytest.mark.slow)
def test_model_slowly(check, name, subject):
    run_check(check, name, subject)


@pairs(PUBLISHED, COUNT_CHECKS)
def test_published_model(check, name, subject):
    run_check(check, name, subject)


@pairs(TRANSFORMS, TRANSFORM_CHECKS)
def test_transform(check, name, subject):
    run_check(check, name, subject)


@pairs(ARTIFACTS, ARTIFACT_CHECKS)
def test_artifact(check, name, subject):
    run_check(check, name, subject)
