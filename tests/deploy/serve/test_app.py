"""A real server with a small real network, over real connections."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from omniconv.core.errors import DataError, ResourceError
from omniconv.data.preprocess import Preprocess
from omniconv.deploy.export import Deployable
from omniconv.deploy.serve import create_app, serve
from omniconv.models.factory import create_model

PNG = {"Content-Type": "image/png"}


class Predictor:
    """A small network with random weights; it can be held up, and noted is who computed together."""

    classes = ("ash", "beech", "cedar")
    name, task = "trees", "classification"

    def __init__(self):
        torch.manual_seed(0)
        model = create_model("resnet_test", num_classes=3)
        torch.nn.init.normal_(model.fc.weight)
        self.module = Deployable(Preprocess(16, [0.5] * 3, [0.25] * 3), model, "probabilities").eval()
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()
        self.batches = []

    def predict_images(self, images):
        self.batches.append(len(images))
        self.begun.set()
        assert self.go.wait(30)
        for image in images:
            if image.shape[:2] == (13, 13):
                raise RuntimeError("secret detail")
            if image.shape[:2] == (14, 14):
                raise DataError("this network wants other images")
        batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
        with torch.inference_mode():
            rows = self.module(batch).tolist()
        return [
            {
                "label": self.classes[int(np.argmax(row))],
                "probabilities": dict(zip(self.classes, row, strict=True)),
            }
            for row in rows
        ]

    def explain_image(self, image):
        file = io.BytesIO()
        Image.fromarray(255 - image).save(file, "PNG")
        return file.getvalue()


def png(height=16, width=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


def bomb():
    """Return a PNG of 30,000 x 30,000 pixels in some hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@contextmanager
def running(predictor, **limits):
    """Yield a client of a server in another thread, and the server's app."""
    app = create_app(predictor, **limits)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        # A kept connection could be closed by the server in the moment in which the next request takes it.
        fresh = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=fresh) as client:
            yield client, app
    finally:
        server.should_exit = True
        thread.join()


