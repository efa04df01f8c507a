"""The two halves of a split network on two machines: messages over TCP, every byte of them counted.

    with SplitServer(network) as server, SplitDevice(network, server.address) as device:
        answers = device(images)

A message is its length in four bytes and what `SplitNetwork.encode` gives for an image. An answer is its length, and a
byte of 0 and an array (its number of axes, their sizes, its float32 values) or a byte of 1 and a sentence that says
what was wrong. Whatever a peer sends, the other side takes no more memory than its limits allow and waits no longer
than its timeout. There is no encryption and nobody is asked for a name: use it inside a tunnel, or on one machine.
"""

import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from omniconv.core.errors import DataError
from omniconv.deploy.split.network import SplitNetwork

__all__ = ["SplitDevice", "SplitServer", "receive", "send"]

_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 16


def send(peer: socket.socket, payload: bytes) -> int:
    """Send one message and return how many bytes went out, length included."""
    peer.sendall(_LENGTH.pack(len(payload)) + payload)
    return _LENGTH.size + len(payload)


def receive(peer: socket.socket, limit: int, timeout_s: float) -> bytes | None:
    """Return the next message, or None if the peer has closed the connection before it.

    Args:
        peer: the socket.
        limit: largest message in bytes; memory is taken as bytes arrive, never on the word of the peer.
        timeout_s: seconds for the whole message, however small its pieces.

    Raises:
        DataError: if the peer announces more than `limit`, or closes within the message.
        TimeoutError: if it takes longer.
    """
    deadline = time.monotonic() + timeout_s
    head = _read(peer, _LENGTH.size, deadline)
    if not head:
        return None
    length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
    if length > limit:
        raise DataError(f"a message of {length} bytes was refused: the limit is {limit}")
    body = _read(peer, length, deadline) if length >= 0 else b""
    if len(body) != length:
        raise DataError("the connection ended within a message")
    return body


def _read(peer: socket.socket, count: int, deadline: float) -> bytes:
    """Return `count` bytes, or fewer if the connection ends."""
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the message did not arrive in time")
        peer.settimeout(left)
        chunk = peer.recv(min(_CHUNK, count - len(data)))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _pack(answer: np.ndarray) -> bytes:
    values = np.ascontiguousarray(answer, "<f4")
    return struct.pack(f"!B{values.ndim}I", values.ndim, *values.shape) + values.tobytes()


def _unpack(data: bytes) -> np.ndarray:
    try:
        (ndim,) = struct.unpack_from("!B", data)
        shape = struct.unpack_from(f"!{ndim}I", data, 1)
        values = np.frombuffer(data, "<f4", offset=1 + 4 * ndim)
        if math.prod(shape) != len(values):
            raise ValueError
    except (struct.error, ValueError):
        raise DataError("the server's answer is no array") from None
    return values.reshape(shape).copy()


def _as_array(output: Any) -> np.ndarray:
    return output.float().cpu().numpy()


