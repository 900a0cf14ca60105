// SIMD primitives on one vector register of float32 (`lanes`: 16 with AVX-512, 8 with AVX, else 4):
// loads and stores with a tail count, max, exp, exact (erf-based) GELU with its derivative, and
// in-register transposes. Written with the vector extensions of GCC and Clang instead of
// intrinsics.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

// Vector extensions of GCC and Clang: operators are elementwise, and a scalar operand is broadcast.
typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef int32_t Bits __attribute__((vector_size(4 * lanes)));

// Broadcasts x to all lanes (`set1`).
inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(Vec x, float* to) { std::memcpy(to, &x, sizeof x); }

// Loads the first `count` lanes and fills the tail with zeros.
inline Vec load(const float* from, int64_t count) {
  if (count == lanes) return load(from);
  Vec x = {};
  std::memcpy(&x, from, count * sizeof *from);
  return x;
}

inline void store(Vec x, float* to, int64_t count) {
  if (count == lanes) return store(x, to);
  std::memcpy(to, &x, count * sizeof *to);
}

// Elementwise max; returns y where either is NaN, as MAXPS does.
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// e^x for x <= 0, to 2 ulp, clamped at e^-87. Cody-Waite range reduction: e^x = 2^n e^r with
// |r| <= ln(2) / 2 and ln(2) split into two floats, then the Taylor polynomial of degree 7 for e^r.
inline Vec exp(Vec x) {
  x = larger(all(-87.0f), x);
  const Vec shift = all(12582912.0f);  // Adding and subtracting 1.5 * 2^23 rounds to an integer.
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

// Phi(-s), the lower tail of the standard normal distribution, for s >= 0, to a relative error of
// 5e-8 before rounding: e^(-s^2 / 2) t P(u), with a polynomial P of degree 8 that coefficients.py
// fits.
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

// Exact GELU: x Phi(x) = max(x, 0) - s Phi(-s) with s = |x|.
inline Vec gelu(Vec x) {
  const Vec s = larger(x, -x);
  return larger(x, Vec{}) - s * normal_tail(s);
}

// Returns the derivative of GELU, Phi(x) + x phi(x), and replaces x by GELU(x).
inline Vec gelu_gradient(Vec& x) {
  const Vec value = x, s = larger(value, -value), tail = normal_tail(s);
  x = larger(value, Vec{}) - s * tail;
  return (value > 0.0f ? 1.0f - tail : tail) + value * exp(s * s * -0.5f) * 0.398942280f;
}

// Butterfly step of the transpose: in each group of 2 * `step` lanes, swaps the upper half of a
// with the lower half of b.
template <int step, int... lane>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
  const Vec x = a, y = b;
#ifdef __clang__
  a = __builtin_shufflevector(x, y, (lane & step ? lanes + (lane ^ step) : lane)...);
  b = __builtin_shufflevector(x, y, (lane & step ? lanes + lane : lane ^ step)...);
#else
  a = __builtin_shuffle(x, y, Bits{(lane & step ? lanes + (lane ^ step) : lane)...});
  b = __builtin_shuffle(x, y, Bits{(lane & step ? lanes + lane : lane ^ step)...});
#endif
}

// Transposes a (lanes, lanes) block in registers, in log2(lanes) butterfly steps.
template <int step = lanes / 2>
inline void transpose(Vec (&rows)[lanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
    if (!(i & step))
      exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, lanes>());
  if constexpr (step > 1) transpose<step / 2>(rows);
}

// Blocked transpose: to[j * to_row + i] = from[i * from_row + j] for i < rows, j < columns.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                      int64_t to_row) {
  if (rows < lanes || columns < lanes) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
    return;
  }
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) {
      // The last blocks end with the matrix, and overlap the ones before instead of masking a tail.
      const int64_t top = std::min(i, rows - lanes), left = std::min(j, columns - lanes);
      Vec block[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) block[k] = load(from + (top + k) * from_row + left);
      transpose(block);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store(block[k], to + (left + k) * to_row + top);
    }
}

}  // namespace
