"""Two networks of different rates: what the first one finds goes to the second through an exchangeable broker.

Paper: AbouElhamayed et al., https://arxiv.org/abs/2403.12981, where Redis and Kafka stand between a detector and a
network for each face. `MemoryBroker` has the role of the former, `DiskBroker` of the latter; without a broker the two
run one after the other in one thread.
"""

import io
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

__all__ = ["Broker", "Cascade", "DiskBroker", "MemoryBroker"]

_LENGTH = struct.Struct("!I")
_JOB = struct.Struct("!QI")  # number of the job, and of the object in it


class Broker(Protocol):
    """Carries messages from one thread to another, in order."""

    def put(self, message: bytes) -> None:
        """Leave a message."""
        ...

    def take(self, most: int) -> list[bytes]:
        """Return up to `most` messages as soon as there is one, or none after `close`."""
        ...

    def close(self) -> None:
        """End every wait."""
        ...


class MemoryBroker:
    """A queue in memory."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, message: bytes) -> None:
        """Leave a message."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def take(self, most: int) -> list[bytes]:
        """Return up to `most` messages as soon as there is one, or none after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._closed)
            count = 0 if self._closed else min(most, len(self._messages))
            return [self._messages.popleft() for _ in range(count)]

    def close(self) -> None:
        """End every wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class DiskBroker:
    """A log on disk: every message is appended to a file, and read from there.

    What has been put is in the file as soon as `put` returns, and survives the process; with `sync` it survives the
    machine.

    Args:
        path: of the log; a new broker begins a new one.
        sync: wait until the disk has each message.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = False) -> None:
        self._log, self._reader = Path(path).open("wb"), Path(path).open("rb")
        self._sync = sync
        self._ready = 0
        self._changed = threading.Condition()
        self._closed = False

    def put(self, message: bytes) -> None:
        """Leave a message."""
        with self._changed:
            self._log.write(_LENGTH.pack(len(message)) + message)
            self._log.flush()
            if self._sync:
                os.fsync(self._log.fileno())
            self._ready += 1
            self._changed.notify()

    def take(self, most: int) -> list[bytes]:
        """Return up to `most` messages as soon as there is one, or none after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            count = 0 if self._closed else min(most, self._ready)
            self._ready -= count
            return [self._read() for _ in range(count)]

    def _read(self) -> bytes:
        return self._reader.read(_LENGTH.unpack(self._reader.read(_LENGTH.size))[0])

    def close(self) -> None:
        """End every wait; the log stays where it is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._log.close()
            self._reader.close()


class Cascade:
    """Objects that a first network found, answered by a second one; a context manager.

    Args:
        second: from a list of arrays, objects of one or several images, to the list of their answers.
        broker: between the two, with a thread of its own behind it; None computes at once, in the caller's thread.
        max_batch: objects that are computed together.
    """

    def __init__(
        self,
        second: Callable[[list[np.ndarray]], Sequence[Any]],
        broker: Broker | None = None,
        *,
        max_batch: int = 16,
    ) -> None:
        self.second, self.broker, self.max_batch = second, broker, max_batch
        self._lock = threading.Lock()
        self._jobs: dict[int, tuple[Future[list[Any]], list[Any]]] = {}
        self._left: dict[int, int] = {}
        self._number = 0
        self._thread = threading.Thread(target=self._consume, name="omniconv-second", daemon=True)
        if broker is not None:
            self._thread.start()

    def submit(self, objects: list[np.ndarray]) -> "Future[list[Any]]":
        """Return the future answers of one image's objects, in their order."""
        future: Future[list[Any]] = Future()
        if self.broker is None or not objects:
            try:
                future.set_result(list(self.second(objects)) if objects else [])
            except Exception as error:  # it belongs to whoever asks for the result, as it does with a broker
                future.set_exception(error)
            return future
        with self._lock:
            job = self._number
            self._number += 1
            self._jobs[job] = future, [None] * len(objects)
            self._left[job] = len(objects)
        for index, array in enumerate(objects):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            self.broker.put(_JOB.pack(job, index) + buffer.getvalue())
        return future

    def _consume(self) -> None:
        assert self.broker is not None
        while messages := self.broker.take(self.max_batch):
            places = [_JOB.unpack_from(message) for message in messages]
            arrays = [np.load(io.BytesIO(m[_JOB.size :]), allow_pickle=False) for m in messages]
            try:
                answers = list(self.second(arrays))
                if len(answers) != len(arrays):
                    raise RuntimeError(f"{len(arrays)} objects gave {len(answers)} answers")
            except Exception as error:  # the other jobs go on
                for job in {job for job, _ in places}:
                    self._end(job, error)
                continue
            for (job, index), answer in zip(places, answers, strict=True):
                if job in self._jobs:
                    self._jobs[job][1][index] = answer
                    self._left[job] -= 1
                    if self._left[job] == 0:
                        self._end(job)

    def _end(self, job: int, error: Exception | None = None) -> None:
        with self._lock:
            self._left.pop(job, None)
            future, answers = self._jobs.pop(job, (None, []))
        if future is not None:
            if error is None:
                future.set_result(answers)
            else:
                future.set_exception(error)

    def close(self) -> None:
        """Finish what has been submitted and end the thread."""
        if self.broker is not None:
            with self._lock:
                pending = [future for future, _ in self._jobs.values()]
            wait(pending)
            self.broker.close()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
