import threading

import numpy as np
import pytest

from omniconv.deploy.serve.brokers import Cascade, DiskBroker, MemoryBroker


@pytest.fixture(params=["memory", "disk", "synced"])
def broker(request, tmp_path):
    return (
        MemoryBroker()
        if request.param == "memory"
        else DiskBroker(tmp_path / "log", sync=request.param == "synced")
    )


def test_messages_come_in_order_and_whole(broker):
    messages = [bytes([k]) * (1000 * k) for k in range(8)]
    threading.Thread(target=lambda: [broker.put(message) for message in messages]).start()
    found = []
    while len(found) < 8:
        taken = broker.take(3)
        assert 1 <= len(taken) <= 3
        found += taken
    assert found == messages
    broker.close()
    assert broker.take(1) == []


def total(objects):
    if any(array.shape == (13,) for array in objects):
        raise ValueError("unlucky")
    return [float(array.sum()) for array in objects]


def test_answers_return_to_their_images(broker):
    frames = [[np.full((2, k), k, np.float32) for k in range(n)] for n in (3, 0, 1, 5)]
    with Cascade(total, broker, max_batch=2) as cascade, Cascade(total) as fused:
        futures = [cascade.submit(frame) for frame in frames]
        assert [f.result(10) for f in futures] == [fused.submit(frame).result(0) for frame in frames]
        assert futures[3].result() == [2.0 * k * k for k in range(5)]


def test_failures_belong_to_their_image(broker):
    with Cascade(total, broker, max_batch=1) as cascade:
        bad, good = cascade.submit([np.zeros(13), np.ones(2)]), cascade.submit([np.ones(2)])
        with pytest.raises(ValueError, match="unlucky"):
            bad.result(10)
        assert good.result(10) == [2.0]
    with pytest.raises(ValueError, match="unlucky"):
        Cascade(total).submit([np.zeros(13)]).result(0)


def test_closing_finishes_what_was_submitted(broker):
    with Cascade(total, broker) as cascade:
        futures = [cascade.submit([np.ones(k)]) for k in range(6)]
    assert [future.result(0) for future in futures] == [[float(k)] for k in range(6)]


def test_the_log_holds_every_message(tmp_path):
    log = DiskBroker(tmp_path / "log")
    log.put(b"abc")
    assert (tmp_path / "log").read_bytes() == b"\0\0\0\3abc"
    log.close()
