// Forward pass of TNT's word-to-patch projection with a bfloat16 GEMM and float32 accumulation and
// norms; inference only, for AVX512-BF16.
//
//   words (images, tokens, inputs) -> (images, tokens, dim): LN(dense(LN(x)))
//
// optionally with the residual that follows in TNT, the sum with the tokens of the outer
// transformer, (images, prefix + tokens, dim). `inputs` = words * word dim must be even. The kernel
// is packed once to bfloat16 B panels; row ranges are the parallel tasks, and stay in the cache
// between the norms.
#pragma once
#include "outer_half.h"
#include "patches.h"

namespace patches {
namespace {

// The dense kernel as packed bfloat16 B panels.
struct HalfKernel {
  Space space;
  HalfPanels panels;

  HalfKernel(int64_t inputs, int64_t dim, const PatchWeights<>& w, Parallel parallel)
      : panels(space, inputs, dim) {
    pack({panels}, {w.kernel}, parallel);
  }
};

// Computes `in` (images, tokens, inputs) to `out`, (images, tokens, dim). If `tokens`
// (images, prefix + tokens, dim) is given, the result is added to it, except for the first `prefix`
// (class) tokens, which are copied; `out` then has the shape of `tokens`.
inline void project(const Sizes& s, Parallel parallel, int64_t threads, const float* in,
                    const PatchWeights<>& w, const HalfKernel& kernel, float* out,
                    const float* tokens = nullptr, int64_t prefix = 0) {
  const int64_t n = s.images * s.tokens, d = s.dim;
  const int64_t parts = round_up(parts_of(n, outer::half_rows), threads);
  parallel(parts, [&](int64_t i) {
    outer::part_of(n, parts, i, [&](int64_t first, int64_t rows) {
      Space space;
      Half* normed = take_half(space, rows * s.inputs);
      float* projected = space.take(rows * d);
      outer::layer_norm(in + first * s.inputs, rows, s.inputs, w.words_gamma, w.words_beta,
                        s.epsilon, normed);
      half_product(
          normed, s.inputs, kernel.panels, rows,
          [=](int64_t i, int64_t j) { for_writing(projected + i * d + j); },
          [=](int64_t i, int64_t j, Vec x, auto n) {
            store(x + load(w.bias + j, n), projected + i * d + j, n);
          });
      float* patches = tokens ? projected : out + first * d;
      outer::layer_norm(projected, rows, d, w.patches_gamma, w.patches_beta, s.epsilon, patches);
      for (int64_t i = first; tokens && i < first + rows; ++i) {
        const int64_t image = i / s.tokens, at = (i + (image + 1) * prefix) * d;
        if (i % s.tokens == 0) std::copy_n(tokens + at - prefix * d, prefix * d, out + at - prefix * d);
        outer::add(tokens + at, patches + (i - first) * d, 1.0f, d, out + at);
      }
    });
  });
}

}  // namespace
}  // namespace patches
