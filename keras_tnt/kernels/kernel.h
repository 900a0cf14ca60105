// Function table of an inner transformer kernel library: kernel.cpp, compiled for each size,
// defines it, and xla.cpp, compiled once, calls through it.
#pragma once
#include <cstdint>

// `run` (forward) and `run_gradient` (backward) compute patches [first, last) of `patches`, with
// in, out, dout and din (patches, words, dim). pointers: the weights in the order of `Weights` in
// weights.h; keep: drop-path multipliers (2, patches) or null; sums: a row of `sums_size` floats,
// to which the gradients of the weights are added. `add_up` reduces `count` such rows to the
// gradients.
struct Kernel {
  int64_t words, dim, hidden;  // words of a patch, channels of a word, hidden dimension of the MLP
  int64_t sums_size;
  void (*run)(const float* in, float* out, const float* const* pointers, const float* keep,
              float epsilon, int64_t patches, int64_t first, int64_t last);
  void (*run_gradient)(const float* in, const float* dout, float* din,
                       const float* const* pointers, const float* keep, float* sums,
                       float epsilon, int64_t patches, int64_t first, int64_t last);
  void (*add_up)(const float* rows, int64_t count, float* const* gradients);
};
