// OpenVINO's extension with the operation `WordsToPatches`, in bfloat16: the words of each patch side
// by side and the weights to patches; epsilon is an attribute.
#include <mutex>

#include "openvino.h"
#include "patches_half.h"

class WordsToPatches : public Operation {
 public:
  OPENVINO_OP("WordsToPatches", DOMAIN);

  WordsToPatches() = default;
  WordsToPatches(const ov::OutputVector& inputs, float epsilon) : Operation(inputs, epsilon) {
    constructor_validate_and_infer_types();
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<WordsToPatches>(inputs, epsilon);
  }

  ov::PartialShape result(ov::PartialShape first) const override {
    first[2] = get_input_shape(1 + patch_bias)[0];
    return first;
  }

  // shape: batch, patches, inputs.
  void compute(const ov::Shape& shape, const float* const* pointers, float* out) const override {
    const int64_t images = shape[0], tokens = shape[1], inputs = shape[2];
    const int64_t dim = get_input_shape(1 + patch_bias)[0];
    const outer::Parallel parallel = {share_with, nullptr};
    const PatchWeights<> weights = as_weights<PatchWeights>(pointers + 1);
    std::call_once(once, [&] {
      kernel = std::make_unique<patches::HalfKernel>(inputs, dim);
      kernel->pack(weights, parallel);
    });
    patches::project({images, tokens, inputs, dim, epsilon}, parallel,
                     tbb::this_task_arena::max_concurrency(), pointers[0], weights, *kernel, out);
  }

 private:
  mutable std::once_flag once;
  mutable std::unique_ptr<patches::HalfKernel> kernel;
};

EXTENSION(WordsToPatches)
