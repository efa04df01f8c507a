import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def triton_interpreter():
    """Have Triton's kernels interpreted, by modules that are imported anew and do not outlive the tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in _decorated():
            patch.delitem(sys.modules, name)
            _forget(name)
        _hasten(patch)
        _round_to_nearest(patch)
        yield
        for name in _decorated():
            del sys.modules[name]
            _forget(name)


def _decorated():
    """Return the imported modules that decided at their import whether kernels are compiled or interpreted."""
    return [
        name
        for name in sys.modules
        if (name.partition(".")[0] == "triton" and not name.startswith("triton._C"))
        or name.endswith("._triton_kernels")
    ]


def _forget(name):
    # A package keeps its modules as attributes, too.
    package, _, module = name.rpartition(".")
    if module == "_triton_kernels":
        vars(sys.modules[package]).pop(module, None)


def _hasten(patch):
    """Spare the interpreter half of its work: changing Triton's language for every function, and overflow checks."""
    from triton.runtime import interpreter

    change, changed = interpreter._patch_lang, set()

    def change_once(function):
        if function.__module__ not in changed:
            changed.add(function.__module__)
            change(function)
        return SimpleNamespace(restore=lambda: None)

    patch.setattr(interpreter, "_patch_lang", change_once)
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def _round_to_nearest(patch):
    """Round to bfloat16 as hardware does; the interpreter would do it towards zero."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        data = torch.tensor(data).bfloat16().float().numpy() if target == tl.bfloat16 else data
        return convert(data, source, target, mode)

    patch.setattr(interpreter, "_convert_float", nearest)
