// `Forward`, the function object that every binding calls for the inner (word) transformer block:
// words (patches, words, dim) to the same shape, in float32 or, if HALF, with bfloat16 GEMMs.
//
// Compile-time constants, set by -D: WORDS, DIM, HEADS, HIDDEN, ACROSS_WORDS (see
// inner_transformer.h) and HALF, 0 or 1. Each set of values is compiled to its own library.
#pragma once
#if HALF
#include "inner_half.h"

namespace {
using half::Forward;
}
#else
#include "inner_transformer.h"

namespace {

// Computes patches [first, last) of `in` to `out`, each (patches, words, dim). keep: drop-path
// multipliers (2, patches) of the attention and MLP branches, or null.
struct Forward {
  const Weights<> weights;
  const float epsilon;

  void operator()(const float* in, float* out, int64_t first, int64_t last,
                  const float* keep = nullptr, int64_t patches = 0) const {
    transform(in, out, weights, epsilon, first, last, keep, patches);
  }
};

}  // namespace
#endif
