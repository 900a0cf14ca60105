// OpenVINO's extension with the operation `InnerTransformer`: words and the weights to words,
// epsilon an attribute. Its opset, and its domain in an ONNX file, is DOMAIN.
#include <algorithm>
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <vector>

namespace {

// A tensor's numbers in float32, which are the tensor itself or a copy that is held here.
class Numbers {
 public:
  explicit Numbers(const ov::Tensor& tensor) {
    if (tensor.get_element_type() == ov::element::f32) {
      first = tensor.data<const float>();
      return;
    }
    const ov::bfloat16* half = tensor.data<const ov::bfloat16>();
    copy.assign(half, half + tensor.get_size());
    first = copy.data();
  }
  const float* data() const { return first; }

 private:
  std::vector<float> copy;
  const float* first;
};

}  // namespace

class InnerTransformer : public ov::op::Op {
 public:
  OPENVINO_OP("InnerTransformer", DOMAIN);

  InnerTransformer() = default;
  InnerTransformer(const ov::OutputVector& inputs, float epsilon) : Op(inputs), epsilon(epsilon) {
    constructor_validate_and_infer_types();
  }

  void validate_and_infer_types() override {
    set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<InnerTransformer>(inputs, epsilon);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("epsilon", epsilon);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const std::vector<Numbers> numbers(inputs.begin(), inputs.end());
    const float* pointers[weight_count];
    for (int i = 0; i < weight_count; ++i) pointers[i] = numbers[i + 1].data();
    outputs[0].set_shape(inputs[0].get_shape());
    const bool half = outputs[0].get_element_type() != ov::element::f32;
    std::vector<float> copy(half ? inputs[0].get_size() : 0);
    const float* in = numbers[0].data();
    float* out = half ? copy.data() : outputs[0].data<float>();
    const ov::Shape& shape = inputs[0].get_shape();  // batch, patches, words, dim
    const int64_t patches = shape[0] * shape[1], at_once = 16;
    // In the threads that OpenVINO computes in.
    tbb::parallel_for(int64_t{0}, (patches + at_once - 1) / at_once, [&](int64_t part) {
      const int64_t first = part * at_once, last = std::min(first + at_once, patches);
      transform(in, out, as_weights(pointers), epsilon, first, last);
    });
    if (half) std::copy(copy.begin(), copy.end(), outputs[0].data<ov::bfloat16>());
    return true;
  }

 private:
  float epsilon = 0;
};

OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<InnerTransformer>>(),
    std::make_shared<ov::frontend::onnx::OpExtension<InnerTransformer>>("InnerTransformer", DOMAIN),
}))
