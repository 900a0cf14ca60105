// The functions that torch's operators of the inner transformer call, on as many threads as torch is
// told to use.
#include "inner_forward.h"
#include "inner_transformer_gradient.h"

extern "C" void forward(const float* in, const float* const* pointers, const float* keep, float* out,
                        float*, int64_t patches, float epsilon, int threads) {
  const Forward run{as_weights(pointers), epsilon};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t patch = 0; patch < patches; ++patch)
    run(in, out, patch, patch + 1, keep, patches);
}

// gradients: pointers to where the gradients of the weights go. Each thread has its own patches and
// its own sums, so that equal calls give equal gradients.
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
