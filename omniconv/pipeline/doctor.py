"""What this machine has, for bug reports and for those who wonder why something is slow."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

from omniconv.core.version import __version__

__all__ = ["examine"]

_OPTIONAL = {
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "fast": ("numba",),
    "openvino": ("openvino",),
    "serve": ("fastapi", "uvicorn", "multipart", "prometheus_client"),
    "tables": ("pandas", "pyarrow"),
}


def _version(module: str) -> str:
    """Return a package and its version; packages are named with hyphens where modules have underscores."""
    name = {"multipart": "python-multipart"}.get(module, module.replace("_", "-"))
    return f"{name} {importlib.metadata.version(name)}"


def examine() -> dict[str, dict[str, Any]]:
    """Return versions, processor, memory, accelerators and optional packages; nothing is measured or sent."""
    import torch

    cpu: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads used by torch": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "yes" if torch.cpu._is_avx512_bf16_supported() else "emulated",
        "int8 dot products (VNNI)": "yes" if torch.cpu._is_vnni_supported() else "no",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        cpu["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    cpu["free disk here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    gpus = {
        f"cuda:{i}": f"{p.name}, {p.total_memory / 2**30:.0f} GiB"
        for i, p in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    }
    extras = {}
    for extra, packages in _OPTIONAL.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        extras[extra] = (
            f"missing; install with: pip install 'omniconv[{extra}]'"
            if missing
            else ", ".join(map(_version, packages))
        )
    return {
        "versions": {
            "omniconv": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "system": platform.platform(),
        },
        "processor": cpu,
        "accelerators": gpus or {"none": "training runs on the processor"},
        "extras": extras,
    }