class SplitServer:
    """Runs the second half of a network for devices that connect, each in a thread; a context manager.

    Args:
        network: of `split`, distilled.
        host: where to listen; only this machine by default.
        port: 0 takes a free one; see `address`.
        answer: from the network's output for one message to the array that is sent back; by default the output.
        max_bytes: of a message.
        max_pixels: of a latent.
        timeout_s: for a message to arrive, and for a connection to be silent.
        connections: devices at a time; others wait to be accepted.

    Attributes:
        address: host and port.
        received_bytes: of all messages so far, lengths included.
        sent_bytes: of all answers so far.
    """

    def __init__(
        self,
        network: SplitNetwork,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        answer: Callable[[Any], np.ndarray] = _as_array,
        max_bytes: int = 1 << 22,
        max_pixels: int = 1 << 16,
        timeout_s: float = 10.0,
        connections: int = 8,
    ) -> None:
        self.network, self.answer = network.eval(), answer
        self.max_bytes, self.max_pixels, self.timeout_s = max_bytes, max_pixels, timeout_s
        self.received_bytes = self.sent_bytes = 0
        self._lock = threading.Lock()  # one computation at a time; it also guards the counters
        self._free = threading.BoundedSemaphore(connections)
        self._pool = ThreadPoolExecutor(connections + 1, "omniconv-split")
        self._peers: set[socket.socket] = set()
        self._listener = socket.create_server((host, port))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._pool.submit(self._accept)

    def _accept(self) -> None:
        while True:
            self._free.acquire()
            try:
                peer, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._lock:
                self._peers.add(peer)
            self._pool.submit(self._serve, peer)

    def _serve(self, peer: socket.socket) -> None:
        try:
            with peer:
                while (message := receive(peer, self.max_bytes, self.timeout_s)) is not None:
                    with self._lock:
                        self.received_bytes += _LENGTH.size + len(message)
                        reply = self._compute(message)
                        self.sent_bytes += _LENGTH.size + len(reply)
                    send(peer, reply)
        except (OSError, DataError):  # this device has gone, is too slow or makes no sense; the others stay
            pass
        finally:
            with self._lock:
                self._peers.discard(peer)
            self._free.release()

    def _compute(self, message: bytes) -> bytes:
        try:
            return b"\0" + _pack(self.answer(self.network.decode(message, self.max_pixels)))
        except ValueError as error:
            return b"\1" + str(error).encode()
        except Exception as error:  # a message that no layer takes must not end the thread without an answer
            return b"\1" + f"the network could not take this latent ({type(error).__name__})".encode()

    def close(self) -> None:
        """Take no more messages and wait until nothing runs."""
        # A blocked accept does not end by closing its socket, but by shutting it down.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            peers = list(self._peers)
        for peer in peers:
            try:
                peer.shutdown(socket.SHUT_RD)
            except OSError:  # it has gone by itself
                pass
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SplitDevice:
    """Runs the first half of a network and asks a server for the rest; a context manager.

    Args:
        network: the same as the server's; the device uses its stem, encoder and codec alone.
        address: of the server.
        keep: from the stem's output to a bool for each image, whether it is worth sending; all by default. See
            `NeuralFilter`.
        max_bytes: of an answer.
        timeout_s: for an answer.

    Attributes:
        sent_bytes: of all messages so far, lengths included.
    """

    def __init__(
        self,
        network: SplitNetwork,
        address: tuple[str, int],
        *,
        keep: Callable[[Tensor], Tensor] | None = None,
        max_bytes: int = 1 << 24,
        timeout_s: float = 10.0,
    ) -> None:
        self.network, self.keep = network.eval(), keep
        self.max_bytes, self.timeout_s = max_bytes, timeout_s
        self.sent_bytes = 0
        self._peer = socket.create_connection(address, timeout_s)
        self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[np.ndarray | None]:
        """Return the server's answer for each image (N, C, H, W), or None for those that were not worth sending.

        Raises:
            DataError: if the server refuses a message or closes the connection.
        """
        early = self.network.stem(images)
        chosen = torch.ones(len(images), dtype=torch.bool) if self.keep is None else self.keep(early).cpu()
        answers: list[np.ndarray | None] = [None] * len(images)
        if not bool(chosen.any()):
            return answers
        indices = chosen.nonzero().flatten().tolist()
        for index, message in zip(
            indices, self.network.messages(early[chosen.to(early.device)]), strict=True
        ):
            self.sent_bytes += send(self._peer, message)
            reply = receive(self._peer, self.max_bytes, self.timeout_s)
            if not reply:
                raise DataError("the server closed the connection; see whether its limits allow this latent")
            if reply[0]:
                raise DataError(f"the server refused an image: {reply[1:].decode(errors='replace')}")
            answers[index] = _unpack(reply[1:])
        return answers

    def close(self) -> None:
        """Close the connection."""
        self._peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
