// C entry points of the inner (word) transformer block for torch_operator.py (ctypes): words
// (patches, words, dim) to the same shape, and the backward pass. OpenMP with static scheduling
// over patches, on torch.get_num_threads() threads.
#include "inner_forward.h"
#include "inner_transformer_gradient.h"

extern "C" void forward(const float* in, const float* const* pointers, const float* keep, float* out,
                        float*, int64_t patches, float epsilon, int threads) {
  const Forward run{as_weights(pointers), epsilon};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t patch = 0; patch < patches; ++patch)
    run(in, out, patch, patch + 1, keep, patches);
}

// gradients: output tensors for the gradients of the weights. Each thread has a fixed range of
// patches and a row of partial sums, so that results are deterministic for a given number of
// threads.
extern "C" void gradient(const float* in, const float* dout, const float* const* pointers,
                         const float* keep, float*, float* din, float* const* gradients,
                         int64_t patches, float epsilon, int threads) {
  const Weights<> weights = as_weights(pointers);
  const Transposed back(weights);
  Space space;
  float* sums = space.zeros(threads * sums_size);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread)
    transform_gradient(in, dout, din, weights, back, sums_in(sums + thread * sums_size), keep,
                       patches, epsilon, patches * thread / threads,
                       patches * (thread + 1) / threads);
  add_up(sums, threads, gradients);
}
