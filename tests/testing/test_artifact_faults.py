"""The contract catches artifacts that are broken on purpose, each by the check meant for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from omniconv.inspect.artifact import Artifact
from omniconv.testing import artifacts


class Toy(Artifact):
    """A correct artifact: a curve."""

    def __init__(self):
        super().__init__({"curve": np.arange(5.0)})

    def plot(self):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot(self.data["curve"])
        return figure


class Lists(Toy):
    def __init__(self):
        self.data = {"curve": [1.0, 2.0]}


class Nan(Toy):
    def __init__(self):
        Artifact.__init__(self, {"curve": np.array([np.nan])})


class Empty(Toy):
    def plot(self):
        from matplotlib.figure import Figure

        return Figure()


class OpensWindows(Toy):
    def plot(self):
        from matplotlib import pyplot

        figure, axes = pyplot.subplots()
        axes.plot(self.data["curve"])
        return figure


class Linked(Toy):
    page = '<html><img src="data:image/png;base64,AA=="><script src="https://example.org/plot.js"></script></html>'

    def save(self, path):
        Path(path).write_text(self.page) if str(path).endswith(".html") else super().save(path)


class Styled(Linked):
    page = "<html><style>body{background:url(//example.org/a.png)}</style></html>"


class Fetches(Linked):
    page = '<html><script>fetch("data.json")</script></html>'


class TwoFiles(Toy):
    def save(self, path):
        super().save(path)
        Path(path).with_name("style.css").write_text("")


class Rounds(Toy):
    def save(self, path):
        rounded = Toy()
        rounded.data["curve"] = self.data["curve"] + 0.1
        Artifact.save(rounded, path)


class Random(Toy):
    def __init__(self):
        Artifact.__init__(self, {"curve": np.random.default_rng().random(4)})


class TakesAnyName(Toy):
    def save(self, path):
        Path(path).write_bytes(b"") if Path(path).suffix == ".xyz" else super().save(path)


FAULTS = [
    (Lists, artifacts.data_is_numbers, "data['curve'] is list"),
    (Nan, artifacts.data_is_numbers, "data['curve'] is not finite"),
    (Empty, artifacts.plot_gives_a_figure, "the figure is empty"),
    (OpensWindows, artifacts.plot_gives_a_figure, "stay open"),
    (Linked, artifacts.page_is_self_contained, "https://example.org/plot.js"),
    (Styled, artifacts.page_is_self_contained, "//example.org/a.png"),
    (Fetches, artifacts.page_is_self_contained, "data.json"),
    (TwoFiles, artifacts.page_is_self_contained, "style.css"),
    (Rounds, artifacts.picture_and_numbers_are_files, "other numbers"),
    (Random, artifacts.same_twice, "the numbers differ"),
    (TakesAnyName, artifacts.other_endings_are_refused, "is accepted"),
]


@pytest.fixture(autouse=True)
def _close_windows():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.parametrize(("make", "check", "words"), FAULTS, ids=[m.__name__ for m, _, _ in FAULTS])
def test_broken_artifact_is_caught(assert_caught, make, check, words):
    assert_caught(check, artifacts.ArtifactCase("toy", make), words)


def test_every_artifact_check_has_a_fault():
    assert {check for _, check, _ in FAULTS} == set(artifacts.ARTIFACT_CHECKS)


def test_correct_artifact_passes():
    artifacts.check_artifact(artifacts.ArtifactCase("toy", Toy))


def test_seeded_numbers_are_no_fault():
    class Drawn(Toy):
        def __init__(self):
            Artifact.__init__(self, {"curve": torch.rand(4).numpy()})

    artifacts.check_artifact(artifacts.ArtifactCase("toy", Drawn))
