// Kernel library of the inner (word) transformer block for XLA: words (patches, words, dim) to the
// same shape, and the backward pass. It is compiled for each `InnerSizes` and exports one function
// table, `kernel`, which xla.cpp, the XLA binding that is compiled once, calls by name.
#include "inner_forward.h"
#include "inner_transformer_gradient.h"
#include "kernel.h"

static void run(const float* in, float* out, const float* const* pointers, const float* keep,
                float epsilon, int64_t patches, int64_t first, int64_t last) {
  Forward{as_weights(pointers), epsilon}(in, out, first, last, keep, patches);
}

static void run_gradient(const float* in, const float* dout, float* din,
                         const float* const* pointers, const float* keep, float* sums,
                         float epsilon, int64_t patches, int64_t first, int64_t last) {
  const Weights<> weights = as_weights(pointers);
  transform_gradient(in, dout, din, weights, Transposed(weights),
                     sums_in(sums), keep, patches, epsilon, first, last);
}

extern "C" const Kernel kernel = {words, dim, hidden, sums_size, run, run_gradient, add_up};
