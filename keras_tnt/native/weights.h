// The weights of a transformer.
#pragma once
#include <cstring>

namespace {

// Scale and offset of the norms, (dim, words) of an inner transformer and (dim,) of an outer one;
// kernels (inputs, outputs), those that stand before a residual multiplied by LayerScale where there
// is one, and so their biases. The entries take the weights as pointers in this order, and what their
// gradients go to.
template <typename Number = const float>
struct Weights {
  Number *attention_gamma, *attention_beta;
  Number *qkv_kernel, *qkv_bias;  // of query, key and value: (dim, 3 dim)
  Number *projection_kernel, *projection_bias;
  Number *mlp_gamma, *mlp_beta;
  Number *fc1_kernel, *fc1_bias;  // (dim, hidden)
  Number *fc2_kernel, *fc2_bias;  // (hidden, dim)
};

constexpr int weight_count = sizeof(Weights<>) / sizeof(float*);
constexpr int fc1_bias = 9;  // its place among them

template <typename Number>
inline Weights<Number> as_weights(Number* const* pointers) {
  Weights<Number> weights;
  std::memcpy(&weights, pointers, sizeof weights);
  return weights;
}

}  // namespace
