// OpenVINO's extension with the operation `OuterTransformer`, in bfloat16: tokens and the weights to
// tokens; epsilon and the number of heads are attributes.
#include "openvino.h"
#include "outer_half.h"

class OuterTransformer : public Operation {
 public:
  OPENVINO_OP("OuterTransformer", DOMAIN);

  OuterTransformer() = default;
  OuterTransformer(const ov::OutputVector& inputs, float epsilon, int64_t heads)
      : Operation(inputs, epsilon), heads(heads) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<OuterTransformer>(inputs, epsilon, heads);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("heads", heads);
    return Operation::visit_attributes(visitor);
  }

  // shape: batch, tokens, dim.
  void compute(const ov::Shape& shape, const float* const* pointers, float* out) const override {
    const int64_t images = shape[0], tokens = shape[1], dim = shape[2];
    const int64_t hidden = get_input_shape(1 + fc1_bias)[0];
    const outer::Parallel parallel = {share_with, nullptr};
    const Weights<> weights = as_weights(pointers + 1);
    outer::transform({images, tokens, dim, heads, hidden, epsilon}, parallel,
                     tbb::this_task_arena::max_concurrency(), pointers[0], weights,
                     kernels(dim, hidden, weights, outer::Parallel{in_turn, nullptr}), out);
  }

 private:
  int64_t heads = 1;
  mutable Once<outer::HalfKernels> kernels;
};

EXTENSION(OuterTransformer)
