// The functions that torch's operators of the outer transformer call, on as many threads as torch is
// told to use.
#include "outer_transformer_gradient.h"

using namespace outer;

static void share(void* threads, int64_t parts, void (*part)(void*, int64_t), void* data) {
#pragma omp parallel for schedule(dynamic) num_threads(*static_cast<int*>(threads))
  for (int64_t i = 0; i < parts; ++i) part(data, i);
}

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
