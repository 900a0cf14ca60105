// Base class and helpers of the OpenVINO operations (openvino_*.cpp): shape inference and
// validation of inputs, conversion between bfloat16 and float32 tensors, parallel_for on TBB, and
// the registration in OpenVINO's ONNX frontend. Inputs are an activation tensor and weights, which
// are constants of the graph.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>
#include <openvino/core/except.hpp>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <vector>

#include "weights.h"

namespace {

// A float32 view of a tensor: its own memory, or a converted copy of a bfloat16 tensor.
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

// Calls compute(inputs, output) with float32 pointers, for tensors of float32 or bfloat16.
template <typename Compute>
bool in_float32(ov::TensorVector& outputs, const ov::TensorVector& inputs, Compute compute) {
  const std::vector<Numbers> numbers(inputs.begin(), inputs.end());
  const float* pointers[2 + weight_count];
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

// parallel_for: calls part(i) for i in [0, parts) in the current TBB arena, OpenVINO's threads.
template <typename Part>
void share(int64_t parts, Part part) {
  tbb::parallel_for(int64_t{0}, parts, part);
}

// The same with the signature of `outer::Parallel`; the pool is unused.
inline void share_with(void*, int64_t parts, void (*part)(void*, int64_t), void* data) {
  share(parts, [=](int64_t i) { part(data, i); });
}

// Serial for, with the signature of `outer::Parallel`.
inline void in_turn(void*, int64_t parts, void (*part)(void*, int64_t), void* data) {
  for (int64_t i = 0; i < parts; ++i) part(data, i);
}

// Lazily initialized value, such as packed kernels: the first caller makes it, and the others wait.
// It must not be made by parallel tasks: a waiting thread could be the one expected to run them
// (deadlock).
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

// Validates an input: throws OpenVINO's exception unless `condition` holds. Graphs are untrusted.
#define REQUIRE(condition, what) OPENVINO_ASSERT(condition, "keras_tnt's operation takes ", what, ".")

// CRTP base class of an operation Self. Its attributes are epsilon and, if Self::attribute names
// it, an integer, `number`. The output has the shape of the first input unless `result` is
// overridden.
template <typename Self>
class Operation : public ov::op::Op {
 public:
  static constexpr const char* attribute = nullptr;  // name of the integer attribute, if any
  static constexpr size_t optional_inputs = 0;

  // Returns the output shape, given the shapes of all inputs.
  virtual ov::Shape result(const std::vector<ov::Shape>& shapes) const { return shapes[0]; }

  // The rank of the first input, and the expected shapes of the weights.
  virtual size_t rank() const = 0;
  virtual std::vector<WeightShape> expected(const std::vector<ov::Shape>& shapes) const = 0;

  // Validates everything but the shapes of the weights.
  virtual void check(const std::vector<ov::Shape>&) const {}

  void validate_and_infer_types() override {
    const size_t count = expected_count();
    REQUIRE(get_input_size() >= count && get_input_size() <= count + Self::optional_inputs,
            "one tensor and its weights");
    const ov::element::Type type = get_input_element_type(0);
    REQUIRE(type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16,
            "tensors of float32 or bfloat16");
    ov::PartialShape first = get_input_partial_shape(0);
    REQUIRE(first.rank().is_static() && size_t(first.rank().get_length()) == rank(),
            "a first tensor of another rank");
    std::vector<ov::Shape> shapes(1, ov::Shape(rank(), 0));  // 0 for a dynamic axis
    for (size_t axis = 0; axis < rank(); ++axis)
      if (first[axis].is_static()) shapes[0][axis] = first[axis].get_length();
    REQUIRE(first[rank() - 1].is_static(), "a last axis of known size");
    for (size_t i = 1; i < count; ++i) {
      REQUIRE(get_input_partial_shape(i).is_static(), "weights of known shapes");
      shapes.push_back(get_input_shape(i));
    }
    check_weights(shapes);
    const ov::Shape known = result(shapes);
    for (size_t axis = 0; axis < rank(); ++axis)
      first[axis] = first[axis].is_static() ? ov::Dimension(known[axis]) : ov::Dimension::dynamic();
    set_output_type(0, type, first);
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
    const size_t count = expected_count();
    REQUIRE(outputs.size() == 1 && inputs.size() >= count &&
                inputs.size() <= count + Self::optional_inputs,
            "one tensor and its weights");
    std::vector<ov::Shape> shapes;
    for (const ov::Tensor& tensor : inputs) {
      const ov::element::Type type = tensor.get_element_type();
      REQUIRE(type == ov::element::f32 || type == ov::element::bf16,
              "tensors of float32 or bfloat16");
      shapes.push_back(tensor.get_shape());
    }
    REQUIRE(shapes[0].size() == rank(), "a first tensor of another rank");
    check_weights(shapes);
    check(shapes);
    const ov::element::Type type = outputs[0].get_element_type();
    REQUIRE(type == ov::element::f32 || type == ov::element::bf16, "a result in float32 or bfloat16");
    const ov::Shape shape = result(shapes);
    outputs[0].set_shape(shape);
    if (ov::shape_size(shape) == 0) return true;
    return in_float32(outputs, inputs, [&](const float* const* pointers, float* out) {
      compute(shapes, pointers, out);
    });
  }

  // Computes the output from float32 inputs of these shapes, in the order of the operation's
  // inputs.
  virtual void compute(const std::vector<ov::Shape>& shapes, const float* const* pointers,
                       float* out) const = 0;

 protected:
  float epsilon = 0;
  int64_t number = 0;

 private:
  static constexpr size_t expected_count() { return 1 + Self::weights; }

  void check_weights(const std::vector<ov::Shape>& shapes) const {
    for (const ov::Shape& shape : shapes) REQUIRE(!shape.empty(), "no scalars");
    const std::vector<WeightShape> wanted = expected(shapes);
    for (size_t i = 0; i < Self::weights; ++i)
      REQUIRE(wanted[i].is(shapes[1 + i], shapes[1 + i].size()), "weights of other shapes");
  }
};

// The ONNX domain of the operation; runtimes.py sets it before it adds the library to a core. It
// has a random part, so that untrusted ONNX files cannot name the operation.
extern "C" {
const char* domain = "keras_tnt";
}

// Exports the operation to the ONNX frontend alone, with no ov::OpExtension, so that OpenVINO IR
// files cannot name it. DOMAIN, its opset, is the name of its sizes.
#define EXTENSION(Name)                                        \
  OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{ \
      std::make_shared<ov::frontend::onnx::OpExtension<Name>>(#Name, domain)}))
