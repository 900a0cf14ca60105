// The function that torch's operator calls; Inductor compiles it, with OpenMP where there is one.
extern "C" void inner_transformer(const float* in, float* out, const float* const* weights,
                                  float epsilon, int64_t patches) {
#pragma omp parallel for schedule(static)
  for (int64_t patch = 0; patch < patches; ++patch)
    transform(in, out, weights, epsilon, patch, patch + 1);
}
