"""Logarithms of modified Bessel functions come out with thirteen digits, never over- or underflow, and take a thirtieth
of SciPy's time.

Orders go to 1e5 and arguments from 1e-8 to 1e8; errors are relative, and absolute where the logarithm is below 1. The
truth is mpmath with 50 digits: its own functions where v^2 + x^2 < 60^2, and beyond, where these do not converge, the
contour integrals through the saddle point, which the trapezoidal rule sums exactly.
"""

import math
import statistics
import time
from typing import Any

import mpmath
import numpy as np
import scipy.special
import torch
from mpmath import mpf
from torch.nn import functional as F

from omniconv.ops.log_bessel.iv import log_iv
from omniconv.ops.log_bessel.kv import log_kv
from omniconv.ops.von_mises_fisher import fit_vmf, sample_vmf
from omniconv.papers.check import Check

ERROR = 1e-13
GRADIENT_ERROR = 1e-8
SPEED = 30.0
SPEED_OF_MPMATH = 20.0
KAPPA_ERROR = 0.02
POINTS, GRADIENT_POINTS, TIMED = 400, 60, 200_000
SADDLE = 60
ROUNDS = 9
OPS = {"I": (log_iv, mpmath.besseli, scipy.special.ive), "K": (log_kv, mpmath.besselk, scipy.special.kve)}


def saddle(name: str, v: Any, x: Any) -> tuple[Any, Any, Any]:
    """Return the logarithm and its derivatives by v and x from the integral of e^(x cosh t - v t) through its saddle.

    For I the path runs from t0 - i pi to t0 + i pi (what lies beyond is smaller by e^(-2 s)), for K, with the other
    sign, along the real line.
    """
    s, t0 = mpmath.sqrt(v * v + x * x), mpmath.asinh(v / x)
    width = 1 / (8 * mpmath.sqrt(s))
    total, by_v, by_x = (mpmath.mpc(0) for _ in range(3))
    for j in range(-200, 201):
        u = j * width
        if name == "I":
            if abs(u) > mpmath.pi:
                continue
            height = mpmath.mpc(s * (mpmath.cos(u) - 1), v * (mpmath.sin(u) - u))
            t = mpmath.mpc(t0, u)
        else:
            height, t = -s * (mpmath.cosh(u) - 1) - v * (mpmath.sinh(u) - u), t0 + u
        if mpmath.re(height) < -130:
            continue
        weight = mpmath.exp(height)
        total += weight
        by_v += weight * t
        by_x += weight * mpmath.cosh(t)
    sign = 1 if name == "I" else -1
    log = sign * (s - v * t0) + mpmath.log(total.real * width / (2 * mpmath.pi if name == "I" else 2))
    return log, -sign * by_v.real / total.real, sign * by_x.real / total.real


def truth(name: str, order: float, argument: float) -> Any:
    """Return the logarithm with 50 digits."""
    v, x = mpf(order), mpf(argument)
    if math.hypot(order, argument) >= SADDLE:
        return saddle(name, v, x)[0]
    return mpmath.log(OPS[name][1](v, x))


def true_gradient(name: str, order: float, argument: float) -> tuple[Any, Any]:
    """Return the derivatives by order and argument."""
    v, x = mpf(order), mpf(argument)
    if math.hypot(order, argument) >= SADDLE:
        return saddle(name, v, x)[1:]
    bessel = OPS[name][1]
    step = mpf(10) ** -15
    by_v = (mpmath.log(bessel(v + step, x)) - mpmath.log(bessel(v - step, x))) / (2 * step)
    following = bessel(v + 1, x) / bessel(v, x)
    return by_v, v / x + (following if name == "I" else -following)


