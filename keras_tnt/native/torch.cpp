// The functions that torch's operators call, on as many threads as torch is told to use.
#include "inner_transformer_gradient.h"

extern "C" void inner_transformer(const float* in, float* out, const float* const* pointers,
                                  const float* keep, float epsilon, int64_t patches, int threads) {
  const Weights weights = as_weights(pointers);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t patch = 0; patch < patches; ++patch)
    transform(in, out, weights, epsilon, patch, patch + 1, keep, patches);
}

// sums: (threads, numbers of all weights), of which the first row becomes the gradients. Each thread
// has its own patches and its own row, so that equal calls give equal sums.
extern "C" void inner_transformer_gradient(const float* in, const float* dout, float* din,
                                           const float* const* pointers, const float* keep,
                                           float* sums, float epsilon, int64_t patches,
                                           int threads) {
  const Weights weights = as_weights(pointers);
  const Transposed back(weights);
  auto rows = reinterpret_cast<Gradients*>(sums);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread)
    transform_gradient(in, dout, din, weights, back, rows[thread], keep, patches, epsilon,
                       patches * thread / threads, patches * (thread + 1) / threads);
  for (int thread = 1; thread < threads; ++thread)
    for (int i = 0; i < gradient_count; ++i) sums[i] += sums[thread * gradient_count + i];
}
