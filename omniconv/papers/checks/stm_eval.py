"""In one network into which every token mixer plugs, convolutions keep their answers under shifts of the image where
window attention changes them, and mixers see as far as their construction says.

The networks of the official sizes have as many parameters whatever the mixer. Trained ones are small: two stages of
two blocks with windows of 4 pixels, on CIFAR-10, without random shifts in training, which would teach every mixer the
same steadiness. Agreement is over shifts by 1, 2 and 4 pixels in four directions.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniconv.inspect.receptive_field import receptive_field
from omniconv.layers.attention.halo import HaloAttention
from omniconv.layers.attention.spatial_reduction import SpatialReductionAttention
from omniconv.layers.attention.window import WindowAttention
from omniconv.layers.conv.dcn import DCNv3
from omniconv.models.factory import create_model
from omniconv.models.image.stm import MIXERS
from omniconv.papers.check import Check
from omniconv.papers.checks.halonet import by_query
from omniconv.papers.mixers import MixerScores, measure_mixer
from omniconv.papers.small import cifar10

SPREAD = 0.1
MIXER_ERROR = 1e-4
MARGIN = 1.0
SEEDS = (0, 1, 2)
IMAGES, TEST_IMAGES, EPOCHS = 4000, 400, 2
COMPARED = ("window", "depthwise", "dcnv3")


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def by_pixel_pairs(layer: WindowAttention, x: Tensor) -> Tensor:
    """Return window attention as attention over the whole map, from which other windows are taken out."""
    height, width = x.shape[2:]
    q, k, v = (
        y.unflatten(1, (layer.num_heads, -1)).flatten(3) for y in (layer.q(x), *layer.kv(x).chunk(2, 1))
    )
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    window = torch.stack(
        [(row - layer.shift) // layer.window_size, (column - layer.shift) // layer.window_size]
    )
    same = (window[:, :, None] == window[:, None]).all(0)
    reach = layer.window_size - 1
    dy, dx = ((place - place[:, None]).clamp(-reach, reach) + reach for place in (row, column))
    logits = q.mT @ k / math.sqrt(q.shape[2]) + layer.bias[..., dy, dx]
    share = logits.masked_fill(~same, -torch.inf).softmax(-1)
    return layer.proj((v @ share.mT).flatten(1, 2).unflatten(2, (height, width)))


def by_patches(layer: SpatialReductionAttention, x: Tensor) -> Tensor:
    """Return spatial-reduction attention with every patch cut out by hand; the sides are whole patches."""
    r = layer.reduction
    patches = [
        layer.norm(F.linear(x[:, :, i : i + r, j : j + r].flatten(1), layer.sr.weight.flatten(1), layer.sr.bias))
        for i in range(0, x.shape[2], r)
        for j in range(0, x.shape[3], r)
    ]  # fmt: skip
    k, v = (y.unflatten(2, (layer.num_heads, -1)) for y in layer.kv(torch.stack(patches, 1)).chunk(2, 2))
    q = layer.q(x.flatten(2).mT).unflatten(2, (layer.num_heads, -1))
    share = (torch.einsum("nigd,njgd->ngij", q, k) / math.sqrt(q.shape[3])).softmax(-1)
    y = torch.einsum("ngij,njgd->nigd", share, v).flatten(2)
    return layer.proj(y).mT.unflatten(2, tuple(x.shape[2:]))


def by_taps(layer: nn.Sequential, x: Tensor) -> Tensor:
    """Return the depthwise mixer as a sum over the taps of its kernel."""
    first, depthwise, last = (conv for conv in layer if isinstance(conv, nn.Conv2d))
    kernel = depthwise.weight.shape[2]
    padded = F.pad(first(x), (kernel // 2,) * 4)
    total = sum(
        padded[:, :, i : i + x.shape[2], j : j + x.shape[3]] * depthwise.weight[:, 0, i, j, None, None]
        for i in range(kernel)
        for j in range(kernel)
    )
    assert depthwise.bias is not None
    return last(total + depthwise.bias[:, None, None])


def by_samples(layer: DCNv3, x: Tensor) -> Tensor:
    """Return DCNv3 as bilinear samples of the image, one tap after another."""
    _, _, height, width = x.shape
    seen = layer.dw_conv(x).permute(0, 2, 3, 1)
    offset = layer.offset(seen).unflatten(3, (layer.groups, -1, 2))
    mask = layer.mask(seen).unflatten(3, (layer.groups, -1)).softmax(-1)
    values = layer.input_proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(layer.groups, 1)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    outputs = []
    for group, value in enumerate(values):
        total = torch.zeros_like(value)
        for tap in range(9):
            # Taps go column by column.
            right = columns + tap // 3 - 1 + offset[..., group, tap, 0]
            down = rows + tap % 3 - 1 + offset[..., group, tap, 1]
            grid = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], -1)
            total = total + mask[..., group, tap][:, None] * F.grid_sample(value, grid, align_corners=False)
        outputs.append(total)
    return layer.output_proj(torch.cat(outputs, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def by_queries(layer: nn.Sequential, x: Tensor) -> Tensor:
    """Return the halo mixer with keys gathered anew for every query."""
    attention, last = layer
    assert isinstance(attention, HaloAttention)
    return last(by_query(attention, x))


REFERENCES = {
    "halo": by_queries,
    "reduction": by_patches,
    "window": by_pixel_pairs,
    "depthwise": by_taps,
    "dcnv3": by_samples,
}


def mixer_error(name: str) -> float:
    """Return the largest relative difference of a mixer's second block from its slow form."""
    torch.manual_seed(0)
    model = create_model("stm_halo_micro", mixer=name, depths=(2,), widths=(32,), window=4).double()
    *_, mixer = (module for key, module in model.named_modules() if key.endswith(".token_mixer"))
    if isinstance(mixer, SpatialReductionAttention):
        mixer = SpatialReductionAttention(32, 2, 4).double()
    for parameter in mixer.parameters():
        # Offsets and biases that start at zero would test nothing.
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 32, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        return error(mixer(x), REFERENCES[name](mixer, x))  # type: ignore[operator]


