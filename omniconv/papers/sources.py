"""Where a dotted name is defined, read from the source text: listing 400 papers must not import torch."""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["fingerprint", "locate", "summary_of", "usage_of"]

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ROOT / "papers" / "checks"


def _module_file(parts: list[str]) -> tuple[Path, list[str]]:
    """Return the file of the longest module that `parts` begin with, and the names left over."""
    folder = ROOT
    for index, part in enumerate(parts):
        if (folder / part / "__init__.py").exists():
            folder /= part
        elif (folder / f"{part}.py").exists():
            return folder / f"{part}.py", parts[index + 1 :]
        else:
            return folder / "__init__.py", parts[index:]
    return folder / "__init__.py", []


def locate(dotted: str) -> Path | None:
    """Return the file that defines a name such as `omniconv.layers.attention.se.SqueezeExcite`, or None.

    The name must be that of the place where it is defined: names that a module only imports do not count.
    """
    package, *parts = dotted.split(".")
    if package != "omniconv":
        return None
    file, names = _module_file(parts)
    text = file.read_text(encoding="utf-8")
    for depth, name in enumerate(names):
        indent = r"[ \t]+" if depth else ""
        word = re.escape(name)
        if not re.search(rf"^{indent}(?:(?:class|def|async def) {word}\b|{word}\s*[:=])", text, re.MULTILINE):
            return None
    return file


def fingerprint(check: str, implements: Iterable[str]) -> dict[str, str]:
    """Return a hash of every file that a paper's evidence rests on: its check and what it implements.

    Keys are paths relative to the package. Names and checks that do not exist are left out.
    """
    files = {file for name in implements if (file := locate(name)) is not None}
    if check and (CHECKS / f"{check}.py").exists():
        files.add(CHECKS / f"{check}.py")
    return {
        # Text mode: a checkout with other line ends is the same code.
        file.relative_to(ROOT).as_posix(): hashlib.blake2b(
            file.read_text(encoding="utf-8").encode(), digest_size=8
        ).hexdigest()
        for file in sorted(files)
    }


def _definition(dotted: str) -> tuple[Path, ast.ClassDef | ast.FunctionDef | ast.Module] | None:
    file = locate(dotted)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    name = dotted.rpartition(".")[2]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
    return file, tree


def summary_of(dotted: str) -> str:
    """Return the first sentence of what the docstring of a name says, without markup ("" if nothing)."""
    found = _definition(dotted)
    text = " ".join((ast.get_docstring(found[1]) or "").split("\n\n")[0].split()) if found else ""
    text = re.sub(r"`([^`<]+?)\s*<[^>]*>`_+", r"\1", text)
    return text.replace("`", "")


def _variants(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "VARIANTS" for target in targets):
            keys = [key for child in ast.walk(node) if isinstance(child, ast.Dict) for key in child.keys]
            names = [key.value for key in keys if isinstance(key, ast.Constant)]
            return [name for name in names if isinstance(name, str) and not name.endswith("_test")]
    return []


def usage_of(dotted: str) -> str:
    """Return Python that shows how a name is used: a model by its name, a class or function by its signature.

    Returns "" for a name that does not exist.
    """
    found = _definition(dotted)
    if found is None:
        return ""
    file, node = found
    module, _, name = dotted.rpartition(".")
    if module.startswith("omniconv.models.") and (variants := _variants(file)):
        return f'import omniconv\n\nmodel = omniconv.create_model("{variants[0]}", num_classes=10)'
    lines = f"from {module} import {name}"
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        arguments = inits[0].args if inits else None
    else:
        arguments = node.args if isinstance(node, ast.FunctionDef) else None
    if arguments is not None:
        signature = re.sub(r"^self(, )?", "", ast.unparse(arguments))
        lines += f"\n\n# {name}({signature})"
    return lines
