"""The comparison of mixers, on a handful of digits."""

import json
import math
from dataclasses import asdict

from omniconv.cli.main import run
from omniconv.papers import mixers
from omniconv.papers.small import digits


def test_scores_are_shares_and_counts():
    train, test = digits(32)
    data = (train[0][:24], train[1][:24]), (test[0][:10], test[1][:10])
    scores = mixers.measure_mixer("window", data, epochs=1, shift=1)
    assert scores.parameters > 100_000
    assert scores.macs > 1e6
    assert min(scores.training_rate, scores.inference_rate) > 0
    shares = (scores.field, scores.shift, scores.rotation, scores.scale, scores.accuracy)
    assert all(0 <= share <= 1 for share in shares)
    assert not any(math.isnan(value) for value in asdict(scores).values() if isinstance(value, float))


def test_the_command_shows_every_mixer(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    row = mixers.MixerScores("halo", 123456, 7_000_000, 100.0, 300.0, 0.2, 0.91, 0.8, 0.7, 0.95)
    monkeypatch.setattr(mixers, "compare_mixers", lambda progress: [row])
    assert run(["bench", "mixers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asdict(row)]
    assert run(["bench", "mixers"]) == 0
    out = capsys.readouterr().out
    assert "123,456" in out
    assert "95.0%" in out
