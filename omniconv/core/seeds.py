"""Randomness as a function of (seed, names), not of what ran before.

Every random decision of a training run draws from a generator derived from the run's seed and the place
where it is needed (epoch, step, purpose). Nothing has to be saved for a resumed run to continue bit for bit.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and every name, the same on every machine and version."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> "torch.Generator":
    """Return a CPU `torch.Generator` seeded with `derive(seed, *names)`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))
