"""The page of what the scripts in benchmarks/ measured last: a function a section, from its results."""

import json
from pathlib import Path


def escape(text: str) -> str:
    """Return text that MyST takes literally."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#+-!|$~:^" else c for c in text)


def _small_images(results: dict[str, dict]) -> list[str]:
    rows = []
    for result in (result for name, result in results.items() if name.startswith("fit_")):
        ours, plain = result["omniconv"], result["plain"]
        low, high = ours["interval"]
        rows.append(
            f"| {result['subject'].removeprefix('fit ')} | {result['budget_seconds'] / 60:g} min "
            f"| **{ours['accuracy']:.1f}%** ({low:.1f} to {high:.1f}) | {ours['network']}, "
            f"{ours['epochs']} epochs in {ours['seconds'] / 60:.1f} min | {plain['accuracy']:.1f}% "
            f"| float32, {plain['epochs']:.1f} epochs in {plain['seconds'] / 60:.1f} min |"
        )
    return [
        "## The main job on small pictures", "",
        "`omniconv fit DATA --time T` against a ResNet-18 with a 3x3 stem in a plain PyTorch loop (SGD with "
        "momentum, one cycle, shifts, mirrored pictures where they help), both for the same minutes on the same "
        "two cores, one after the other; both columns of networks say for how long they really trained. "
        "Test accuracy; the interval is that of the test set's size. "
        "`python benchmarks/fit_small_images.py fashion-mnist 10m` and `... cifar10 15m`.", "",
        "| data | time of each | omniconv | its network | plain ResNet-18 | its training |",
        "| - | - | -: | - | -: | - |", *rows, "",
    ]  # fmt: skip


def _deployed(results: dict[str, dict]) -> list[str]:
    if "deployed_forms" not in results:
        return []
    networks = results["deployed_forms"]["networks"]
    forms = list(dict.fromkeys(form for rows in networks.values() for row in rows.values() for form in row))
    lines = [
        "## Deployed forms", "",
        "How many times as fast as ONNX Runtime in float32 each form answers, preprocessing included; one process, "
        "in turn, medians. Random weights, since time does not depend on them: whether int8 keeps the accuracy is "
        "measured for each trained network when it is made. `python benchmarks/deployed_forms.py`.", "",
        f"| network | pictures | {' | '.join(forms)} |", f"| - | -: |{' -: |' * len(forms)}",
    ]  # fmt: skip
    for name, rows in networks.items():
        for batch, row in rows.items():
            cells = [f"{row['onnxruntime'] / row[form]:.2f}" if form in row else "refused" for form in forms]
            lines.append(f"| {escape(name)} | {batch} | {' | '.join(cells)} |")
    return [*lines, ""]


def _depthwise(results: dict[str, dict]) -> list[str]:
    lines = [
        "## Depthwise convolutions", "",
        "Training step (forward pass and both gradients) of `omniconv.ops.depthwise_conv` against plain PyTorch, each "
        "in the better of its memory formats. Below 1.00 in the fourth column PyTorch is the faster one. Memory is the "
        "most that a step allocates, as a share of PyTorch's. Last column: how many times the floor ours takes, which "
        "is the time of the multiplications by taps that meet the map at the rate of a matrix product here, or of the "
        "maps at the bandwidth of a copy, whichever is longer; maps that stay in the caches can be faster than that. "
        "`python benchmarks/depthwise_conv.py`.", "",
    ]  # fmt: skip
    for name in ("float32", "bfloat16"):
        if (result := results.get(f"depthwise_conv_{name}")) is None:
            continue
        lines += [
            f"### {name}", "", f"Geometric mean over {len(result['rows'])} cases: {result['geometric_mean']:.1f}.", "",
            "| from | maps | kernel | times as fast | implementation | memory | of the floor |",
            "| - | - | - | -: | - | -: | -: |",
        ]  # fmt: skip
        for row in result["rows"]:
            sizes = [" x ".join(map(str, row[name])) for name in ("shape", "kernel")]
            sizes[1] += "".join(f", {name} {row[name]}" for name in ("stride", "dilation") if row[name] > 1)
            ours = min(t for side, t in row["milliseconds"].items() if side.startswith("auto"))
            lines.append(
                f"| {row['network']} | {' | '.join(sizes)} "
                f"| {row['speedup']:.2f} | {row['chosen']} | {row['memory']:.2f} | {ours / row['floor_ms']:.1f} |"
            )
        lines.append("")
    return lines


def _networks(results: dict[str, dict]) -> list[str]:
    lines = [
        "## Whole networks", "",
        "`omniconv.accelerate` against the same network, with the same weights, in plain PyTorch in channels-last: how "
        "many times as fast a training step (forward pass and all gradients) and inference are, and how far outputs "
        "and gradients are apart, relative to their size; beside that, how far rounding puts plain PyTorch's own "
        "gradients from those in float64, for networks of random weights may amplify it. The limit is how many "
        "times as fast the plain network's training step is without its depthwise convolutions of stride 1; what "
        "strided ones gain comes on top. RepLKNet and Conv-TasNet are written out in the script, the others are "
        "timm's or ours. "
        "`python benchmarks/accelerate.py`.", "",
    ]  # fmt: skip
    for name in ("float32", "bfloat16"):
        if (result := results.get(f"accelerate_{name}")) is None:
            continue
        lines += [
            f"### {name}", "",
            "| network | input | training | its limit | inference | outputs differ by | gradients by | rounding |",
            "| - | - | -: | -: | -: | -: | -: | -: |",
        ]  # fmt: skip
        for row in result["rows"]:
            lines.append(
                f"| {row['network']} | {' x '.join(map(str, row['shape']))} | {row['training']:.2f} "
                f"| {row['limit']:.2f} | {row['inference']:.2f} | {row['output_difference']:.0e} "
                f"| {row['gradient_difference']:.0e} | {row['rounding']:.0e} |"
            )
        lines.append("")
    return lines


def _long_conv(results: dict[str, dict]) -> list[str]:
    if (result := results.get("long_conv")) is None:
        return []
    lines = [
        "## Long convolutions", "",
        "`omniconv.ops.long_conv` with causal kernels as long as the sequence against the better of torch's FFTs, "
        "padded to twice the length, and, while its products end within a second, `F.conv1d`. Memory is what a "
        "step adds to the process, in MB, beside that of `torch.fft`. `python benchmarks/long_conv.py`.", "",
        "| samples x channels x length | forward | training step | implementation | memory | of torch.fft |",
        "| - | -: | -: | - | -: | -: |",
    ]  # fmt: skip
    for row in result["rows"]:
        lines.append(
            f"| {' x '.join(map(str, row['shape']))} | {row['forward_speedup']:.2f} | {row['step_speedup']:.2f} "
            f"| {row['chosen']} | {row['peak_mb']['omniconv']:.0f} | {row['peak_mb']['torch.fft']:.0f} |"
        )
    return [*lines, ""]


def _gpu(results: dict[str, dict]) -> list[str]:
    if (result := results.get("gpu")) is None:
        return []
    subjects = {
        "depthwise": (
            "Depthwise convolutions in bfloat16",
            "as fast in training steps of 13 x 13 and 31 x 31 taps, in no more than twice the floor",
        ),
        "long_conv": ("Long convolutions in float32", "as fast"),
        "deform": ("DCNv4's aggregation on the maps of InternImage-T", "as fast a forward pass"),
        "gather_host": ("Rows of a table in host memory", "as fast as the copy from pinned memory"),
    }
    lines = [
        "## On a GPU", "",
        f"{escape(result['device'])}, torch {result['torch']}, Triton {result['triton']}, {result['date']}: how many "
        "times as fast as what stands in the second column an implementation is, by the device's clock and with cold "
        "caches (gathered rows by the host's clock), each in the better of its memory formats. Below 1.00 the other "
        "one is the faster one. Then what the training step of ours takes (of gathered rows, the gather), how many "
        "times the floor that is, the most memory that it allocates as a share of the other's, and how far outputs and "
        "gradients are from those in a wider type. The floor is that of depthwise convolutions above, with the rates "
        "of this device. "
        "`python benchmarks/gpu.py`.", "",
    ]  # fmt: skip
    for subject, (title, goal) in subjects.items():
        lines += [
            f"### {title}", "", f"Wanted: {result['wanted'][subject]} times {goal}.", "",
            "| case | against | forward | training step | ms | of the floor | memory | differ by |",
            "| - | - | -: | -: | -: | -: | -: | -: |",
        ]  # fmt: skip
        for row in result[subject]:
            if "error" in row:
                lines.append(
                    f"| {row['case']} | failed: {escape(' '.join(row['error'].split()))} |" + " |" * 6
                )
                continue
            for side, ratio in row["forward"].items():
                values = (
                    row.get("step", {}).get(side),
                    row.get("times_floor"),
                    row.get("memory", {}).get(side),
                )
                step, floor, memory = ("" if value is None else f"{value:.2f}" for value in values)
                lines.append(
                    f"| {row['case']} | {escape(side)} | {ratio:.2f} | {step} "
                    f"| {row.get('step_best_ms', row['forward_best_ms']):.3g} | {floor} | {memory} "
                    f"| {row['difference'][row['ours']]:.0e} |"
                )
        lines += ["", *sorted({f"{escape(row['note'])}." for row in result[subject] if "note" in row}), ""]
    return lines


def _backbones(results: dict[str, dict]) -> list[str]:
    if (result := results.get("backbones")) is None:
        return []
    lines = [
        "## Backbones", "",
        "One network a family, of about the same multiply-adds, on the same images (224 pixels, but for HaloNet and "
        "the networks of small images), through `omniconv.accelerate`: images a second here, and how many times as "
        "fast as the network beside it in plain PyTorch in channels-last. Below 1.00 plain PyTorch is the faster one. "
        "`python benchmarks/backbones.py`.", "",
        "| network | pixels | parameters | training, images/s | times | inference, images/s | times | against |",
        "| - | -: | -: | -: | -: | -: | -: | - |",
    ]  # fmt: skip
    for row in result["rows"]:
        if "crashed" in row:
            lines.append(f"| {escape(row['network'])} | | | | | | | torch crashed in plain channels-last |")
            continue
        lines.append(
            f"| {escape(row['network'])} | {row['pixels']} | {row['parameters'] / 1e6:.1f} M "
            f"| {row['training a second']:.1f} "
            f"| {row['training']:.2f} | {row['inference a second']:.1f} | {row['inference']:.2f} "
            f"| {row['against']} |"
        )
    return [*lines, ""]


def _structured(results: dict[str, dict]) -> list[str]:
    if (result := results.get("structured_pruning")) is None:
        return []
    lines = [
        "## Half of the channels removed", "",
        "From every family of networks here and from timm's convolutional networks, without a rule for any of them: "
        "each then runs, takes a training step and is exported. What is left of parameters and multiply-adds, how far "
        "the latter are from what was predicted, and how many times as fast a forward pass of one image is in PyTorch. "
        "`python benchmarks/structured_pruning.py`.", "",
        "| network | from | parameters left | multiply-adds left | predicted to | times as fast |",
        "| - | - | -: | -: | -: | -: |",
    ]  # fmt: skip
    for row in result["rows"]:
        lines.append(
            f"| {escape(row['network'])} | {row['from']} | {row['parameters left']:.0%} "
            f"| {row['multiply-adds left']:.0%} | {abs(1 - row['predicted multiply-adds']):.1%} | {row['faster']:.2f} |"
        )
    return [*lines, ""]


def _compression(results: dict[str, dict]) -> list[str]:
    if (result := results.get("compression")) is None:
        return []
    shares = sorted({row["share"] for row in result["pruning"]})
    lines = [
        "## Compression of a trained network", "",
        f"{result['subject']}, public weights, {result['accuracy']:.1f}% of 1,000 official test pictures: accuracy "
        f"right after pruning and after the same {result['epochs']:g} epochs on 20,000 pictures. Sparse methods remove "
        "that share of the weights, structured ones (\"channels\") of the multiply-adds. "
        "`python benchmarks/compression.py`.", "",
        "| method | " + " | ".join(f"-{share:.0%}" for share in shares) + " |",
        "| - |" + " -: |" * len(shares),
    ]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in result["pruning"]):
        cells = [
            f"{row['before']:.1f} → {row['after']:.1f}" if "after" in row else "refused"
            for row in result["pruning"]
            if row["method"] == method
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| quantization | accuracy | bytes | times smaller |", "| - | -: | -: | -: |"]
    for row in result["quantization"]:
        lines.append(f"| {row['method']} | {row['accuracy']:.1f} | {row['bytes']:,} | {row['smaller']:.2f} |")
    return [*lines, ""]


def _split(results: dict[str, dict]) -> list[str]:
    if (result := results.get("split_computing")) is None:
        return []
    lines = [
        "## Split computing", "",
        "Bytes an image on a loopback socket and accuracy, beside JPEG files for the whole network. "
        "`python benchmarks/split_computing.py`.", "",
        "| form | bytes | accuracy |", "| - | -: | -: |",
    ]  # fmt: skip
    for row in result["rows"]:
        lines.append(f"| {escape(row['form'])} | {row['bytes']:.0f} | {row['accuracy']:.1f} |")
    return [*lines, ""]


def benchmark_page() -> str:
    """Return the page of what the scripts in benchmarks/ measured last."""
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))
    }
    one = next(iter(results.values()))
    return "\n".join(
        [
            "# Benchmarks", "",
            "What users would run instead stands beside ours, in one process. Times of CPUs are given as ratios, "
            f"for they tell more about the machine than about the code ({one['threads']} threads of "
            f"{escape(one['machine'])}, torch {one['torch']}).", "",
            *_depthwise(results), *_long_conv(results), *_gpu(results), *_networks(results), *_backbones(results),
            *_small_images(results), *_deployed(results),
            *_compression(results), *_structured(results), *_split(results),
        ]
    )  # fmt: skip
