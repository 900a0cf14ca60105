// OpenVINO extension with the operation `InnerTransformer`, the inner (word) transformer block:
// words (batch, patches, words, dim) and the 12 tensors of `Weights` to words of the same shape.
// Attribute: epsilon. Tasks of 16 patches run on OpenVINO's TBB threads.
#include "inner_forward.h"
#include "openvino.h"

class InnerTransformer : public Operation<InnerTransformer> {
 public:
  OPENVINO_OP("InnerTransformer", DOMAIN);

  static constexpr size_t weights = weight_count;

  size_t rank() const override { return 4; }

  std::vector<WeightShape> expected(const std::vector<ov::Shape>&) const override {
    const auto shapes = shapes_of_weights(::dim, ::hidden, ::words);
    return {shapes.begin(), shapes.end()};
  }

  void check(const std::vector<ov::Shape>& shapes) const override {
    REQUIRE(shapes[0][2] == ::words && shapes[0][3] == ::dim, "words of another shape");
  }

  // shapes[0]: batch, patches, words, dim.
  void compute(const std::vector<ov::Shape>& shapes, const float* const* pointers,
               float* out) const override {
    const Forward run{as_weights(pointers + 1), epsilon};
    const int64_t patches = shapes[0][0] * shapes[0][1], at_once = 16;
    share((patches + at_once - 1) / at_once, [&](int64_t part) {
      run(pointers[0], out, part * at_once, std::min((part + 1) * at_once, patches));
    });
  }
};

EXTENSION(InnerTransformer)
