// The function that torch's operator calls, on as many threads as torch is told to use.
extern "C" void inner_transformer(const float* in, float* out, const float* const* pointers,
                                  float epsilon, int64_t patches, int threads) {
  const Weights weights = as_weights(pointers);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t patch = 0; patch < patches; ++patch)
    transform(in, out, weights, epsilon, patch, patch + 1);
}
