// OpenVINO extension with the operation `WordsToPatches`, the word-to-patch projection with a
// bfloat16 GEMM: words (batch, patches, inputs), concatenated per patch, and the 6 tensors of
// `PatchWeights` to (batch, patches, dim). With a last, optional input, tokens (batch, prefix +
// patches, dim), the result is their sum with the patches; the first `prefix` tokens are copied.
// Attributes: epsilon and prefix. The kernel is a constant, packed at the first call.
#include "openvino.h"
#include "patches_half.h"

class WordsToPatches : public Operation<WordsToPatches> {
 public:
  OPENVINO_OP("WordsToPatches", DOMAIN);
  static constexpr const char* attribute = "prefix";

  static constexpr size_t weights = count_of<PatchWeights>, optional_inputs = 1;

  size_t rank() const override { return 3; }

  ov::Shape result(const std::vector<ov::Shape>& shapes) const override {
    return {shapes[0][0], shapes[0][1] + number, shapes[1 + patch_bias][0]};
  }

  std::vector<WeightShape> expected(const std::vector<ov::Shape>& shapes) const override {
    const auto found = shapes_of_patch_weights(shapes[0][2], shapes[1 + patch_bias][0]);
    return {found.begin(), found.end()};
  }

  void check(const std::vector<ov::Shape>& shapes) const override {
    REQUIRE(shapes[0][2] % 2 == 0, "words of an even number of numbers a patch");
    REQUIRE(number >= 0 && number <= 1 << 20, "a prefix of some tokens");
    if (shapes.size() > weights_end)
      REQUIRE(shapes[weights_end] == result(shapes), "tokens of the result's shape");
    else
      REQUIRE(number == 0, "tokens where there is a prefix");
  }

  // shapes[0]: batch, patches, inputs.
  void compute(const std::vector<ov::Shape>& shapes, const float* const* pointers,
               float* out) const override {
    const ov::Shape& shape = shapes[0];
    const int64_t images = shape[0], tokens = shape[1], inputs = shape[2];
    const int64_t dim = shapes[1 + patch_bias][0];
    const outer::Parallel parallel = {share_with, nullptr};
    const PatchWeights<> weights = as_weights<PatchWeights>(pointers + 1);
    const float* added = shapes.size() > weights_end ? pointers[weights_end] : nullptr;
    patches::project({images, tokens, inputs, dim, epsilon}, parallel,
                     tbb::this_task_arena::max_concurrency(), pointers[0], weights,
                     kernel(inputs, dim, weights, outer::Parallel{in_turn, nullptr}), out, added, number);
  }

 private:
  static constexpr size_t weights_end = 1 + count_of<PatchWeights>;

  mutable Once<patches::HalfKernel> kernel;
};

EXTENSION(WordsToPatches)
