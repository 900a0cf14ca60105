// What kernel.cpp, compiled for each size, offers to xla.cpp, which is compiled once.
#pragma once
#include <cstdint>

// The first two functions are for the patches from `first` to before `last` of `patches`; see
// `transform` in inner_transformer.h and `transform_gradient` in inner_transformer_gradient.h.
// pointers: to the weights, as weights.h has them; sums: of their gradients, `sums_size` numbers, of
// which `add_up` takes `count` rows.
struct Kernel {
  int64_t words, dim, hidden;  // of a patch, a word and the MLP
  int64_t sums_size;
  void (*run)(const float* in, float* out, const float* const* pointers, const float* keep,
              float epsilon, int64_t patches, int64_t first, int64_t last);
  void (*run_gradient)(const float* in, const float* dout, float* din,
                       const float* const* pointers, const float* keep, float* sums,
                       float epsilon, int64_t patches, int64_t first, int64_t last);
  void (*add_up)(const float* rows, int64_t count, float* const* gradients);
};
