// C entry point of the outer (patch) transformer block with bfloat16 GEMMs for torch_operator.py
// (ctypes): float32 tokens (images, tokens, dim) to the same shape, inference only. The kernels are
// packed in each call. The unnamed parameters are `keep` and `kept` of the float32 entry point.
#include "openmp.h"
#include "outer_half.h"

extern "C" void forward(const float* in, const float* const* pointers, const float*, float* out,
                        float*, int64_t images, int64_t tokens, int64_t dim, int64_t heads,
                        int64_t hidden, float epsilon, int threads) {
  const outer::Sizes s = {images, tokens, dim, heads, hidden, epsilon};
  const outer::Parallel parallel = {share, &threads};
  const Weights<> weights = as_weights(pointers);
  const outer::HalfKernels kernels(dim, hidden, weights, parallel);
  outer::transform(s, parallel, threads, in, weights, kernels, out);
}
