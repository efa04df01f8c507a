"""Two halves over a real socket, and peers that mean ill."""

import socket
import struct
import threading

import numpy as np
import pytest
import torch

from omniconv.core.errors import DataError
from omniconv.deploy.split.ghnd import QuantizedBottleneck
from omniconv.deploy.split.network import split
from omniconv.deploy.split.wire import SplitDevice, SplitServer, receive, send
from omniconv.models.factory import create_model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_model("resnet_test", num_classes=5).eval()
    return split(model, "layer1", QuantizedBottleneck(3), torch.randn(1, 3, 16, 24))


def test_answers_and_bytes(network):
    images = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        wanted = network(images).numpy()
    with SplitServer(network) as server, SplitDevice(network, server.address) as device:
        np.testing.assert_allclose(np.concatenate(device(images)), wanted, rtol=1e-5, atol=1e-6)
        expected = 3 * (4 + 4 + 8 + 3 * 20 * 28)
        assert device.sent_bytes == server.received_bytes == expected
        assert server.sent_bytes == 3 * (4 + 1 + 1 + 8 + 20)


def test_what_the_filter_drops_is_not_sent(network):
    with SplitServer(network) as server:
        with SplitDevice(network, server.address, keep=lambda early: torch.tensor([False, True])) as device:
            first, second = device(torch.randn(2, 3, 16, 24))
        assert first is None
        assert second.shape == (1, 5)
        with SplitDevice(network, server.address, keep=lambda early: torch.zeros(2).bool()) as device:
            assert device(torch.randn(2, 3, 16, 24)) == [None, None]
            assert device.sent_bytes == 0


def test_bad_messages_get_a_sentence_and_others_go_on(network):
    with SplitServer(network, max_pixels=100) as server:
        with socket.create_connection(server.address) as peer:
            for message in (b"", struct.pack("!HH", 60000, 60000), struct.pack("!HH", 2, 2) + b"x"):
                send(peer, message)
                reply = receive(peer, 1000, 5)
                assert reply is not None
                assert reply[0] == 1
        with (
            SplitDevice(network, server.address) as device,
            pytest.raises(
                DataError, match="refused an image: a latent must have 1 to 100 pixels: got 20 x 28"
            ),
        ):
            device(torch.randn(1, 3, 16, 24))


def test_announced_lengths_take_no_memory(network):
    with SplitServer(network, max_bytes=1000) as server:
        with socket.create_connection(server.address) as peer:
            peer.sendall(struct.pack("!I", 1001))
            assert peer.recv(1) == b""  # closed
        assert server.received_bytes == 0


def test_slow_and_broken_peers_are_given_up():
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"\0\0")
        with pytest.raises(TimeoutError):
            receive(near, 10, 0.05)
    for sent, error in ((b"\0\0\0\5ab", "ended within a message"), (b"\0", "ended within a message")):
        near, far = socket.socketpair()
        with near:
            far.sendall(sent)
            far.close()
            with pytest.raises(DataError, match=error):
                receive(near, 10, 1)
    near, far = socket.socketpair()
    far.close()
    with near:
        assert receive(near, 10, 1) is None


def test_more_devices_than_connections_wait_their_turn(network):
    images = torch.randn(1, 3, 16, 24)
    answers = []

    def ask(address):
        with SplitDevice(network, address) as device:
            answers.append(device(images)[0])

    with SplitServer(network, connections=1) as server:
        threads = [threading.Thread(target=ask, args=(server.address,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 3
