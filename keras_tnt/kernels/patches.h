// Forward and backward pass of TNT's word-to-patch projection in float32, for training:
//
//   words (images, tokens, inputs) -> (images, tokens, dim): LN(dense(LN(x)))
//
// where `tokens` are patches, and `inputs` = words * word dim are the concatenated words of a
// patch. Row blocks are the parallel tasks: layer norms and a cache-blocked GEMM, whose B panels
// are packed once, run while the rows are in the cache. The output of the dense layer is saved for
// the backward pass, which recomputes the norms. Results do not depend on the number of threads.
#pragma once
#include "outer_transformer_gradient.h"

namespace patches {
namespace {

using outer::Block;
using outer::Parallel;

struct Sizes {
  int64_t images, tokens, inputs, dim;
  float epsilon;

  // The same sizes for the helpers that the outer transformer block shares: row blocks,
  // DenseGradient.
  outer::Sizes outer() const { return {images, tokens, dim, 1, inputs, epsilon}; }
};

// Computes `in` (images, tokens, inputs) to `out` and the saved dense output `kept`, each
// (images, tokens, dim).
inline void project(const Sizes& s, Parallel parallel, const float* in, const PatchWeights<>& w,
                    float* out, float* kept) {
  Space space;
  const Panels kernel = {space.take(Panels::size(s.inputs, s.dim)), s.inputs, s.dim};
  parallel(kernel.count(),
           [&](int64_t panel) { kernel.pack({w.kernel, s.dim, 1}, s.dim, panel); });
  parallel(Block::count(s.outer()), [&](int64_t number) {
    const Block block(s.outer(), number);
    Space own;
    float *normed = own.take(block.rows * s.inputs), *projected = kept + block.first * s.dim;
    outer::layer_norm(in + block.first * s.inputs, block.rows, s.inputs, w.words_gamma,
                      w.words_beta, s.epsilon, normed);
    product({normed, s.inputs, 1}, kernel, block.rows, {w.bias, 0}, projected, s.dim);
    outer::layer_norm(projected, block.rows, s.dim, w.patches_gamma, w.patches_beta, s.epsilon,
                      out + block.first * s.dim);
  });
}

// Backward pass: writes din (images, tokens, inputs) and the gradients of the weights `sums`, given
// dout (images, tokens, dim).
inline void project_gradient(const Sizes& s, Parallel parallel, const float* in, const float* dout,
                             const PatchWeights<>& w, const float* kept, float* din,
                             const PatchWeights<float>& sums) {
  const int64_t n = s.images * s.tokens, blocks = Block::count(s.outer());
  Space space;
  const Panels kernel = {space.take(Panels::size(s.dim, s.inputs)), s.dim, s.inputs};
  const Matrix transposed = Matrix{w.kernel, s.dim, 1}.transposed();
  parallel(kernel.count(), [&](int64_t panel) { kernel.pack(transposed, s.inputs, panel); });
  float *normed = space.take(n * s.inputs), *dprojected = space.take(n * s.dim);
  const float* zeros = space.zeros(s.inputs);
  outer::NormSums words(blocks, s.inputs, space), patches(blocks, s.dim, space);

  parallel(blocks, [&](int64_t number) {
    const Block block(s.outer(), number);
    const int64_t at = block.first * s.dim, words_at = block.first * s.inputs;
    Space own;
    float* dnormed = own.take(block.rows * s.inputs);
    float* result = own.take(block.rows * s.dim);
    std::fill_n(dprojected + at, block.rows * s.dim, 0.0f);
    outer::layer_norm_gradient(kept + at, dout + at, block.rows, s.dim, w.patches_gamma,
                               w.patches_beta, s.epsilon, result, dprojected + at,
                               patches.gamma(number), patches.beta(number));
    product({dprojected + at, s.dim, 1}, kernel, block.rows, {zeros, 0}, dnormed, s.inputs);
    std::fill_n(din + words_at, block.rows * s.inputs, 0.0f);
    outer::layer_norm_gradient(in + words_at, dnormed, block.rows, s.inputs, w.words_gamma,
                               w.words_beta, s.epsilon, normed + words_at, din + words_at,
                               words.gamma(number), words.beta(number));
  });

  words.add_up(sums.words_gamma, sums.words_beta);
  patches.add_up(sums.patches_gamma, sums.patches_beta);
  // This layer is the only work of its phase, so its tiles are smaller, to occupy all threads.
  const outer::DenseGradient layer = {normed,      dprojected, s.inputs,      s.dim, 0,
                                      sums.kernel, sums.bias,  7 * tile_rows};
  parallel(layer.parts(),
           [&](int64_t part) { layer.compute(s.outer(), {nullptr, s.images}, part); });
}

}  // namespace
}  // namespace patches
