"""Logarithm of the modified Bessel function of the second kind, by whichever implementation is fastest where it runs.

Paper: Plesner et al., Accurate Computation of the Logarithm of Modified Bessel Functions on GPUs,
https://arxiv.org/abs/2409.08729. The formulas and their regions, which are not quite the paper's, are in `_formulas`.
"""

from torch import Tensor

from omniconv.ops.log_bessel._call import table

__all__ = ["log_kv"]


def log_kv(v: Tensor | float, x: Tensor, *, impl: str = "auto") -> Tensor:
    r"""Logarithm of the modified Bessel function of the second kind, after `Plesner et al.
    <https://arxiv.org/abs/2409.08729>`_, which neither over- nor underflows.

    .. math:: \log K_v(x), \qquad K_v(x) = \int_0^\infty e^{-x \cosh t} \cosh(v t)\, dt

    It is computed in float64 whatever the inputs' type. For orders to 1e5 and arguments from 1e-8 to 1e8 its error is
    below 1e-13 of its value, or of 1 near its zeros; derivatives by order and argument are as good.

    Args:
        v: order, not negative.
        x: argument, positive. Where either is out of its domain, the result is NaN.
        impl: which implementation; "auto" takes the fastest, see `omniconv.ops.explain`.

    Shapes:
        - v and x: any that broadcast
        - output: theirs

    Raises:
        ValueError: if the shapes do not broadcast, a type is not real, or `impl` cannot take the call.
    """
    call = TABLE.prepare(v, x)
    return TABLE.select(impl, call).run(*call)


TABLE = table("log_kv", second=True)
