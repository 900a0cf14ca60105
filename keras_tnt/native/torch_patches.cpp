// The functions that torch's operators from words to patches call. No branch of theirs is skipped.
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
