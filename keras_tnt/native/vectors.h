// What is computed on whole vectors of the processor: the largest of two, e^x, GELU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

// GCC's and Clang's vectors: operators work on all lanes, and a number among them on each.
typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t Bits __attribute__((vector_size(4 * lanes)));

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The larger of the two; y where either is NaN.
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// e^x for x <= 0, within 2 units in the last place: e^x = 2^n e^r with |r| <= ln(2) / 2, and
// Taylor's polynomial for e^r.
inline Vec exp(Vec x) {
  x = larger(all(-87.0f), x);
  const Vec shift = all(12582912.0f);  // 1.5 * 2^23: added and taken off, it rounds
  const Vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return (Vec)((Bits)y + ((Bits)shifted << 23));
}

// Phi(-s) for s >= 0, within 5e-8 of its value before rounding: e^(-s^2 / 2) t P(u) with a polynomial
// P that gelu_coefficients.py, beside this file, derives.
inline Vec normal_tail(Vec s) {
  constexpr float shift = 2.9f;
  const Vec t = 1.0f / (s + shift), u = 1.0f - 2.0f * shift * t;
  Vec y = u * -0.000327919197f - 0.000732461668f;
  y = y * u + 0.00174480859f;
  y = y * u + 0.00566905911f;
  y = y * u - 0.0135619316f;
  y = y * u - 0.0345270705f;
  y = y * u + 0.211311281f;
  y = y * u - 0.495965296f;
  y = y * u + 0.725277957f;
  return t * y * exp(s * s * -0.5f);
}

// x Phi(x) = max(x, 0) - s Phi(-s) with s = |x|.
inline Vec gelu(Vec x) {
  const Vec s = larger(x, -x);
  return larger(x, Vec{}) - s * normal_tail(s);
}

// The derivative of GELU, Phi(x) + x phi(x); x itself becomes GELU of x.
inline Vec gelu_gradient(Vec& x) {
  const Vec value = x, s = larger(value, -value), tail = normal_tail(s);
  x = larger(value, Vec{}) - s * tail;
  return (value > 0.0f ? 1.0f - tail : tail) + value * exp(s * s * -0.5f) * 0.398942280f;
}

}  // namespace