def bounds(mixer: str, depth: int, unit: tuple[int, int], size: int = 128) -> tuple[int, int, int, int]:
    """Return the support of a unit of a one-stage network: first and last row, first and last column."""
    torch.manual_seed(0)
    model = create_model("stm_halo_micro", mixer=mixer, depths=(depth,), widths=(16,), layer_scale=None)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return receptive_field(model, x, unit).bounds


def pixels(first: int, last: int, size: int = 128) -> tuple[int, int]:
    """Return the first and last pixel that the stem's units from `first` to `last` see."""
    return max(0, 4 * first - 3), min(size - 1, 4 * last + 3)


def wrong_supports() -> dict[str, int]:
    """Return for how many units the support is not the closed form's, by mixer."""
    wrong = {"depthwise": 0, "window": 0, "reduction": 0}
    for row, column in ((16, 16), (13, 20), (3, 31)):
        for depth in (1, 2):
            reach = 3 * depth
            expected = (*pixels(row - reach, row + reach), *pixels(column - reach, column + reach))
            wrong["depthwise"] += bounds("depthwise", depth, (row, column)) != expected
        first = [place // 7 * 7 for place in (row, column)]
        expected = tuple(pixel for place in first for pixel in pixels(place, place + 6))
        wrong["window"] += bounds("window", 1, (row, column)) != expected
        wrong["reduction"] += bounds("reduction", 1, (row, column)) != (0, 127, 0, 127)
    return wrong


def run(check: Check) -> None:
    """Compare sizes, forms and supports of the mixers, and how steady trained networks are."""
    counts = {
        mixer: sum(p.numel() for p in create_model(f"stm_{mixer}_micro", device="meta").parameters())
        for mixer in REFERENCES
    }
    check.require(
        "most over fewest parameters of the five micro networks, less 1",
        max(counts.values()) / min(counts.values()) - 1, "<=", SPREAD,
    )  # fmt: skip
    outside = []
    for mixer in MIXERS:
        state = create_model("stm_halo_micro", mixer=mixer, device="meta").state_dict()
        outside.append({name: value.shape for name, value in state.items() if ".token_mixer." not in name})
    check.require(
        "mixers for which anything outside the modules token_mixer differs",
        sum(shapes != outside[0] for shapes in outside), "==", 0,
    )  # fmt: skip
    for mixer in REFERENCES:
        check.require(
            f"relative difference of {mixer} from its slow form", mixer_error(mixer), "<=", MIXER_ERROR
        )
    for mixer, wrong in wrong_supports().items():
        check.require(f"units whose support is not the closed form's, {mixer}", wrong, "==", 0)

    data = cifar10(IMAGES, TEST_IMAGES)
    scores: dict[str, list[MixerScores]] = {mixer: [] for mixer in REFERENCES}
    for mixer, found in scores.items():
        for seed in SEEDS if mixer in COMPARED else SEEDS[:1]:
            found.append(measure_mixer(mixer, data, epochs=EPOCHS, seed=seed, flip=True))
    steady = {mixer: 100 * sum(s.shift for s in found) / len(found) for mixer, found in scores.items()}
    for mixer in COMPARED[1:]:
        check.require(
            f"answers that shifts leave unchanged, {mixer} minus window attention, mean of {len(SEEDS)} seeds",
            steady[mixer] - steady["window"], ">=", MARGIN, baseline=steady["window"], unit="points",
        )  # fmt: skip
    for mixer, found in scores.items():
        first = found[0]
        check.note(
            f"{mixer}: {first.parameters:,} parameters, {first.macs / 1e6:.2f} M multiply-adds, "
            f"{first.training_rate:,.0f} images/s in training; area of half the field {first.field:.1%}; "
            f"unchanged under shifts {[f'{s.shift:.1%}' for s in found]}, turns {first.rotation:.1%}, "
            f"scales {first.scale:.1%}; accuracy {[f'{s.accuracy:.1%}' for s in found]}"
        )
