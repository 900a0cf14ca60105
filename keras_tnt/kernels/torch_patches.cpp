// C entry points of the word-to-patch projection in float32 for torch_operator.py (ctypes): words
// (images, tokens, inputs) to (images, tokens, dim) and the saved dense output of the same shape,
// and the backward pass. There is no drop path; the `keep` argument is unused.
#include "openmp.h"
#include "patches.h"

using namespace patches;

extern "C" void forward(const float* in, const float* const* weights, const float*, float* out,
                        float* kept, int64_t images, int64_t tokens, int64_t inputs, int64_t dim,
                        float epsilon, int threads) {
  project({images, tokens, inputs, dim, epsilon}, {share, &threads}, in,
          as_weights<PatchWeights>(weights), out, kept);
}

extern "C" void gradient(const float* in, const float* dout, const float* const* weights,
                         const float*, const float* kept, float* din, float* const* gradients,
                         int64_t images, int64_t tokens, int64_t inputs, int64_t dim, float epsilon,
                         int threads) {
  project_gradient({images, tokens, inputs, dim, epsilon}, {share, &threads}, in, dout,
                   as_weights<PatchWeights>(weights), kept, din,
                   as_weights<PatchWeights>(gradients));
}