def points(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return orders from 1e-3 to 1e5 and arguments from 1e-8 to 1e8, log-uniform."""
    random = np.random.default_rng(seed)
    return 10 ** random.uniform(-3, 5, count), 10 ** random.uniform(-8, 8, count)


def hard_points(name: str, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return points where the logarithm passes through zero, where large terms cancel, orders 0.5 to 1e5."""
    orders, arguments = np.geomspace(0.5, 1e5, count), []
    op = OPS[name][0]
    for order in orders:
        # Both logarithms are monotonic in x.
        low, high = 1e-8, 1e6
        for _ in range(60):
            middle = math.sqrt(low * high)
            value = float(op(float(order), torch.tensor(middle, dtype=torch.float64)))
            low, high = (low, middle) if (value > 0) == (name == "I") else (middle, high)
        arguments.append(low)
    return orders, np.array(arguments)


def worst_error(name: str, v: np.ndarray, x: np.ndarray) -> float:
    """Return the largest error over max(1, |log|)."""
    got = OPS[name][0](torch.from_numpy(v), torch.from_numpy(x))
    errors = []
    for order, argument, value in zip(v, x, got.tolist(), strict=True):
        wanted = truth(name, order, argument)
        errors.append(float(abs(value - wanted) / max(1, abs(wanted))))
    return max(errors)


def worst_gradient_error(name: str) -> tuple[float, float]:
    """Return the largest relative errors of the derivatives by order and argument."""
    v, x = (torch.from_numpy(t).requires_grad_() for t in points(GRADIENT_POINTS, 1))
    gradients = torch.autograd.grad(OPS[name][0](v, x).sum(), [v, x])
    worst = [0.0, 0.0]
    for index, (order, argument) in enumerate(zip(v.tolist(), x.tolist(), strict=True)):
        for axis, wanted in enumerate(true_gradient(name, order, argument)):
            error = abs(float(gradients[axis][index]) - wanted) / abs(wanted)
            worst[axis] = max(worst[axis], float(error))
    return worst[0], worst[1]


def speed(name: str) -> tuple[float, float, float]:
    """Return SciPy's time over ours where SciPy is finite, median of the rounds, and both in nanoseconds an element."""
    op, _, scaled = OPS[name]
    v, x = points(TIMED, 2)
    with np.errstate(all="ignore"):
        finite = np.isfinite(np.log(scaled(v, x)))
        v, x = v[finite], x[finite]
        tv, tx = torch.from_numpy(v), torch.from_numpy(x)
        op(tv, tx)
        theirs, ours = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            np.log(scaled(v, x))
            middle = time.perf_counter()
            op(tv, tx)
            ours.append(time.perf_counter() - middle)
            theirs.append(middle - start)
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return ratio, 1e9 * statistics.median(theirs) / len(v), 1e9 * statistics.median(ours) / len(v)


def mpmath_seconds(name: str, count: int = 20) -> float:
    """Return mpmath's seconds an element, with 15 digits, where its functions converge."""
    random = np.random.default_rng(3)
    v, x = 10 ** random.uniform(-3, 1.5, count), 10 ** random.uniform(-8, 1.5, count)
    with mpmath.workdps(15):
        start = time.perf_counter()
        for order, argument in zip(v, x, strict=True):
            mpmath.log(OPS[name][1](order, argument))
        return (time.perf_counter() - start) / count


def run(check: Check) -> None:
    """Measure errors, derivatives, finiteness, speed, and the fit of von Mises-Fisher distributions."""
    mpmath.mp.dps = 50
    for name, (op, _, scaled) in OPS.items():
        v, x = points(POINTS, 0)
        v[:10] = 0
        check.require(f"error of log {name} on {POINTS} points", worst_error(name, v, x), "<=", ERROR)
        hard = worst_error(name, *hard_points(name))
        check.require(f"error of log {name} where it passes through zero", hard, "<=", ERROR)
        by_v, by_x = worst_gradient_error(name)
        check.require(f"relative error of log {name}'s derivative by x", by_x, "<=", GRADIENT_ERROR)
        check.require(f"relative error of log {name}'s derivative by v", by_v, "<=", GRADIENT_ERROR)

        v, x = points(TIMED, 4)
        leaves = [torch.from_numpy(t).requires_grad_() for t in (v, x)]
        y = op(*leaves)
        everything = torch.cat([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
        bad = int((~torch.isfinite(everything)).sum())
        check.require(f"numbers not finite among log {name} and its derivatives", bad, "==", 0)
        with np.errstate(all="ignore"):
            lost = int((~np.isfinite(np.log(scaled(v, x)))).sum())
        check.require(
            f"elements of {TIMED} where SciPy's scaled {name} gives no finite logarithm", lost, ">", 0
        )

        ratio, theirs, ours = speed(name)
        check.require(
            f"SciPy's time over log {name}'s where SciPy is finite", ratio, ">=", SPEED, unit="times"
        )
        check.note(
            f"log {name}: SciPy {theirs:.1f} ns an element, here {ours:.1f}, {torch.get_num_threads()} threads"
        )
        times = 1e9 * mpmath_seconds(name) / ours
        check.require(f"mpmath's time over log {name}'s", times, ">=", SPEED_OF_MPMATH, unit="times")

    for dim, count in ((2048, 2000), (8192, 500), (32768, 200)):
        torch.manual_seed(dim)
        mean = F.normalize(torch.randn(dim, dtype=torch.float64), dim=0)
        _, kappa = fit_vmf(sample_vmf(mean, float(dim), count))
        error = abs(float(kappa) / dim - 1)
        check.require(f"relative error of kappa fitted in {dim} dimensions", error, "<=", KAPPA_ERROR)
