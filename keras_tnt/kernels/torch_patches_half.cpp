// C entry point of the word-to-patch projection with a bfloat16 GEMM for torch_operator.py
// (ctypes): float32 words (images, tokens, inputs) to (images, tokens, dim), inference only. The
// kernel is packed in each call. The unnamed parameters are `keep` and `kept` of the float32 entry
// point.
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
