"""Fits the polynomial coefficients in vectors.h and half.h; `python coefficients.py` prints them.

Exact GELU in float32 (vectors.h): x Phi(x) = max(x, 0) - s Phi(-s) for s = |x|, and Phi(-s) =
e^(-s^2 / 2) R(s). R(s) = erfcx(s / sqrt(2)) / 2, with the scaled complementary error function,
falls slowly from 1/2, asymptotically as 1 / (s sqrt(2 pi)), so R(s) (s + SHIFT) is smooth. It is
interpolated at Chebyshev points, for s from 0 to LARGEST, by a polynomial in u = (s - SHIFT) /
(s + SHIFT). Beyond LARGEST, Phi(-s) underflows in float32. SHIFT is the multiple of 0.05 with the
smallest error when the polynomial is evaluated in float32; the printed error is relative to
Phi(-s), before rounding.

bfloat16 (half.h), minimax polynomials: 2^x for |x| <= 1/2, with relative error; and GELU as
x / (1 + 2^(-x P(x^2))), where x P(x^2) approximates log2(Phi(x) / Phi(-x)). P is fitted for x^2 up
to 36, and constant beyond.
"""

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

DEGREE, SHIFT, LARGEST = 8, 2.9, 14.0


def scaled_tail(s):
    """Returns R(s) = e^(s^2 / 2) Phi(-s)."""
    return np.array([math.exp(x * x / 2) * math.erfc(x / math.sqrt(2)) / 2 for x in s])


def coefficients():
    """Returns the coefficients of u^0 to u^DEGREE for `normal_tail` in vectors.h."""
    last = (LARGEST - SHIFT) / (LARGEST + SHIFT)

    def slow(u):
        s = SHIFT * (1 + u) / (1 - u)
        return scaled_tail(s) * (s + SHIFT)

    return Chebyshev.interpolate(slow, DEGREE, [-1, last]).convert(kind=Polynomial).coef


def largest_error(coefficients):
    """Returns the maximum relative error of Phi(-s) that `coefficients` give, before rounding."""
    s = np.linspace(0, LARGEST, 100_001)
    fitted = Polynomial(coefficients)((s - SHIFT) / (s + SHIFT)) / (s + SHIFT)
    return np.max(np.abs(fitted / scaled_tail(s) - 1))


def least(target, weight, powers):
    """Returns minimax coefficients for a weighted error, by Lawson's algorithm.

    The algorithm is iteratively reweighted least squares: points with large errors gain weight.

    Args:
        target: values to approximate, `(points,)`.
        weight: weights of the error, `(points,)`.
        powers: Vandermonde matrix, `(points, coefficients)`.
    """
    shares = np.full(len(target), 1 / len(target))
    for _ in range(2000):
        rows = np.sqrt(shares) * weight
        found = np.linalg.lstsq(powers * rows[:, None], target * rows, rcond=None)[0]
        shares *= np.abs(weight * (powers @ found - target))
        shares /= shares.sum()
    return found


def powers_of_two():
    """Returns the coefficients of x^0 to x^3 for `exp2_half` in half.h."""
    x = np.linspace(-0.5, 0.5, 501)
    return least(2.0**x, 2.0**-x, np.vander(x, 4, increasing=True))


def phi(x):
    """Returns the standard normal distribution function Phi(x)."""
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])


def log_odds():
    """Returns the coefficients of x^0, x^2 and x^4 for `gelu_half` in half.h.

    They approximate log2(Phi(x) / Phi(-x)) / x; the error that is minimized is that of GELU.
    """
    x = np.linspace(0, 6, 602)[1:]
    odds = np.log2(phi(x) / phi(-x)) / x
    weight = x * x * phi(x) * phi(-x) * math.log(2)
    return least(odds, weight, np.vander(x * x, 3, increasing=True))


if __name__ == "__main__":
    found = coefficients()
    print(*(f"{value:.9g}f" for value in found), sep="\n")
    print(f"largest relative error: {largest_error(found):.1e}")
    for half in (powers_of_two(), log_odds()):
        print(*(f"{value:.6g}f" for value in half), sep="\n")
