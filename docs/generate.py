"""Writes the pages of docs/papers, docs/networks, docs/api and docs/benchmarks before a build."""

import importlib
import inspect
import json
import shutil
from pathlib import Path

from benchmark_page import benchmark_page, escape

from omniconv.core.registry import module_names
from omniconv.models.factory import get_variant, list_models
from omniconv.papers.readme import render
from omniconv.papers.records import (
    KINDS,
    STATES,
    Record,
    changed_files,
    load_records,
    load_result,
    state,
    usage,
)
from omniconv.papers.sources import summary_of

KIND_NAMES = {
    "backbone": "Backbones", "compress": "Compression", "data": "Data", "deploy": "Deployment", "design": "Design",
    "inspect": "Inspection", "layer": "Layers", "loss": "Losses", "model": "Models", "op": "Operators",
    "survey": "Surveys", "theory": "Theory", "training": "Training",
}  # fmt: skip
MEANINGS = {
    "works": "The check of its central claim passed.",
    "failed": "It is built; a part of its claim did not hold at the small scale of the check.",
    "built": "It is built; its claim is not measured yet.",
    "open": "Nothing implements it yet.",
}
PACKAGES = {
    "core": "Errors, configuration, files, weights, seeds, registry, cases",
    "ops": "Operators",
    "graphs": "Graph algorithms",
    "data": "Reading, checking, splitting, augmenting and batching data",
    "losses": "Losses",
    "layers": "Layers",
    "models": "Networks",
    "tasks": "Tasks: loss, metrics and predictions",
    "design": "Costs and scaling",
    "learn": "Training methods",
    "compress": "Pruning and other compression",
    "inspect": "Class-activation maps, filters and other views of a network",
    "deploy": "Export, int8, latency, serving",
    "pipeline": "The main job",
    "testing": "The contract suite",
    "papers": "Records, checks and search",
}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _evidence(record: Record) -> list[str]:
    result = load_result(record)
    if result is None:
        return ["None yet.", ""]
    lines = [
        escape(result["claim"]),
        "",
        "| part of the claim | measured | | threshold | baseline | unit | verdict |",
    ]
    lines.append("| - | -: | - | -: | -: | - | - |")
    for part in result["requirements"]:
        cells = [
            escape(part["claim"]), _number(part["measured"]), f"`{part['relation']}`", _number(part["threshold"]),
            _number(part["baseline"]), escape(part["unit"]), "holds" if part["passed"] else "**fails**",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {escape(note)}" for note in result["notes"]), ""]
    lines += [
        f"Measured on {result['date']} in {result['seconds']:.0f} s with {result['threads']} threads of "
        f"{escape(result['machine'])} and torch {result['torch']}. Again, on your machine: "
        f"`omniconv papers check {record.slug}`.",
        "",
    ]
    if changed := changed_files(record):
        lines += [f"Changed since: {', '.join(f'`{name}`' for name in changed)}.", ""]
    return lines


def paper_page(record: Record) -> str:
    """Return a paper's page."""
    where = [f"[arXiv {record.arxiv}]({record.url})"]
    if record.code:
        where.append(f"[official code]({record.code})")
    year = f", {record.year}" if record.year else ""
    lines = [
        # The index links every page; in the sidebar of each of 400 pages, 400 entries would be in the way.
        "---", "orphan: true", "---", "",
        f"# {escape(record.title)}", "",
        f"**{record.number} {escape(record.slug)}**. "
        f"{escape(', '.join(record.authors))}{year}. {', '.join(where)}", "",
        escape(record.summary), "",
        f"**{state(record)}**: {MEANINGS[state(record)]} Kind: {record.kind}. Search terms: "
        f"{escape(', '.join(record.keywords))}.", "",
    ]  # fmt: skip
    if record.claims:
        lines += ["## Published", "", escape(record.claims), ""]
    if state(record) == "open":
        return "\n".join([*lines, f"Its place is `omniconv/{record.home}`.", ""])
    lines += ["## Implemented by", ""]
    lines += [f"- {{py:obj}}`{name}`: {escape(summary_of(name))}" for name in record.implements]
    lines += ["", "## Use", "", "```python", usage(record), "```", "", "## Evidence", "", *_evidence(record)]
    if record.deviations:
        lines += ["## Deviations", "", *(f"- {escape(deviation)}" for deviation in record.deviations), ""]
    return "\n".join(lines)


def _link(record: Record) -> str:
    return f"[{escape(record.title)}]({record.number:03d}_{record.slug}.md)"


def papers_index() -> str:
    """Return the index: counts, and the papers by kind and state."""
    records = load_records()
    lines = [
        "# Papers", "",
        "One page a paper: what it is, what implements it, how to use it, and what its check measured. On the "
        "command line: `omniconv papers search large kernel`, `omniconv papers show convnext`, "
        "`omniconv papers check convnext`.", "",
        *(f"- **{name}**: {MEANINGS[name]}" for name in STATES), "",
        render(), "",
    ]  # fmt: skip
    for kind in KINDS:
        lines += [f"## {KIND_NAMES[kind]}", "", "| no | paper | state | search terms |", "| -: | - | - | - |"]
        those = [record for record in records if record.kind == kind]
        for record in sorted(those, key=lambda record: (STATES.index(state(record)), record.number)):
            words = escape(", ".join(record.keywords))
            lines.append(f"| {record.number} | {_link(record)} | {state(record)} | {words} |")
        lines.append("")
    return "\n".join(lines)


def api_pages() -> dict[str, str]:
    """Return the API reference: an index and a page for each package that holds modules."""
    pages, listed = {}, []
    for package, title in PACKAGES.items():
        modules = [
            name
            for name in module_names(f"omniconv.{package}")
            # A check is read on its paper's page.
            if not name.startswith("omniconv.papers.checks.")
        ]
        if not modules:
            continue
        listed.append(package)
        lines = [f"# omniconv.{package}", "", f"{title}.", ""]
        for name in sorted(modules):
            lines += [
                f"## {escape(name)}",
                "",
                f"```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```",
                "",
            ]
        pages[package] = "\n".join(lines)
    index = [
        "# API reference",
        "",
        "Every public name by package; lower packages never import higher ones.",
        "",
    ]
    pages["index"] = "\n".join([*index, "```{toctree}", ":maxdepth: 1", "", *listed, "```", ""])
    return pages


def networks_page() -> str:
    """Return the catalogue of networks: a table a module, as its docstring introduces it."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        families.setdefault(get_variant(name).model.__module__, []).append(name)
    lines = [
        "# Networks", "",
        f"{len(list_models())} networks by name, `omniconv.create_model(name)`; parameter names are those of "
        "the public weights. Parameters and multiply-adds are the published ones, to which a test holds ours; an empty "
        "cell means that nobody printed a figure. `omniconv models 'convnext*'` lists them on the command line.", "",
    ]  # fmt: skip
    for module, names in sorted(families.items()):
        doc = (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"## {escape(doc.split('.')[0])}", "", f"{{py:mod}}`{module}`. {escape(doc)}", ""]
        lines += ["| name | parameters | multiply-adds | pixels |", "| - | -: | -: | -: |"]
        for name in names:
            row = get_variant(name)
            figures = [
                f"{value / unit:.4g} {sign}" if value else ""
                for value, unit, sign in ((row.params, 1e6, "M"), (row.macs, 1e9, "G"))
            ]
            lines.append(f"| `{name}` | {' | '.join(figures)} | {row.size} |")
        lines.append("")
    return "\n".join(lines)


def parity_page() -> str:
    """Return the page of the networks that were compared with public implementations."""
    table = json.loads((Path(__file__).parent / "parity.json").read_text(encoding="utf-8"))
    lines = [
        "# Parity with public implementations", "",
        f"Every network that timm {table['timm']} has under the same name: random weights that hide no parameter, "
        "loaded strictly by their names, and the largest difference of outputs and of the gradients of the images, "
        "relative to the largest value, in eval and in training mode. In float32 rounding differs where the order of "
        "sums does; halonet_h1 and repvgg_d2se with such weights amplify it to anything, and float64 tells. Networks "
        "of more than 30 million parameters are otherwise compared in eval mode alone. `python tools/parity.py`.", "",
        "| network | parameters | float32: eval | training | gradients | float64: eval | training | gradients |",
        "| - | -: | -: | -: | -: | -: | -: | -: |",
    ]  # fmt: skip
    for name, row in sorted(table["networks"].items()):
        cells = [f"{row[kind]:.0e}" if kind in row else "" for kind in table["columns"]]
        lines.append(f"| {escape(name)} | {row['parameters'] / 1e6:.1f} M | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(docs: Path) -> None:
    """Write all generated pages; a page whose text is unchanged keeps its time, so Sphinx skips it."""
    pages = {f"papers/{r.number:03d}_{r.slug}.md": paper_page(r) for r in load_records()}
    pages["papers/index.md"] = papers_index()
    pages["networks/index.md"] = networks_page()
    pages["benchmarks/index.md"] = benchmark_page()
    pages["benchmarks/parity.md"] = parity_page()
    pages |= {f"api/{name}.md": text for name, text in api_pages().items()}
    for folder in ("papers", "networks", "api", "benchmarks"):
        for old in (docs / folder).glob("*"):
            if f"{folder}/{old.name}" not in pages:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, text in pages.items():
        path = docs / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
