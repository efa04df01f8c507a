"""Half of the channels of every family of networks here and of timm's convolutional networks removed, and timed.

    python benchmarks/structured_pruning.py [--only TEXT]

No network has a rule of its own. Each loses half of the units of every group, runs, takes a training step and is
exported; what is left of parameters and multiply-adds is what was predicted, and the time of a forward pass is measured
beside the whole network in one process, in turn, medians. Networks without a weight file: what is removed is arbitrary.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

import omniconv
from omniconv.compress.prune.structured import choose_units, unit_norms
from omniconv.compress.structure.graph import trace_structure
from omniconv.deploy.latency import eager_candidate, measure
from omniconv.design.cost import count_cost

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.backbones import representatives
from tests.parity import import_timm

RESULTS = Path(__file__).parent / "results"
SHAPE = (3, 128, 160)

TIMM = (
    "resnet18 resnet50 resnetv2_50 resnext50_32x4d wide_resnet50_2 seresnet50 ecaresnet26t skresnet18 resnest14d "
    "res2net50_26w_4s densenet121 dla34 dpn68 vgg11_bn inception_v3 inception_v4 xception41 mobilenetv2_100 "
    "mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 tf_efficientnetv2_b0 mixnet_s mnasnet_100 "
    "spnasnet_100 fbnetc_100 ghostnet_100 ghostnetv2_100 hardcorenas_a lcnet_100 tinynet_a rexnet_100 regnetx_008 "
    "regnety_008 regnetz_b16 cspresnet50 darknet53 repvgg_a0 mobileone_s0 convnext_atto convnextv2_atto "
    "inception_next_atto hgnetv2_b0 selecsls42b ese_vovnet19b_dw gernet_s convmixer_768_32 edgenext_xx_small "
    "poolformer_s12 starnet_s1 fasternet_t0 repghostnet_100 mambaout_femto"
).split()


def halve(model: nn.Module) -> dict:
    """Remove half of the units of every group, try everything, and return what came of it."""
    started = time.perf_counter()
    structure = trace_structure(model, SHAPE)
    traced = time.perf_counter() - started
    keep = choose_units(unit_norms(model, structure), 0.5)
    smaller = structure.remove(model, keep)
    before, after = count_cost(model, SHAPE), count_cost(smaller, SHAPE)
    torch.manual_seed(0)
    x = torch.randn(2, *SHAPE)
    smaller.train()(x).square().mean().backward()
    finite = all(bool(torch.isfinite(p.grad).all()) for p in smaller.parameters() if p.grad is not None)
    exported = torch.export.export(smaller.eval(), (x,))
    with torch.no_grad():
        gap = (exported.module()(x) - smaller(x)).abs().max()
    times = measure(
        {"whole": eager_candidate(model.eval(), x[:1]), "half": eager_candidate(smaller, x[:1])}, rounds=15
    )
    return {
        "groups": len(structure.groups),
        "left as they are": len(structure.fixed),
        "parameters left": round(after.parameters / before.parameters, 4),
        "multiply-adds left": round(after.macs / before.macs, 4),
        "predicted parameters": round(structure.parameters(keep) / after.parameters, 4),
        "predicted multiply-adds": round(structure.macs(keep) / after.macs, 4),
        "trains": finite,
        "export differs by": float(gap),
        "faster": round(times["whole"].median / times["half"].median, 3),
        "seconds to trace": round(traced, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="networks with this in their name")
    arguments = parser.parse_args()
    timm = import_timm()
    subjects = [("omniconv", name) for name in representatives(1e9).values()]
    subjects += [("timm", name) for name in TIMM if timm is not None]
    rows = []
    for source, name in subjects:
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        model = omniconv.create_model(name) if source == "omniconv" else timm.create_model(name)
        row = {"network": name, "from": source, **halve(model)}
        rows.append(row)
        print(
            f"{source:9s} {name:32s} weights {row['parameters left']:.2f} operations {row['multiply-adds left']:.2f} "
            f"(predicted to {abs(1 - row['predicted multiply-adds']):.1%})  {row['faster']:.2f} x as fast",
            flush=True,
        )
    faster = [row["faster"] for row in rows]
    print(f"{len(rows)} networks, {math.prod(faster) ** (1 / len(faster)):.2f} x as fast (geometric mean)")
    if not arguments.only:
        result = {
            "subject": f"half of the channels removed, one image of {SHAPE[1]} x {SHAPE[2]}", "rows": rows,
            "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "structured_pruning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
