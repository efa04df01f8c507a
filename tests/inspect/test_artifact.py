import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from omniconv.core.errors import UsageError
from omniconv.inspect.artifact import Artifact


class Line(Artifact):
    title = "<b>A line</b>"

    def plot(self):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot(self.data["y"])
        return figure


@pytest.fixture
def line():
    return Line({"y": np.arange(4.0), "x": np.ones(2)})


def test_npz_holds_the_numbers(line, tmp_path):
    line.save(tmp_path / "deep" / "x.npz")
    with np.load(tmp_path / "deep" / "x.npz") as stored:
        assert set(stored) == set(line.data)
        np.testing.assert_array_equal(stored["y"], line.data["y"])


def test_png_is_a_picture_of_the_figures_size(line, tmp_path):
    line.save(tmp_path / "x.PNG")
    assert Image.open(io.BytesIO((tmp_path / "x.PNG").read_bytes())).size == (240, 120)


def test_html_is_one_escaped_page(line, tmp_path):
    line.save(str(tmp_path / "x.html"))
    page = (tmp_path / "x.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;A line" in page
    assert "http" not in page
    assert "data:image/png;base64," in page


def test_another_name_is_refused_and_leaves_no_file(line, tmp_path):
    with pytest.raises(UsageError, match=r"x\.pdf: the name must end in \.html, \.png or \.npz"):
        line.save(tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_never_touched(line):
    import subprocess
    import sys

    code = (
        "import sys, torch; from torch import nn; from omniconv.inspect.cam.eigen_cam import eigen_cam;"
        "assert 'matplotlib' not in sys.modules;"
        "eigen_cam(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(2, 1, 8, 8), '0').plot();"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
