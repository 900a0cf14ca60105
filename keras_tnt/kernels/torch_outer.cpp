// C entry points of the outer (patch) transformer block in float32 for torch_operator.py (ctypes):
// tokens (images, tokens, dim) to the same shape and the saved activations
// (images, tokens, 5 dim + hidden), and the backward pass.
#include "openmp.h"
#include "outer_transformer_gradient.h"

using namespace outer;

extern "C" void forward(const float* in, const float* const* weights, const float* keep, float* out,
                        float* kept, int64_t images, int64_t tokens, int64_t dim, int64_t heads,
                        int64_t hidden, float epsilon, int threads) {
  const Sizes s = {images, tokens, dim, heads, hidden, epsilon};
  transform(s, {share, &threads}, in, as_weights(weights), keep, out, Kept(kept, s));
}

extern "C" void gradient(const float* in, const float* dout, const float* const* weights,
                         const float* keep, const float* kept, float* din, float* const* gradients,
                         int64_t images, int64_t tokens, int64_t dim, int64_t heads, int64_t hidden,
                         float epsilon, int threads) {
  const Sizes s = {images, tokens, dim, heads, hidden, epsilon};
  transform_gradient(s, {share, &threads}, in, dout, as_weights(weights), keep, Kept(kept, s), din,
                     as_weights(gradients));
}
