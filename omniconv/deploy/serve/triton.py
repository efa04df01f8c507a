"""A model repository for NVIDIA's Triton Inference Server, made of an exported ONNX file.

Layout and keys: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md. The
server batches requests by itself; as the preprocessing is in the graph, clients send raw pixels.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniconv.core.errors import DataError, UsageError
from omniconv.deploy.runtimes import require

__all__ = ["write_triton_repository"]

_TYPES = {
    "tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64", "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32", "tensor(double)": "TYPE_FP64",
}  # fmt: skip


def write_triton_repository(
    onnx_file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    name: str,
    *,
    classes: Sequence[str] = (),
    max_batch: int = 32,
    delay_us: int = 2000,
) -> Path:
    """Write `folder/name/{config.pbtxt, labels.txt, 1/model.onnx}` and return the model's folder.

    Start a server with `tritonserver --model-repository FOLDER`.

    Args:
        onnx_file: any batch size in front, as `export_model` writes it.
        folder: the repository; other models in it stay.
        name: of the model; letters, digits, `-`, `_` and `.`. One of the same name is replaced.
        classes: names of the outputs, in order.
        max_batch: requests that the server computes together.
        delay_us: microseconds that it waits for others to come.

    Raises:
        UsageError: if the name is no plain name, or a number is not positive.
        DataError: if the file is no ONNX network with a free batch size.
        ResourceError: if onnxruntime is not installed.
    """
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise UsageError(f"a model's name has letters, digits, -, _ and . only: got {name!r}")
    if max_batch < 1 or delay_us < 0:
        raise UsageError(
            f"max_batch must be positive and delay_us not negative: got {max_batch} and {delay_us}"
        )
    runtime: Any = require("onnxruntime", "a Triton model repository", "export")
    try:
        session = runtime.InferenceSession(os.fspath(onnx_file), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no base
        raise DataError(f"{onnx_file} is no ONNX network that ONNX Runtime can run: {error}") from error
    values = {"input": session.get_inputs(), "output": session.get_outputs()}
    for value in (*values["input"], *values["output"]):
        if not value.shape or isinstance(value.shape[0], int):
            raise DataError(f"{onnx_file}: {value.name} has a fixed batch size; export it for any")
    lines = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', f"max_batch_size: {max_batch}"]
    for kind, described in values.items():
        blocks = []
        for value in described:
            dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in value.shape[1:])
            labels = ', label_filename: "labels.txt"' if kind == "output" and classes else ""
            blocks.append(
                f"  {{ name: {json.dumps(value.name)}, data_type: {_TYPES[value.type]}, dims: [ {dims} ]{labels} }}"
            )
        lines += [f"{kind} [", ",\n".join(blocks), "]"]
    lines += [f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}", ""]

    target = Path(folder) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".triton-", dir=target.parent) as temporary:
        made = Path(temporary) / name
        (made / "1").mkdir(parents=True)
        (made / "config.pbtxt").write_text("\n".join(lines), encoding="utf-8")
        if classes:
            (made / "labels.txt").write_text(
                "".join(f"{c.splitlines()[0] if c else c}\n" for c in classes), encoding="utf-8"
            )
        shutil.copyfile(onnx_file, made / "1" / "model.onnx")
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target
