"""The HTTP interface: what comes in is checked before it costs anything, and every answer is a plain sentence.

- `GET /`: a page on which a person drops a picture
- `POST /predict`: multipart files or one raw image -> `{"model", "predictions": [{"file", ...}]}`
- `POST /explain`: one image -> PNG of the activation map
- `GET /health`: `{"status": "ready" or "loading" or "draining" or "failed", ...}`; 200 only when ready
- `GET /metrics`: Prometheus

Errors are `{"error": sentence}` with 408 (the body came too slowly), 413 (body too large), 415 (no image type),
422 (no readable image), 429 with Retry-After (queue full), 503 (loading or draining) and 504 (took too long).
"""

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import prometheus_client
import python_multipart  # noqa: F401  # starlette reads forms with it, and says so only when the first one comes
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omniconv.core.errors import OmniconvError, ResourceError
from omniconv.core.version import __version__
from omniconv.data.decode import read_header, read_image
from omniconv.deploy.serve.batcher import Batcher, Closed, QueueFull

__all__ = ["Predictor", "create_app", "serve"]

_LOG = logging.getLogger("omniconv.serve")
_PAGE = Path(__file__).with_name("page.html")
_PATHS = ("/", "/predict", "/explain", "/health", "/metrics")
_BATCH_PIXELS = 64_000_000  # decoded at a time; a larger picture is computed alone
_DISCARD_SECONDS = 2.0
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Predictor(Protocol):
    """What is served.

    Attributes:
        classes: names of the classes, or of the predicted values.
        name: what the network is called.
        task: "classification", "multilabel" or "regression".
    """

    classes: list[str]
    name: str
    task: str

    def predict_images(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        """Return one JSON-ready dict for each image (H, W, C), such as {"label", "confidence", "probabilities"}."""
        ...

    def explain_image(self, image: np.ndarray) -> bytes:
        """Return a PNG that shows where in the image (H, W, C) the network looked."""
        ...


@dataclass(frozen=True)
class _Upload:
    name: str
    content: bytes
    pixels: int


class _Service:
    """State of one app: the predictor, its two queues and its metrics."""

    def __init__(
        self, predictor: Predictor | Callable[[], Predictor], max_batch: int, max_wait_ms: float, queue: int
    ):
        self.source = predictor
        self.predictor: Predictor | None = None
        self.status = "loading"
        self.queue = queue
        self.reading = 0  # requests whose body is on its way
        # One thread computes: networks are not safe to call from several, and one already uses all cores.
        self.executor = ThreadPoolExecutor(1, "omniconv-predict")
        registry = self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "omniconv_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = prometheus_client.Histogram(
            "omniconv_request_seconds", "Seconds from request to answer.", ["path"], registry=registry
        )
        self.sizes = prometheus_client.Histogram(
            "omniconv_batch_size",
            "Images in a batch.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        waiting = prometheus_client.Gauge("omniconv_queue_length", "Images that wait.", registry=registry)
        ready = prometheus_client.Gauge("omniconv_ready", "1 when predictions are taken.", registry=registry)
        self.predicting = Batcher(
            self._predict, self.executor, max_batch=max_batch, max_wait_ms=max_wait_ms, queue=queue,
            max_weight=_BATCH_PIXELS, on_batch=self.sizes.observe,
        )  # fmt: skip
        self.explaining = Batcher(self._explain, self.executor, max_batch=1, max_wait_ms=0, queue=queue)
        waiting.set_function(lambda: len(self.predicting) + len(self.explaining))
        ready.set_function(lambda: self.status == "ready")

    def _predict(self, uploads: list[_Upload]) -> list[Any]:
        assert self.predictor is not None
        results: list[Any] = [_decode(upload) for upload in uploads]
        good = [index for index, result in enumerate(results) if isinstance(result, np.ndarray)]
        if good:
            predictions = self.predictor.predict_images([results[index] for index in good])
            for index, prediction in zip(good, predictions, strict=True):
                results[index] = prediction
        return results

    def _explain(self, uploads: list[_Upload]) -> list[Any]:
        assert self.predictor is not None
        image = _decode(uploads[0])
        return [self.predictor.explain_image(image) if isinstance(image, np.ndarray) else image]

    async def start(self) -> None:
        """Load the predictor, without holding up the server."""
        source = self.source
        try:
            if hasattr(source, "predict_images"):
                self.predictor = source  # type: ignore[assignment]  # told apart by the attribute
            else:
                load: Callable[[], Predictor] = source  # type: ignore[assignment]
                self.predictor = await asyncio.get_running_loop().run_in_executor(self.executor, load)
            if self.status == "loading":
                self.status = "ready"
        except Exception:  # whatever it was, the server stays up to answer what became of it
            self.status = "failed"
            _LOG.exception("the network could not be loaded")

    def check_accepting(self, batcher: Batcher, count: int = 1) -> None:
        """Raise 503 or 429 if `count` images cannot be taken now."""
        if self.status != "ready":
            reason = {
                "loading": "the network is still being loaded",
                "draining": "the server is shutting down and takes no new work",
                "failed": "the network could not be loaded; see the server's log",
            }
            raise HTTPException(503, reason[self.status])
        if count > self.queue:
            raise HTTPException(413, f"a request may hold {self.queue} images; this one holds {count}")
        batcher.check_room(count)
        if self.reading >= self.queue:
            raise QueueFull(1)


def _decode(upload: _Upload) -> np.ndarray | OmniconvError:
    try:
        image = read_image(upload.content, name=upload.name)
        return image if image.flags.writeable else image.copy()  # PyTorch warns of arrays that are not
    except OmniconvError as error:
        return error


class _Measured:
    """Middleware that counts requests and times them."""

    def __init__(self, app: ASGIApp, service: _Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Unknown paths share a label: anybody could otherwise fill the memory with new ones.
        path = scope["path"] if scope["path"] in _PATHS else "other"
        try:
            await self.app(scope, receive, observed)
        finally:
            self.service.requests.labels(path, str(status)).inc()
            self.service.seconds.labels(path).observe(time.perf_counter() - started)


def create_app(
    predictor: Predictor | Callable[[], Predictor],
    *,
    max_batch: int = 16,
    max_wait_ms: float = 5,
    queue: int = 64,
    timeout_s: float = 10,
    max_bytes: int = 20_000_000,
) -> FastAPI:
    """Return the app that serves a predictor.

    Args:
        predictor: what predicts, or a function that loads it while the server already answers `/health`.
        max_batch: images that are computed together.
        max_wait_ms: how long the first image of a batch waits for others.
        queue: images that may wait; more are answered with 429.
        timeout_s: how long a body may take to arrive, and a request from then on.
        max_bytes: size of a request's body.
    """
    service = _Service(predictor, max_batch, max_wait_ms, queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.predicting.start()
        service.explaining.start()
        loading = asyncio.create_task(service.start())
        yield
        service.status = "draining"
        await loading
        await service.predicting.close()
        await service.explaining.close()
        service.executor.shutdown()

    # The pages of FastAPI's own documentation load scripts from elsewhere.
    app = FastAPI(title="omniconv", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Measured, service=service)  # type: ignore[arg-type]  # starlette's stub misses keyword arguments
    app.state.service = service
    _handle_errors(app)

    async def compute(request: Request, batcher: Batcher, only_one: bool) -> tuple[list[_Upload], list[Any]]:
        try:
            service.check_accepting(batcher)
        except (HTTPException, QueueFull, Closed):
            await _discard(request)
            raise
        service.reading += 1
        try:
            async with asyncio.timeout(timeout_s):
                uploads = await _uploads(request, max_bytes)
        except TimeoutError:
            request.state.unread = True
            raise HTTPException(408, f"the body did not arrive within {timeout_s:g} s") from None
        finally:
            service.reading -= 1
        if only_one and len(uploads) != 1:
            raise HTTPException(422, f"one image is needed; this request holds {len(uploads)}")
        service.check_accepting(batcher, len(uploads))
        try:
            async with asyncio.timeout(timeout_s):
                return uploads, await batcher.submit(uploads, [upload.pixels for upload in uploads])
        except TimeoutError:
            raise HTTPException(
                504, f"no result within {timeout_s:g} s; try again when there is less to do"
            ) from None

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text("utf-8"), headers=_PAGE_HEADERS)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        """Predict the images of a multipart form, or the one that is the body."""
        uploads, results = await compute(request, service.predicting, False)
        assert service.predictor is not None
        rows = [{"file": upload.name, **result} for upload, result in zip(uploads, results, strict=True)]
        return JSONResponse({"model": service.predictor.name, "predictions": rows})

    @app.post("/explain")
    async def explain(request: Request) -> Response:
        """Return a PNG that shows where in the image the network looked."""
        _, results = await compute(request, service.explaining, True)
        return Response(results[0], media_type="image/png")

    @app.get("/health")
    async def health() -> JSONResponse:
        """Say whether predictions are taken, and of what."""
        known = service.predictor
        about = {"name": known.name, "task": known.task, "classes": known.classes} if known else {}
        code = 200 if service.status == "ready" else 503
        return JSONResponse({"status": service.status, "version": __version__, **about}, code)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Report to Prometheus."""
        text = prometheus_client.generate_latest(service.registry)
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    return app


def _error(
    request: Request, status: int, sentence: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    headers = dict(headers or {})
    if getattr(request.state, "unread", False):
        headers["Connection"] = "close"  # what is left of the body would otherwise be read to its end
    return JSONResponse({"error": sentence}, status, headers)


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with one sentence and never with a traceback."""

    @app.exception_handler(StarletteHTTPException)
    async def known(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        sentence = f"too many requests; try again in {error.retry_after} s"
        return _error(request, 429, sentence, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(Closed)
    async def closed(request: Request, _: Closed) -> JSONResponse:
        return _error(request, 503, "the server is shutting down and takes no new work")

    @app.exception_handler(OmniconvError)
    async def bad_image(request: Request, error: OmniconvError) -> JSONResponse:
        return _error(request, 422, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> JSONResponse:
        return _error(request, 400, "the connection closed before the body was complete")

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error(request, 500, "the prediction failed; see the server's log")


# Reading a request


async def _discard(request: Request) -> None:
    """Read what a client is still sending, for a moment: many look for the answer only when they are through."""
    request.state.unread = True
    if "expect" in request.headers:
        return
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in request.stream():
                pass
        request.state.unread = False
    except (TimeoutError, ClientDisconnect, RuntimeError):
        return


async def _body(request: Request, max_bytes: int) -> bytes:
    """Return the body, counted while it streams in, whether or not its length was announced."""
    too_large = HTTPException(413, f"the body is larger than {max_bytes / 1e6:g} MB")
    declared = request.headers.get("content-length", "")
    chunks: list[bytes] = []
    size = 0
    large = declared.isdigit() and int(declared) > max_bytes
    if not large:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                large = True
                break
            chunks.append(chunk)
    if large:
        chunks.clear()
        await _discard(request)
        raise too_large
    return b"".join(chunks)


def _is_image(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("image/") or kind in ("", "application/octet-stream")


async def _uploads(request: Request, max_bytes: int) -> list[_Upload]:
    """Return the images of a request; 413, 415 or 422 if there is something wrong with them."""
    content_type = request.headers.get("content-type", "")
    multipart = content_type.lower().startswith("multipart/form-data")
    if not multipart and not _is_image(content_type):
        await _discard(request)
        raise HTTPException(
            415, f"{content_type[:100]!r} is no image type; send image/png, say, or multipart/form-data"
        )
    body = await _body(request, max_bytes)
    if multipart:
        parts = await _parts(request, body, max_bytes)
    else:
        parts = [("the image", body)]
    if not parts:
        raise HTTPException(422, "the form holds no file")
    uploads = []
    for name, content in parts:
        header = await asyncio.to_thread(read_header, content, name=name)
        uploads.append(_Upload(name, content, header.width * header.height))
    return uploads


async def _parts(request: Request, body: bytes, max_bytes: int) -> list[tuple[str, bytes]]:
    """Return name and content of every file of a form."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_part_size=max_bytes).parse()  # type: ignore[arg-type]
    except (MultiPartException, KeyError) as error:
        raise HTTPException(422, f"the form is damaged: {getattr(error, 'message', error)}") from None
    parts = []
    try:
        for _, value in form.multi_items():
            if isinstance(value, str):
                continue
            # The name goes into messages and the answer; nothing is ever written under it.
            name = Path(value.filename or "the image").name[:200] or "the image"
            if not _is_image(value.content_type or ""):
                raise HTTPException(415, f"{name} is {value.content_type}, which is no image type")
            parts.append((name, await value.read()))
    finally:
        await form.close()
    return parts


# Running


class _Server(uvicorn.Server):
    """Drains on SIGTERM and SIGINT and then returns, where uvicorn would send itself the signal once more."""

    def __init__(self, config: uvicorn.Config, service: _Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no new work; a second SIGINT does not wait for the old."""
        self.service.status = "draining"
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def serve(
    predictor: Predictor | Callable[[], Predictor],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    on_start: Callable[[str], None] | None = None,
    **limits: Any,
) -> None:
    """Serve a predictor until SIGTERM or SIGINT, then finish what is queued and return.

    Args:
        predictor: see `create_app`.
        host: address to listen on; only this machine can reach the default.
        port: TCP port; 0 takes a free one.
        on_start: called with the address, such as http://127.0.0.1:8000, before the first request.
        **limits: of `create_app`.

    Raises:
        ResourceError: if the address cannot be listened on.
    """
    app = create_app(predictor, **limits)
    service: _Service = app.state.service
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except (OSError, OverflowError) as error:
        raise ResourceError(f"cannot listen on {host}:{port} ({error}); give another host or port") from None
    with listener:
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ResourceError(
                f"cannot listen on {host}:{port} ({reason.lower()}); give another port"
            ) from None
        grace = math.ceil(2 * limits.get("timeout_s", 10)) + 1
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace
        )
        if on_start is not None:
            shown = f"[{host}]" if ":" in host else host
            on_start(f"http://{shown}:{listener.getsockname()[1]}")
        _Server(config, service).run(sockets=[listener])
