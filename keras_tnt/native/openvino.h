// What OpenVINO's operations share. They take words, tokens or patches, and weights that are constants.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <vector>

#include "weights.h"

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

// Calls compute(pointers to all inputs, where the result goes) with float32, of tensors of float32 or
// bfloat16.
template <typename Compute>
bool in_float32(ov::TensorVector& outputs, const ov::TensorVector& inputs, Compute compute) {
  const std::vector<Numbers> numbers(inputs.begin(), inputs.end());
  const float* pointers[1 + weight_count];
  for (size_t i = 0; i < numbers.size(); ++i) pointers[i] = numbers[i].data();
  if (outputs[0].get_element_type() == ov::element::f32) {
    compute(pointers, outputs[0].data<float>());
  } else {
    std::vector<float> copy(outputs[0].get_size());
    compute(pointers, copy.data());
    std::copy(copy.begin(), copy.end(), outputs[0].data<ov::bfloat16>());
  }
  return true;
}

// Calls part(i) for each i, in the threads that OpenVINO computes in.
template <typename Part>
void share(int64_t parts, Part part) {
  tbb::parallel_for(int64_t{0}, parts, part);
}

// The same, for what wants a pool; and one after another.
inline void share_with(void*, int64_t parts, void (*part)(void*, int64_t), void* data) {
  share(parts, [=](int64_t i) { part(data, i); });
}

inline void in_turn(void*, int64_t parts, void (*part)(void*, int64_t), void* data) {
  for (int64_t i = 0; i < parts; ++i) part(data, i);
}

// What is made of constants by whoever needs it first; the others wait, so that it must not be made by
// tasks, among which one that waits might be.
template <typename Made>
class Once {
 public:
  template <typename... Arguments>
  const Made& operator()(const Arguments&... arguments) {
    std::call_once(flag, [&] { made = std::make_unique<Made>(arguments...); });
    return *made;
  }

 private:
  std::once_flag flag;
  std::unique_ptr<Made> made;
};

}  // namespace

// An operation, which is a class Self of its own. Its attributes are epsilon and, if it has a name, a
// whole number. The result has the shape of the first input unless `result` says otherwise.
template <typename Self>
class Operation : public ov::op::Op {
 public:
  static constexpr const char* attribute = nullptr;  // the number's name

  virtual ov::PartialShape result(ov::PartialShape first) const { return first; }

  void validate_and_infer_types() override {
    set_output_type(0, get_input_element_type(0), result(get_input_partial_shape(0)));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    const auto clone = std::make_shared<Self>();
    clone->epsilon = epsilon;
    clone->number = number;
    clone->set_arguments(inputs);
    clone->constructor_validate_and_infer_types();
    return clone;
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("epsilon", epsilon);
    if (Self::attribute) visitor.on_attribute(Self::attribute, number);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    outputs[0].set_shape(result(inputs[0].get_shape()).to_shape());
    return in_float32(outputs, inputs, [&](const float* const* pointers, float* out) {
      compute(inputs[0].get_shape(), pointers, out);
    });
  }

  // From the first input, of this shape, and the weights behind it to the result.
  virtual void compute(const ov::Shape& shape, const float* const* pointers, float* out) const = 0;

 protected:
  float epsilon = 0;
  int64_t number = 0;
};

// The library's operation: its opset, and its domain in an ONNX file, is DOMAIN.
#define EXTENSION(Name)                                        \
  OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{ \
      std::make_shared<ov::OpExtension<Name>>(),               \
      std::make_shared<ov::frontend::onnx::OpExtension<Name>>(#Name, DOMAIN)}))