def wait(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ready(client):
    wait(lambda: client.get("/health").json()["status"] == "ready")


@pytest.fixture(scope="module")
def served():
    predictor = Predictor()
    with running(predictor, max_bytes=200_000, max_batch=4, queue=8) as (client, _):
        ready(client)
        yield client, predictor


def fails(answer, status):
    """Return the sentence of an error answer."""
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    sentence = answer.json()["error"]
    assert "Traceback" not in sentence
    assert "\n" not in sentence
    return sentence


def test_predicts_a_raw_body_and_a_form(served):
    client, predictor = served
    content, pixels = png(20, 31)
    (want,) = predictor.predict_images([pixels])
    answer = client.post("/predict", content=content, headers=PNG)
    assert answer.status_code == 200
    assert answer.json() == {"model": "trees", "predictions": [{"file": "the image", **want}]}
    other, other_pixels = png(20, 31, seed=1)
    files = [("image", ("a.png", content, "image/png")), ("image", ("b.png", other, "image/png"))]
    rows = client.post("/predict", files=files).json()["predictions"]
    wants = [want, predictor.predict_images([other_pixels])[0]]
    for row, name, expected in zip(rows, ("a.png", "b.png"), wants, strict=True):
        assert row["file"] == name
        assert row["label"] == expected["label"]
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_explains(served):
    client, _ = served
    content, pixels = png(9, 12)
    answer = client.post("/explain", content=content, headers=PNG)
    assert answer.headers["Content-Type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), 255 - pixels)
    assert "one image" in fails(client.post("/explain", files=[("f", content), ("f", content)]), 422)


def test_together_equals_one_by_one(served):
    client, predictor = served
    contents = [png(seed=seed) for seed in range(8)]
    alone = [predictor.predict_images([pixels])[0] for _, pixels in contents]
    predictor.go.clear()
    predictor.begun.clear()
    start = len(predictor.batches)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(client.post, "/predict", content=content, headers=PNG) for content, _ in contents]
        predictor.begun.wait(30)
        wait(lambda: sum(predictor.batches[start:]) + queue_length(client) == 8)
        predictor.go.set()
        answers = [job.result() for job in jobs]
    assert max(predictor.batches[start:]) > 1
    for answer, want in zip(answers, alone, strict=True):
        found = answer.json()["predictions"][0]
        assert found["label"] == want["label"]
        assert found["probabilities"] == pytest.approx(want["probabilities"], abs=1e-5)


def metric(client, name):
    """Return a metric's value, or 0 if nothing was counted yet."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def queue_length(client):
    return int(metric(client, "omniconv_queue_length"))


@pytest.mark.parametrize("kind", ["announced", "chunked", "form"])
def test_413_too_large(served, kind):
    client, _ = served
    large = b"\0" * 400_000
    if kind == "announced":
        answer = client.post("/predict", content=large, headers=PNG)
    elif kind == "chunked":
        answer = client.post(
            "/predict", content=(large[i : i + 4096] for i in range(0, 400_000, 4096)), headers=PNG
        )
    else:
        answer = client.post("/predict", files={"image": ("big.png", large, "image/png")})
    assert fails(answer, 413) == "the body is larger than 0.2 MB"


def test_413_ends_an_endless_body(served):
    client, _ = served
    chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

        def send_for_ever():
            while True:
                connection.sendall(chunk)
                time.sleep(0.001)

        with pytest.raises(ConnectionError):  # it hangs up, and does not read for ever
            send_for_ever()
    ready(client)


def test_413_more_images_than_the_queue_holds(served):
    client, _ = served
    assert "8 images" in fails(client.post("/predict", files=[("f", png()[0])] * 9), 413)


def test_415_no_image_type(served):
    client, _ = served
    assert "'application/json' is no image type" in fails(client.post("/predict", json={}), 415)
    answer = client.post("/predict", files={"image": ("notes.txt", b"hello", "text/plain")})
    assert fails(answer, 415) == "notes.txt is text/plain, which is no image type"


@pytest.mark.parametrize(
    "content", [b"", b"no image", png()[0][:150], bomb()], ids=["empty", "text", "cut", "bomb"]
)
@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_422_no_readable_image(served, content, path):
    client, _ = served
    assert fails(client.post(path, content=content, headers=PNG), 422).startswith("the image ")
    name = "/".join(["..", "..", "etc", "bad.png"])
    answer = client.post(path, files={"image": (name, content, "image/png")})
    assert fails(answer, 422).startswith("bad.png ")


def test_422_damaged_forms(served):
    client, _ = served
    assert fails(client.post("/predict", data={"a": "b"}, files={}), 415)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "form" in fails(client.post("/predict", content=b"--x\r\nnonsense", headers=headers), 422)
    assert "form" in fails(
        client.post("/predict", content=b"", headers={"Content-Type": "multipart/form-data"}), 422
    )
    empty = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
    assert fails(client.post("/predict", content=empty, headers=headers), 422) == "the form holds no file"


def test_errors_of_the_predictor(served):
    client, _ = served
    assert (
        fails(client.post("/predict", content=png(14, 14)[0], headers=PNG), 422)
        == "this network wants other images"
    )
    answer = client.post("/predict", content=png(13, 13)[0], headers=PNG)
    assert fails(answer, 500) == "the prediction failed; see the server's log"
    assert "secret" not in answer.text


def test_unknown_paths_and_methods(served):
    client, _ = served
    assert fails(client.get("/nothing"), 404)
    assert fails(client.get("/predict"), 405)
    assert fails(client.get("/docs"), 404)


def test_page_is_self_contained(served):
    client, _ = served
    answer = client.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", answer.text)
    for needed in (
        'lang="en"',
        "<title>",
        'aria-live="polite"',
        'role="alert"',
        "<h1",
        '<input class="unseen" id="file"',
    ):
        assert needed in answer.text


def test_health_and_metrics(served):
    client, _ = served
    health = client.get("/health")
    assert health.status_code == 200
    assert {k: health.json()[k] for k in ("status", "name", "task", "classes")} == {
        "status": "ready", "name": "trees", "task": "classification", "classes": ["ash", "beech", "cedar"],
    }  # fmt: skip
    good, bad = (f'omniconv_requests_total{{path="/predict",status="{code}"}}' for code in (200, 422))
    before = metric(client, good), metric(client, bad), metric(client, "omniconv_batch_size_sum")
    client.post("/predict", content=png()[0], headers=PNG)
    client.post("/predict", content=b"", headers=PNG)
    client.get("/nothing/of/the/kind")
    after = metric(client, good), metric(client, bad), metric(client, "omniconv_batch_size_sum")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
    text = client.get("/metrics").text
    assert 'omniconv_request_seconds_bucket{le="0.5",path="/predict"}' in text
    assert 'path="other"' in text
    assert "/nothing" not in text


def test_429_then_504_then_well_again():
    predictor = Predictor()
    content = png()[0]
    with running(predictor, max_batch=1, max_wait_ms=0, queue=2, timeout_s=3) as (client, _):
        ready(client)
        predictor.go.clear()
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(client.post, "/predict", content=content, headers=PNG)]
            predictor.begun.wait(30)
            jobs += [pool.submit(client.post, "/predict", content=content, headers=PNG) for _ in range(2)]
            wait(lambda: queue_length(client) == 2)
            answer = client.post("/predict", content=content, headers=PNG)
            assert "too many requests" in fails(answer, 429)
            assert int(answer.headers["Retry-After"]) >= 1
            for job in jobs:
                assert fails(job.result(), 504).startswith("no result within 3 s")
        assert queue_length(client) == 0
        predictor.go.set()
        assert client.post("/predict", content=content, headers=PNG).status_code == 200
        assert len(predictor.batches) == 2  # those who gave up were not computed


def test_408_when_the_body_stops_coming():
    with running(Predictor(), timeout_s=0.2) as (client, _):
        ready(client)
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nabc"
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_loading_is_answered_and_may_fail():
    gate = threading.Event()

    def load():
        gate.wait(30)
        return Predictor()

    with running(load) as (client, _):
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert (
            fails(client.post("/predict", content=png()[0], headers=PNG), 503)
            == "the network is still being loaded"
        )
        gate.set()
        ready(client)
        assert client.post("/predict", content=png()[0], headers=PNG).status_code == 200

    def broken():
        raise DataError("no such run")

    with running(broken) as (client, _):
        wait(lambda: client.get("/health").json()["status"] == "failed")
        assert "could not be loaded" in fails(client.post("/predict", content=png()[0], headers=PNG), 503)


def test_503_while_draining():
    with running(Predictor()) as (client, app):
        ready(client)
        app.state.service.status = "draining"
        assert client.get("/health").json()["status"] == "draining"
        assert "shutting down" in fails(client.post("/predict", content=png()[0], headers=PNG), 503)


SLOW_SERVER = """
import time
from omniconv.deploy.serve import serve

class Slow:
    classes, name, task = ["a"], "slow", "classification"
    def predict_images(self, images):
        time.sleep(0.5)
        return [{"label": "a"} for _ in images]
    def explain_image(self, image):
        return b""

serve(Slow(), port=0, on_start=lambda url: print(url, flush=True), max_batch=1)
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(sign):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW_SERVER)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        content = png()[0]
        with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(3) as pool:
            ready(client)
            jobs = [pool.submit(client.post, "/predict", content=content, headers=PNG) for _ in range(3)]
            wait(lambda: metric(client, "omniconv_batch_size_sum") + queue_length(client) == 3)
            os.kill(process.pid, sign)
            assert [job.result().status_code for job in jobs] == [200, 200, 200]
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        process.kill()
        process.communicate()


def test_a_taken_port_is_a_resource_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"^cannot listen on 127\.0\.0\.1:{port} \(address already in use\); give another port$"
        with pytest.raises(ResourceError, match=message):
            serve(Predictor(), port=port)


def test_a_missing_package_is_named_with_its_extra():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "try:\n    from omniconv.deploy.serve import serve\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip()
        == "ResourceError serving needs fastapi; install it with: pip install 'omniconv[serve]'"
    )
