// OpenVINO's extension with the operation `OuterTransformer`, in bfloat16: tokens and the weights,
// which are constants, to tokens; epsilon and the number of heads are attributes.
#include <mutex>
#include <tbb/task_arena.h>

#include "openvino.h"
#include "outer_half.h"

class OuterTransformer : public Transformer {
 public:
  OPENVINO_OP("OuterTransformer", DOMAIN);

  OuterTransformer() = default;
  OuterTransformer(const ov::OutputVector& inputs, float epsilon, int64_t heads)
      : Transformer(inputs, epsilon), heads(heads) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<OuterTransformer>(inputs, epsilon, heads);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("heads", heads);
    return Transformer::visit_attributes(visitor);
  }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    return in_float32(outputs, inputs, [&](const float* const* pointers, float* out) {
      const outer::Parallel parallel = {
          [](void*, int64_t parts, void (*part)(void*, int64_t), void* data) {
            share(parts, [=](int64_t i) { part(data, i); });
          },
          nullptr};
      const ov::Shape& shape = inputs[0].get_shape();  // batch, tokens, dim
      const int64_t hidden = inputs[1 + fc1_bias].get_size();
      const outer::Sizes s = {int64_t(shape[0]), int64_t(shape[1]), int64_t(shape[2]), heads,
                              hidden, epsilon};
      const Weights<> weights = as_weights(pointers + 1);
      std::call_once(once, [&] {
        kernels = std::make_unique<outer::HalfKernels>(s.dim, hidden);
        kernels->pack(weights, parallel);
      });
      outer::transform(s, parallel, tbb::this_task_arena::max_concurrency(), pointers[0], weights,
                       *kernels, out);
    });
  }

 private:
  int64_t heads = 1;
  mutable std::once_flag once;
  mutable std::unique_ptr<outer::HalfKernels> kernels;
};

EXTENSION(OuterTransformer)
