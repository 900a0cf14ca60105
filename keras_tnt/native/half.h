// Numbers in bfloat16, on processors with AVX-512's instructions for them: what is multiplied is
// rounded to it, sums are float32's.
#pragma once
#include <immintrin.h>

#include "vectors.h"

namespace {

typedef uint16_t Half __attribute__((may_alias));
// Two numbers that are multiplied and summed in one step; the first in the lower half.
typedef uint32_t Pair __attribute__((may_alias));

inline Vec dot(Vec sum, Pair left, Vec right) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
}

template <typename Count>
inline void store_half(Vec x, Half* to, Count count) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  if (count == lanes) return (void)std::memcpy(to, &half, sizeof half);
  std::memcpy(to, &half, count * sizeof *to);
}

template <typename Count>
inline __m512i load_half(const Half* from, Count count) {
  __m256i half = {};
  std::memcpy(&half, from, count == lanes ? sizeof half : count * sizeof *from);
  return _mm512_cvtepu16_epi32(half);
}

// Pairs of the numbers of two vectors.
inline Vec pairs(Vec first, Vec second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
  return (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The same of two rows in memory, of which there may be one.
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

// 2^x within 8e-5 of its value, and x Phi(x) within 6e-5, or 6e-5 of x, where bfloat16 has steps of
// 4e-3 of a number. Their polynomials coefficients.py, beside this file, derives.
inline Vec exp2_half(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0);
  Vec y = f * 0.0551717f + 0.242611f;
  y = y * f + 0.693261f;
  y = y * f + 0.999928f;
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)(x - f));
}

inline Vec gelu_half(Vec x) {
  const Vec square = (Vec)_mm512_min_ps((__m512)(x * x), _mm512_set1_ps(36.0f));
  const Vec g = (square * -0.00101448f + 0.106777f) * square + 2.30112f;
  return x * (Vec)_mm512_rcp14_ps((__m512)(exp2_half(-x * g) + 1.0f));
}

}  // namespace
