// The function that torch's operator from words to patches in bfloat16 calls.
#include "openmp.h"
#include "patches_half.h"

extern "C" void forward(const float* in, const float* const* pointers, const float*, float* out,
                        float*, int64_t images, int64_t tokens, int64_t inputs, int64_t dim,
                        float epsilon, int threads) {
  const outer::Parallel parallel = {share, &threads};
  const PatchWeights<> weights = as_weights<PatchWeights>(pointers);
  const patches::HalfKernel kernel(inputs, dim, weights, parallel);
  patches::project({images, tokens, inputs, dim, epsilon}, parallel, threads, in, weights, kernel,
                   out);
}
