// The inner transformer's forward pass as the entries call it. HALF is defined before this text, as
// what inner_transformer.h names: whether to multiply in bfloat16.
#pragma once
#if HALF
#include "inner_half.h"

namespace {
using half::Forward;
}
#else
#include "inner_transformer.h"

namespace {

// Patches from `first` to before `last` of `in` to those of `out`; see `transform` for the others.
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
