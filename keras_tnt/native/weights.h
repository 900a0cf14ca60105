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

// By which all words of a patch, `inputs` numbers, become a patch: scale and offset of the norms
// before and behind the projection, and its kernel (inputs, dim).
template <typename Number = const float>
struct PatchWeights {
  Number *words_gamma, *words_beta;
  Number *kernel, *bias;
  Number *patches_gamma, *patches_beta;
};

template <template <typename> typename Which>
constexpr int count_of = sizeof(Which<float>) / sizeof(float*);
constexpr int weight_count = count_of<Weights>;
constexpr int fc1_bias = 9, patch_bias = 3;  // their places

template <template <typename> typename Which = Weights, typename Number>
inline Which<Number> as_weights(Number* const* pointers) {
  Which<Number> weights;
  std::memcpy(&weights, pointers, sizeof weights);
  return weights;
}

}  // namespace
