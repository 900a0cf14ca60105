// The function that torch's operator from words to patches in bfloat16 calls.
#include "openmp.h"
#include "patches_half.h"

extern "C" void forward(const float* in, const float* const* weights, const float*, float* out,
                        float*, int64_t images, int64_t tokens, int64_t inputs, int64_t dim,
                        float epsilon, int threads) {
  patches::project({images, tokens, inputs, dim, epsilon}, {share, &threads}, threads, in,
                   as_weights<PatchWeights>(weights), out);
}
