import pytest

from omniconv.deploy.split.delay import Route, crossover

SPLIT = Route(device_s=0.5, sent_bytes=1000, server_s=0.25, round_trip_s=0.125)
SEND = Route(device_s=0.0, sent_bytes=20000, server_s=0.25, round_trip_s=0.125)


def test_delay_by_hand():
    assert SPLIT.delay(8000) == 0.5 + 1 + 0.25 + 0.125
    half = Route(0.5, 1000, 0.25, 0.125, sent_share=0.5)
    assert half.delay(8000) == 0.5 + (1 + 0.25 + 0.125) / 2
    assert Route(device_s=2.0, sent_bytes=0).delay(1) == 2.0


def test_both_are_as_fast_at_the_crossover():
    bandwidth = crossover(SPLIT, SEND)
    assert bandwidth == 8 * 19000 / 0.5
    assert SPLIT.delay(bandwidth) == pytest.approx(SEND.delay(bandwidth))
    assert SPLIT.delay(0.9 * bandwidth) < SEND.delay(0.9 * bandwidth)
    assert SPLIT.delay(1.1 * bandwidth) > SEND.delay(1.1 * bandwidth)
    assert crossover(Route(0.0, 10), SEND) is None


def test_errors():
    with pytest.raises(ValueError, match="it sends 19000 bytes more"):
        crossover(SEND, SPLIT)
    with pytest.raises(ValueError, match="must be positive: got 0"):
        SPLIT.delay(0)
