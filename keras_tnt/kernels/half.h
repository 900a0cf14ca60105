// bfloat16 primitives for AVX512-BF16: conversions, the pairwise dot product VDPBF16PS, 2^x and
// GELU. `half` and `Half` mean bfloat16 in this directory, never float16. Operands of
// multiplications are rounded to bfloat16 (8 bits of significand); accumulation is in float32.
#pragma once
#include <immintrin.h>

#include "vectors.h"

namespace {

typedef uint16_t Half __attribute__((may_alias));
// Two adjacent elements along the K dimension, the first in the low 16 bits: the operand layout of
// VDPBF16PS (VNNI layout).
typedef uint32_t Pair __attribute__((may_alias));

// sum += left[0] * right[0] + left[1] * right[1] for the pairs of each lane; `left` is broadcast.
inline Vec dot(Vec sum, Pair left, Vec right) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
}

// Rounds to bfloat16 and stores the first `count` lanes.
template <typename Count>
inline void store_half(Vec x, Half* to, Count count) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  if (count == lanes) return (void)std::memcpy(to, &half, sizeof half);
  std::memcpy(to, &half, count * sizeof *to);
}

// Loads `count` bfloat16 into the low 16 bits of each lane, and zeros after them.
template <typename Count>
inline __m512i load_half(const Half* from, Count count) {
  __m256i half = {};
  std::memcpy(&half, from, count == lanes ? sizeof half : count * sizeof *from);
  return _mm512_cvtepu16_epi32(half);
}

// Rounds two vectors to bfloat16 and interleaves them to one pair per lane.
inline Vec pairs(Vec first, Vec second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Interleaves two rows in memory to pairs; a null second row counts as zeros (odd K).
template <typename Count>
inline Vec pairs_of(const float* first, const float* second, Count count) {
  return pairs(load(first, count), second ? load(second, count) : Vec{});
}

template <typename Count>
inline Vec pairs_of(const Half* first, const Half* second, Count count) {
  const __m512i low = load_half(first, count);
  if (!second) return (Vec)low;
  return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(load_half(second, count), 16));
}

// 2^x to a relative error of 8e-5, which is small next to the spacing of bfloat16, 4e-3: range
// reduction to |f| <= 1/2 and a minimax cubic, fitted by coefficients.py.
inline Vec exp2_half(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0);
  Vec y = f * 0.0551717f + 0.242611f;
  y = y * f + 0.693261f;
  y = y * f + 0.999928f;
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)(x - f));
}

// GELU to an error of 6e-5, absolute or relative to x: x / (1 + 2^-g), where the minimax polynomial
// g = x P(x^2), fitted by coefficients.py, approximates log2(Phi(x) / Phi(-x)).
inline Vec gelu_half(Vec x) {
  const Vec square = (Vec)_mm512_min_ps((__m512)(x * x), _mm512_set1_ps(36.0f));
  const Vec g = (square * -0.00101448f + 0.106777f) * square + 2.30112f;
  return x * (Vec)_mm512_rcp14_ps((__m512)(exp2_half(-x * g) + 1.0f));
}

}  // namespace
