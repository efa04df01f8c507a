import pytest

import omniconv
from omniconv.pipeline.config import Plan


@pytest.fixture(scope="session")
def quick_plan(tmp_path_factory):
    """A plan that trains in a few seconds."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan = Plan(
        network="resnet8_small", size=16, batch=32, epochs=6, optimizer="sgd", lr=0.1, ema=0.9, smoothing=0.0
    )
    plan.save(path)
    return path


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, quick_plan):
    """A finished run on digits with everything in its folder; tests must not change it."""
    out = tmp_path_factory.mktemp("digits") / "run"
    return omniconv.fit("digits", plan=quick_plan, out=out)
