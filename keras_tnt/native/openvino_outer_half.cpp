// OpenVINO's extension with the operation `OuterTransformer`, in bfloat16: tokens and the weights to
// tokens; epsilon and the number of heads are attributes.
#include "openvino.h"
#include "outer_half.h"

class OuterTransformer : public Operation<OuterTransformer> {
 public:
  OPENVINO_OP("OuterTransformer", DOMAIN);
  static constexpr const char* attribute = "heads";

  // shape: batch, tokens, dim.
  void compute(const ov::Shape& shape, const float* const* pointers, float* out) const override {
    const int64_t images = shape[0], tokens = shape[1], dim = shape[2], heads = number;
    const int64_t hidden = get_input_shape(1 + fc1_bias)[0];
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
