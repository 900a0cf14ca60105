// OpenVINO's extension with the operation `WordsToPatches`, in bfloat16: the words of each patch side
// by side and the weights to patches; or, where tokens follow, which is their sum with the patches, of
// which `prefix` stand before. epsilon and prefix are attributes.
#include "openvino.h"
#include "patches_half.h"

class WordsToPatches : public Operation<WordsToPatches> {
 public:
  OPENVINO_OP("WordsToPatches", DOMAIN);
  static constexpr const char* attribute = "prefix";

  ov::PartialShape result(ov::PartialShape first) const override {
    first[1] += number;  // the prefix
    first[2] = get_input_shape(1 + patch_bias)[0];
    return first;
  }

  // shape: batch, patches, inputs.
  void compute(const ov::Shape& shape, const float* const* pointers, float* out) const override {
    const int64_t images = shape[0], tokens = shape[1], inputs = shape[2];
    const int64_t dim = get_input_shape(1 + patch_bias)[0];
    const outer::Parallel parallel = {share_with, nullptr};
    const PatchWeights<> weights = as_weights<PatchWeights>(pointers + 1);
    const float* added = get_input_size() > weights_end ? pointers[weights_end] : nullptr;
    patches::project({images, tokens, inputs, dim, epsilon}, parallel,
                     tbb::this_task_arena::max_concurrency(), pointers[0], weights,
                     kernel(inputs, dim, weights, outer::Parallel{in_turn, nullptr}), out, added, number);
  }

 private:
  static constexpr size_t weights_end = 1 + count_of<PatchWeights>;

  mutable Once<patches::HalfKernel> kernel;
};

EXTENSION(WordsToPatches)
