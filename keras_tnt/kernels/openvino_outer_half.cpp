// OpenVINO extension with the operation `OuterTransformer`, the outer (patch) transformer block
// with bfloat16 GEMMs: tokens (batch, tokens, dim) and the 12 tensors of `Weights` to tokens of the
// same shape. Attributes: epsilon and heads. The kernels are constants, packed at the first call.
#include "openvino.h"
#include "outer_half.h"

class OuterTransformer : public Operation<OuterTransformer> {
 public:
  OPENVINO_OP("OuterTransformer", DOMAIN);
  static constexpr const char* attribute = "heads";

  static constexpr size_t weights = weight_count;

  size_t rank() const override { return 3; }

  std::vector<WeightShape> expected(const std::vector<ov::Shape>& shapes) const override {
    const auto found = shapes_of_weights(shapes[0][2], shapes[1 + fc1_bias][0], 0);
    return {found.begin(), found.end()};
  }

  void check(const std::vector<ov::Shape>& shapes) const override {
    const int64_t dim = shapes[0][2], hidden = shapes[1 + fc1_bias][0];
    REQUIRE(number > 0 && dim % number == 0, "heads that divide the tokens' axis");
    REQUIRE(dim / number % 2 == 0 && hidden % 2 == 0, "heads and hidden numbers in pairs");
  }

  // shapes[0]: batch, tokens, dim.
  void compute(const std::vector<ov::Shape>& shapes, const float* const* pointers,
               float* out) const override {
    const ov::Shape& shape = shapes[0];
    const int64_t images = shape[0], tokens = shape[1], dim = shape[2], heads = number;
    const int64_t hidden = shapes[1 + fc1_bias][0];
    const outer::Parallel parallel = {share_with, nullptr};
    const Weights<> weights = as_weights(pointers + 1);
    outer::transform({images, tokens, dim, heads, hidden, epsilon}, parallel,
                     tbb::this_task_arena::max_concurrency(), pointers[0], weights,
                     kernels(dim, hidden, weights, outer::Parallel{in_turn, nullptr}), out);
  }

 private:
  mutable Once<outer::HalfKernels> kernels;
};

EXTENSION(OuterTransformer)
