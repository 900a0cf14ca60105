// OpenVINO's extension with the operation `InnerTransformer`: words and the weights to words, epsilon
// an attribute.
#include "inner_forward.h"
#include "openvino.h"

class InnerTransformer : public Operation<InnerTransformer> {
 public:
  OPENVINO_OP("InnerTransformer", DOMAIN);

  // shape: batch, patches, words, dim.
  void compute(const ov::Shape& shape, const float* const* pointers, float* out) const override {
    const Forward run{as_weights(pointers + 1), epsilon};
    const int64_t patches = shape[0] * shape[1], at_once = 16;
    share((patches + at_once - 1) / at_once, [&](int64_t part) {
      run(pointers[0], out, part * at_once, std::min((part + 1) * at_once, patches));
    });
  }
};

EXTENSION(InnerTransformer)
