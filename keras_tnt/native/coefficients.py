"""The coefficients in vectors.h and half.h: `python coefficients.py` prints them.

In vectors.h, GELU:

x Phi(x) = max(x, 0) - s Phi(-s) for s = |x|, and Phi(-s) = e^(-s^2 / 2) R(s), where R, half the
scaled complementary error function of s / sqrt(2), falls slowly, from 1/2 like 1 / (s sqrt(2 pi)).
So R(s) (s + SHIFT) changes little, and is a polynomial of u = (s - SHIFT) / (s + SHIFT), which
interpolates it at Chebyshev's points from s = 0 to LARGEST. Beyond that Phi(-s) is no number of
float32. SHIFT was chosen among multiples of 0.05 for the least error of the polynomial when it is
evaluated in float32; the error printed is relative to Phi(-s), before such rounding.

In half.h, where bfloat16 takes the place of what is computed, polynomials of the least largest
error: 2^x for x from -1/2 to 1/2, relative to it; and GELU as x / (1 + 2^(-x P(x^2))), where
x P(x^2) stands for log2(Phi(x) / Phi(-x)), up to x^2 of 36, behind which P stays as it is.
"""

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

DEGREE, SHIFT, LARGEST = 8, 2.9, 14.0


def scaled_tail(s):
    """R(s) = e^(s^2 / 2) Phi(-s)."""
    return np.array([math.exp(x * x / 2) * math.erfc(x / math.sqrt(2)) / 2 for x in s])


def coefficients():
    """Of u^0, u^1 and so on."""
    last = (LARGEST - SHIFT) / (LARGEST + SHIFT)

    def slow(u):
        s = SHIFT * (1 + u) / (1 - u)
        return scaled_tail(s) * (s + SHIFT)

    return Chebyshev.interpolate(slow, DEGREE, [-1, last]).convert(kind=Polynomial).coef


def largest_error(coefficients):
    s = np.linspace(0, LARGEST, 100_001)
    fitted = Polynomial(coefficients)((s - SHIFT) / (s + SHIFT)) / (s + SHIFT)
    return np.max(np.abs(fitted / scaled_tail(s) - 1))


def least(target, weight, powers):
    """The coefficients of the least largest weighted error, found by Lawson's weights."""
    shares = np.full(len(target), 1 / len(target))
    for _ in range(2000):
        rows = np.sqrt(shares) * weight
        found = np.linalg.lstsq(powers * rows[:, None], target * rows, rcond=None)[0]
        shares *= np.abs(weight * (powers @ found - target))
        shares /= shares.sum()
    return found


def powers_of_two():
    """Of x^0 to x^3, for 2^x."""
    x = np.linspace(-0.5, 0.5, 501)
    return least(2.0**x, 2.0**-x, np.vander(x, 4, increasing=True))


def phi(x):
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])


def log_odds():
    """Of x^0, x^2 and x^4, for log2(Phi(x) / Phi(-x)) / x; the error is that of GELU."""
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
