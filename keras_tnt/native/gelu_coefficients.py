"""The coefficients of GELU in vectors.h: `python gelu_coefficients.py` prints them.

x Phi(x) = max(x, 0) - s Phi(-s) for s = |x|, and Phi(-s) = e^(-s^2 / 2) R(s), where R, half the
scaled complementary error function of s / sqrt(2), falls slowly, from 1/2 like 1 / (s sqrt(2 pi)).
So R(s) (s + SHIFT) changes little, and is a polynomial of u = (s - SHIFT) / (s + SHIFT), which
interpolates it at Chebyshev's points from s = 0 to LARGEST. Beyond that Phi(-s) is no number of
float32. SHIFT was chosen among multiples of 0.05 for the least error of the polynomial when it is
evaluated in float32; the error printed is relative to Phi(-s), before such rounding.
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


if __name__ == "__main__":
    found = coefficients()
    print(*(f"{value:.9g}f" for value in found), sep="\n")
    print(f"largest relative error: {largest_error(found):.1e}")
