"""Every family of image networks learns through the main job."""

import pytest

import omniconv
from omniconv.models.factory import list_models


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*_test"))
def test_fit_trains_every_family_on_digits(name, tmp_path):
    run = omniconv.fit("digits", model=name, time="2m", export=(), out=tmp_path / "run")
    assert run.summary["metrics"]["accuracy"]["value"] >= 0.95
