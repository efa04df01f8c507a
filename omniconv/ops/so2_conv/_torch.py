"""Plain torch: rotate to the edge, one small matrix product for every order, rotate back."""

import torch
from torch import Tensor

from omniconv.ops.dispatch import needs_grad
from omniconv.ops.so2_conv.weights import weight_count, weight_rows
from omniconv.ops.spherical_harmonics import edge_frames, rotate


def orders(degree: int, order: int) -> list[tuple[list[int], list[int]]]:
    """Return for every m the rows of orders m and -m among those of |m| <= order, degree by degree."""
    rows: list[tuple[list[int], list[int]]] = [([], []) for _ in range(order + 1)]
    at = 0
    for n in range(degree + 1):
        most = min(n, order)
        for m in range(most + 1):
            rows[m][0].append(at + most + m)
            rows[m][1].append(at + most - m)
        at += 2 * most + 1
    return rows


def mix(x: Tensor, weight: Tensor, degree: int, order: int) -> Tensor:
    """Convolve coefficients (E, rows of |m| <= order, C) in the frames of their edges."""
    table = weight_rows(degree, order)
    outputs, places = [], []
    for m, (plus, minus) in enumerate(orders(degree, order)):
        degrees = range(m, degree + 1)

        def matrix(sign: int, m: int = m, degrees: range = degrees) -> Tensor:
            rows = [table[k, n][0] + sign * m for n in degrees for k in degrees]
            blocks = weight[rows].reshape(len(degrees), len(degrees), *weight.shape[1:])
            return blocks.permute(0, 3, 1, 2).reshape(
                len(degrees) * x.shape[2], len(degrees) * weight.shape[1]
            )

        shape = (x.shape[0], len(degrees), weight.shape[1])
        if m == 0:
            outputs.append((x[:, plus].flatten(1) @ matrix(1)).reshape(shape))
            places += plus
            continue
        # One product of the orders m and -m side by side with either matrix.
        both = torch.stack([x[:, plus].flatten(1), x[:, minus].flatten(1)], 1)
        same, other = both @ matrix(1), both @ matrix(-1)
        outputs += [(same[:, 0] - other[:, 1]).reshape(shape), (same[:, 1] + other[:, 0]).reshape(shape)]
        places += plus + minus
    back = sorted(range(len(places)), key=places.__getitem__)
    return torch.cat(outputs, 1)[:, back]


def run(x: Tensor, directions: Tensor, weight: Tensor, degree: int, order: int) -> Tensor:
    """Convolve in the frames of the edges."""
    frames = edge_frames(directions, degree)
    # Orders above the highest are dropped as they are rotated.
    frames = [d[:, :, max(0, n - order) : n + min(n, order) + 1] for n, d in enumerate(frames)]
    local = rotate(x, frames)
    return rotate(mix(local, weight, degree, order), frames, back=True)


def supports(x: Tensor, directions: Tensor, weight: Tensor, degree: int, order: int) -> str | None:
    """Return None: every call is supported."""
    return None


def estimate(x: Tensor, directions: Tensor, weight: Tensor, degree: int, order: int) -> float:
    """Return about how many seconds the call takes on a CPU, with its gradients where they are wanted."""
    turned = 2 * x.numel() * (2 * order + 1)
    mixed = 2 * x.shape[0] * weight_count(degree, order) * weight.shape[1] * weight.shape[2]
    seconds = 1e-4 * (degree + order + 1) + (turned + mixed) / 2e10
    return 3 * seconds if needs_grad(x, directions, weight) else seconds
