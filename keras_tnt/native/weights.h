// The weights of a transformer.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
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

// The shape that a weight must have: `rows` 0 is a vector of so many columns.
struct WeightShape {
  int64_t rows, columns;

  size_t rank() const { return rows ? 2 : 1; }
  int64_t size() const { return (rows ? rows : 1) * columns; }

  // Whether these are its dimensions, `count` of them.
  template <typename Dimensions>
  bool is(const Dimensions& dimensions, size_t count) const {
    if (count != rank()) return false;
    return int64_t(dimensions[count - 1]) == columns && (!rows || int64_t(dimensions[0]) == rows);
  }
};

// Of a transformer among `words`, or among tokens if they are 0.
inline std::array<WeightShape, weight_count> shapes_of_weights(int64_t dim, int64_t hidden,
                                                               int64_t words) {
  const WeightShape norm = words ? WeightShape{dim, words} : WeightShape{0, dim};
  return {{norm, norm, {dim, 3 * dim}, {0, 3 * dim}, {dim, dim}, {0, dim},
           norm, norm, {dim, hidden}, {0, hidden}, {hidden, dim}, {0, dim}}};
}

// Of what words become patches by.
inline std::array<WeightShape, count_of<PatchWeights>> shapes_of_patch_weights(int64_t inputs,
                                                                               int64_t dim) {
  return {{{0, inputs}, {0, inputs}, {inputs, dim}, {0, dim}, {0, dim}, {0, dim}}};
}

template <template <typename> typename Which = Weights, typename Number>
inline Which<Number> as_weights(Number* const* pointers) {
  Which<Number> weights;
  std::memcpy(&weights, pointers, sizeof weights);
  return weights;
}

}  // namespace
