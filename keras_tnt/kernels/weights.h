// Weight structs of the kernels: pointers to float32 tensors, in the order in which every binding
// passes them (`Weights` and `PatchWeights` in __init__.py), and the shapes against which the
// bindings of XLA, ONNX Runtime and OpenVINO check their inputs.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

// Weights of a pre-norm transformer block, or (Number = float) their gradients. gamma and beta of
// the layer norms are (dim, words) for the inner block and (dim,) for the outer one; kernels are
// row-major (inputs, outputs). LayerScale, if any, is folded into the projection and fc2 kernels
// and biases.
template <typename Number = const float>
struct Weights {
  Number *attention_gamma, *attention_beta;
  Number *qkv_kernel, *qkv_bias;  // query, key and value side by side: (dim, 3 dim)
  Number *projection_kernel, *projection_bias;  // (dim, dim)
  Number *mlp_gamma, *mlp_beta;
  Number *fc1_kernel, *fc1_bias;  // (dim, hidden)
  Number *fc2_kernel, *fc2_bias;  // (hidden, dim)
};

// Weights of the word-to-patch projection, LN -> dense -> LN, from the `inputs` = words * word dim
// elements of a patch to `dim`: words_* (inputs,), kernel (inputs, dim), patches_* and bias (dim,).
template <typename Number = const float>
struct PatchWeights {
  Number *words_gamma, *words_beta;
  Number *kernel, *bias;
  Number *patches_gamma, *patches_beta;
};

template <template <typename> typename Which>
constexpr int count_of = sizeof(Which<float>) / sizeof(float*);
constexpr int weight_count = count_of<Weights>;
constexpr int fc1_bias = 9, patch_bias = 3;  // indices in `Weights` and `PatchWeights`

// Expected shape of a weight: (rows, columns), or (columns,) if `rows` is 0.
struct WeightShape {
  int64_t rows, columns;

  size_t rank() const { return rows ? 2 : 1; }
  int64_t size() const { return (rows ? rows : 1) * columns; }

  // Returns whether `dimensions`, an array of length `count`, is this shape.
  template <typename Dimensions>
  bool is(const Dimensions& dimensions, size_t count) const {
    if (count != rank()) return false;
    return int64_t(dimensions[count - 1]) == columns && (!rows || int64_t(dimensions[0]) == rows);
  }
};

// Shapes of `Weights`: of the inner block for `words` > 0, of the outer block for 0.
inline std::array<WeightShape, weight_count> shapes_of_weights(int64_t dim, int64_t hidden,
                                                               int64_t words) {
  const WeightShape norm = words ? WeightShape{dim, words} : WeightShape{0, dim};
  return {{norm, norm, {dim, 3 * dim}, {0, 3 * dim}, {dim, dim}, {0, dim},
           norm, norm, {dim, hidden}, {0, hidden}, {hidden, dim}, {0, dim}}};
}

// Shapes of `PatchWeights`.
inline std::array<WeightShape, count_of<PatchWeights>> shapes_of_patch_weights(int64_t inputs,
                                                                               int64_t dim) {
  return {{{0, inputs}, {0, inputs}, {inputs, dim}, {0, dim}, {0, dim}, {0, dim}}};
}

// Converts the array of pointers that a binding passes to a struct of the same layout.
template <template <typename> typename Which = Weights, typename Number>
inline Which<Number> as_weights(Number* const* pointers) {
  Which<Number> weights;
  std::memcpy(&weights, pointers, sizeof weights);
  return weights;
}

}  // namespace
