// XLA custom calls (FFI handlers on the CPU) of TNT's kernels, for JAX and TensorFlow: the inner
// (word) transformer block, the outer (patch) block and the word-to-patch projection, forward and
// backward in float32, and forward only with bfloat16 GEMMs.
//
// Operands of a forward call: words (..., words, dim), tokens (batch, tokens, dim) or concatenated
// words (batch, patches, inputs), in float32; the weights in the order of `Weights` or
// `PatchWeights`; for the blocks an optional last operand, `keep`, the drop-path multipliers (2,
// batch, patches) or (2, batch). Results: the output and, for training the outer block and the
// projection, the saved activations. A backward call has the gradient of the output and the saved
// activations, if any, in front of the same operands, and returns the gradients of the input and of
// all weights.
//
// The inner block is specialized for its sizes at compile time: the attribute `kernel` names one of
// the libraries of kernel.cpp that were registered by `keras_tnt_add_kernel`. The others read their
// sizes off the operands and attributes.
#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernel.h"
#include "patches.h"
#ifdef __AVX512BF16__
#include "patches_half.h"
#endif
#include "xla/ffi/api/ffi.h"
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace ffi = xla::ffi;
using Numbers = ffi::Buffer<ffi::F32>;

static std::mutex guard;
static std::map<std::string, const Kernel*, std::less<>> kernels;

// Registers the function table of a library of kernel.cpp under the name of its sizes.
extern "C" void keras_tnt_add_kernel(const char* name, const Kernel* kernel) {
  std::lock_guard<std::mutex> lock(guard);
  kernels[name] = kernel;
}

// parallel_for with dynamic scheduling: calls part(i) for i in [0, parts) on XLA's intra-op thread
// pool. The calling thread takes items, too, so that it never waits for one that has not started:
// the pool's threads may all be busy, or waiting in custom calls themselves.
template <typename Part>
static void share(ffi::ThreadPool pool, int64_t parts, Part part) {
  struct Work {
    const Part part;
    std::atomic<int64_t> next{0}, done{0};
    explicit Work(const Part& part) : part(part) {}
  };
  const auto work = std::make_shared<Work>(part);
  const auto take = [=] {
    for (int64_t i; (i = work->next.fetch_add(1)) < parts;) {
      work->part(i);
      work->done.fetch_add(1);
    }
  };
  for (int64_t i = std::min(pool.num_threads(), parts); i > 1; --i)
    pool.Schedule([take] { take(); });
  take();
  while (work->done.load() < parts) std::this_thread::yield();
}

// Programs may come from other processes or files, so all shapes are validated before a pointer is
// used.
static ffi::Error refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("keras_tnt's custom call was given " + what + ".");
}

// Returns the error of a failed call from the enclosing function.
#define TRY(...) \
  if (ffi::Error error = (__VA_ARGS__); error.failure()) return error

#define REFUSE_UNLESS(condition, what) \
  if (!(condition)) return refuse(what)

// Validates the shapes of the weights and fills in pointers to them, and to the drop-path
// multipliers `keep` of `keep_size` elements: null if the operand is absent. keep_size 0: it must
// be absent.
template <size_t count>
static ffi::Error read_weights(ffi::RemainingArgs rest,
                               const std::array<WeightShape, count>& shapes, size_t keep_size,
                               const float* (&weights)[count], const float*& keep) {
  REFUSE_UNLESS(rest.size() == count || (keep_size && rest.size() == count + 1),
                "another number of weights");
  for (size_t i = 0; i < count; ++i) {
    const auto weight = rest.get<Numbers>(i);
    if (!weight.has_value()) return weight.error();
    const auto dimensions = weight->dimensions();
    REFUSE_UNLESS(shapes[i].is(dimensions, dimensions.size()), "a weight of another shape");
    weights[i] = weight->typed_data();
  }
  keep = nullptr;
  if (rest.size() == count) return ffi::Error::Success();
  const auto factors = rest.get<Numbers>(count);
  if (!factors.has_value()) return factors.error();
  REFUSE_UNLESS(factors->element_count() == keep_size, "other factors of its branches");
  keep = factors->typed_data();
  return ffi::Error::Success();
}

// Validates the results that receive the gradients of the weights, and fills in pointers to them.
template <size_t count>
static ffi::Error read_gradients(ffi::RemainingRets rest,
                                 const std::array<WeightShape, count>& shapes,
                                 float* (&gradients)[count]) {
  REFUSE_UNLESS(rest.size() == count, "another number of gradients");
  for (size_t i = 0; i < count; ++i) {
    const auto found = rest.get<Numbers>(i);
    if (!found.has_value()) return found.error();
    ffi::Result<Numbers> gradient = *found;
    REFUSE_UNLESS(int64_t(gradient->element_count()) == shapes[i].size(),
                  "a gradient of another size");
    gradients[i] = gradient->typed_data();
  }
  return ffi::Error::Success();
}

static bool same_size(Numbers a, Numbers b) { return a.element_count() == b.element_count(); }

// === The inner transformer ===

// Operands that the forward and the backward call share, validated.
struct Call {
  const Kernel* kernel;
  std::array<WeightShape, weight_count> shapes;
  const float* weights[weight_count];
  const float* keep;
  int64_t patches;

  ffi::Error read(std::string_view name, Numbers in, ffi::RemainingArgs rest) {
    {
      std::lock_guard<std::mutex> lock(guard);
      const auto found = kernels.find(name);
      if (found == kernels.end())
        return ffi::Error::InvalidArgument("No inner transformer of these sizes was loaded: " +
                                           std::string(name));
      kernel = found->second;
    }
    const auto dimensions = in.dimensions();
    REFUSE_UNLESS(dimensions.size() >= 2 && dimensions.back() == kernel->dim &&
                      dimensions[dimensions.size() - 2] == kernel->words,
                  "words of another shape");
    patches = in.element_count() / (kernel->words * kernel->dim);
    shapes = shapes_of_weights(kernel->dim, kernel->hidden, kernel->words);
    return read_weights(rest, shapes, 2 * patches, weights, keep);
  }
};

static ffi::Error run(ffi::ThreadPool pool, std::string_view name, float epsilon, Numbers in,
                      ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  constexpr int64_t at_once = 16;
  Call call;
  TRY(call.read(name, in, rest));
  REFUSE_UNLESS(same_size(in, *out), "a result of another size");
  share(pool, (call.patches + at_once - 1) / at_once, [&](int64_t i) {
    call.kernel->run(in.typed_data(), out->typed_data(), call.weights, call.keep, epsilon,
                     call.patches, i * at_once, std::min((i + 1) * at_once, call.patches));
  });
  return ffi::Error::Success();
}

// The gradients of the weights accumulate in at most 64 rows, one per task, whatever the number of
// threads, and are reduced in order: results are deterministic.
static ffi::Error run_gradient(ffi::ThreadPool pool, std::string_view name, float epsilon,
                               Numbers dout, Numbers in, ffi::RemainingArgs rest,
                               ffi::Result<Numbers> din, ffi::RemainingRets gradients) {
  Call call;
  TRY(call.read(name, in, rest));
  REFUSE_UNLESS(same_size(in, dout) && same_size(in, *din), "gradients of another size");
  float* to[weight_count];
  TRY(read_gradients(gradients, call.shapes, to));
  const int64_t size = call.kernel->sums_size;
  const int64_t rows = std::clamp<int64_t>(call.patches, 1, 64);
  Space space;
  float* sums = space.zeros(rows * size);
  share(pool, rows, [&](int64_t i) {
    call.kernel->run_gradient(in.typed_data(), dout.typed_data(), din->typed_data(), call.weights,
                              call.keep, sums + i * size, epsilon, call.patches,
                              call.patches * i / rows, call.patches * (i + 1) / rows);
  });
  call.kernel->add_up(sums, rows, to);
  return ffi::Error::Success();
}

// === The outer transformer ===

// parallel_for with the signature of `outer::Parallel`.
static void share_with(void* pool, int64_t parts, void (*part)(void*, int64_t), void* data) {
  share(*static_cast<ffi::ThreadPool*>(pool), parts, [=](int64_t i) { part(data, i); });
}

// As `Call`, for tokens (images, tokens, dim).
struct OuterCall {
  outer::Sizes sizes;
  std::array<WeightShape, weight_count> shapes;
  Weights<> weights;
  const float* keep;

  ffi::Error read(int64_t heads, float epsilon, Numbers in, ffi::RemainingArgs rest) {
    const auto shape = in.dimensions();
    REFUSE_UNLESS(shape.size() == 3 && heads > 0 && shape[2] > 0 && shape[2] % heads == 0,
                  "tokens of another shape");
    REFUSE_UNLESS(rest.size() > fc1_bias, "another number of weights");
    const auto bias = rest.get<Numbers>(fc1_bias);
    if (!bias.has_value()) return bias.error();
    sizes = {shape[0], shape[1], shape[2], heads, int64_t(bias->element_count()), epsilon};
    shapes = shapes_of_weights(sizes.dim, sizes.hidden, 0);
    const float* pointers[weight_count];
    TRY(read_weights(rest, shapes, 2 * sizes.images, pointers, keep));
    weights = as_weights(pointers);
    return ffi::Error::Success();
  }

  bool has_kept(Numbers kept) const {
    return int64_t(kept.element_count()) == sizes.rows() * (5 * sizes.dim + sizes.hidden);
  }
};

// Returns the memory that XLA compilation freed, hundreds of MiB, to the system (malloc_trim)
// before the first step of a program, to lower the peak RSS. A program is identified by the shape
// of its tokens.
static void give_back_before_first_step([[maybe_unused]] Numbers tokens) {
#ifdef __GLIBC__
  static auto& seen = *new std::set<std::vector<int64_t>>;
  std::lock_guard<std::mutex> lock(guard);
  const auto shape = tokens.dimensions();
  if (seen.emplace(shape.begin(), shape.end()).second) malloc_trim(0);
#endif
}

static ffi::Error run_outer(ffi::ThreadPool pool, int64_t heads, float epsilon, Numbers in,
                            ffi::RemainingArgs rest, ffi::Result<Numbers> out,
                            ffi::Result<Numbers> kept) {
  OuterCall call;
  TRY(call.read(heads, epsilon, in, rest));
  REFUSE_UNLESS(same_size(in, *out) && call.has_kept(*kept), "results of another size");
  give_back_before_first_step(in);
  outer::transform(call.sizes, {share_with, &pool}, in.typed_data(), call.weights, call.keep,
                   out->typed_data(), outer::Kept(kept->typed_data(), call.sizes));
  return ffi::Error::Success();
}

static ffi::Error run_outer_gradient(ffi::ThreadPool pool, int64_t heads, float epsilon,
                                     Numbers dout, Numbers kept, Numbers in,
                                     ffi::RemainingArgs rest, ffi::Result<Numbers> din,
                                     ffi::RemainingRets gradients) {
  OuterCall call;
  TRY(call.read(heads, epsilon, in, rest));
  REFUSE_UNLESS(same_size(in, dout) && same_size(in, *din) && call.has_kept(kept),
                "gradients of another size");
  float* to[weight_count];
  TRY(read_gradients(gradients, call.shapes, to));
  const float* from = kept.typed_data();
  outer::transform_gradient(call.sizes, {share_with, &pool}, in.typed_data(), dout.typed_data(),
                            call.weights, call.keep, outer::Kept(from, call.sizes),
                            din->typed_data(), as_weights(to));
  return ffi::Error::Success();
}

#ifdef __AVX512BF16__
static ffi::Error run_outer_half(ffi::ThreadPool pool, int64_t heads, float epsilon, Numbers in,
                                 ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  OuterCall call;
  TRY(call.read(heads, epsilon, in, rest));
  REFUSE_UNLESS(same_size(in, *out), "a result of another size");
  REFUSE_UNLESS(call.sizes.head_dim() % 2 == 0 && call.sizes.hidden % 2 == 0, "an odd size");
  const outer::Parallel parallel = {share_with, &pool};
  const outer::HalfKernels kernels(call.sizes.dim, call.sizes.hidden, call.weights, parallel);
  outer::transform(call.sizes, parallel, pool.num_threads(), in.typed_data(), call.weights, kernels,
                   out->typed_data());
  return ffi::Error::Success();
}
#endif

// === From words to patches ===

// As `Call`, for concatenated words (images, patches, inputs).
struct PatchesCall {
  static constexpr size_t count = count_of<PatchWeights>;
  patches::Sizes sizes;
  std::array<WeightShape, count> shapes;
  PatchWeights<> weights;

  ffi::Error read(float epsilon, Numbers in, ffi::RemainingArgs rest) {
    const auto shape = in.dimensions();
    REFUSE_UNLESS(shape.size() == 3, "words of another shape");
    REFUSE_UNLESS(rest.size() > patch_bias, "another number of weights");
    const auto bias = rest.get<Numbers>(patch_bias);
    if (!bias.has_value()) return bias.error();
    sizes = {shape[0], shape[1], shape[2], int64_t(bias->element_count()), epsilon};
    shapes = shapes_of_patch_weights(sizes.inputs, sizes.dim);
    const float *pointers[count], *keep;
    TRY(read_weights(rest, shapes, 0, pointers, keep));
    weights = as_weights<PatchWeights>(pointers);
    return ffi::Error::Success();
  }

  bool has_patches(Numbers patches) const {
    return int64_t(patches.element_count()) == sizes.images * sizes.tokens * sizes.dim;
  }
};

static ffi::Error run_patches(ffi::ThreadPool pool, float epsilon, Numbers in,
                              ffi::RemainingArgs rest, ffi::Result<Numbers> out,
                              ffi::Result<Numbers> kept) {
  PatchesCall call;
  TRY(call.read(epsilon, in, rest));
  REFUSE_UNLESS(call.has_patches(*out) && call.has_patches(*kept), "results of another size");
  patches::project(call.sizes, {share_with, &pool}, in.typed_data(), call.weights,
                   out->typed_data(), kept->typed_data());
  return ffi::Error::Success();
}

static ffi::Error run_patches_gradient(ffi::ThreadPool pool, float epsilon, Numbers dout,
                                       Numbers kept, Numbers in, ffi::RemainingArgs rest,
                                       ffi::Result<Numbers> din, ffi::RemainingRets gradients) {
  PatchesCall call;
  TRY(call.read(epsilon, in, rest));
  REFUSE_UNLESS(call.has_patches(dout) && call.has_patches(kept) && same_size(in, *din),
                "gradients of another size");
  float* to[PatchesCall::count];
  TRY(read_gradients(gradients, call.shapes, to));
  patches::project_gradient(call.sizes, {share_with, &pool}, in.typed_data(), dout.typed_data(),
                            call.weights, kept.typed_data(), din->typed_data(),
                            as_weights<PatchWeights>(to));
  return ffi::Error::Success();
}

#ifdef __AVX512BF16__
static ffi::Error run_patches_half(ffi::ThreadPool pool, float epsilon, Numbers in,
                                   ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  PatchesCall call;
  TRY(call.read(epsilon, in, rest));
  REFUSE_UNLESS(call.has_patches(*out), "a result of another size");
  REFUSE_UNLESS(call.sizes.inputs % 2 == 0, "an odd size");
  const outer::Parallel parallel = {share_with, &pool};
  const patches::HalfKernel kernel(call.sizes.inputs, call.sizes.dim, call.weights, parallel);
  patches::project(call.sizes, parallel, pool.num_threads(), in.typed_data(), call.weights, kernel,
                   out->typed_data());
  return ffi::Error::Success();
}
#endif

// === What XLA finds ===

#define CALL() ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define INNER() CALL().Attr<std::string_view>("kernel").Attr<float>("epsilon")
#define OUTER() CALL().Attr<int64_t>("heads").Attr<float>("epsilon")
#define PATCHES() CALL().Attr<float>("epsilon")
// Operands and results. Saved activations are one more result of the forward pass, and one more
// operand of the backward pass.
#define FORWARD() Arg<Numbers>().RemainingArgs().Ret<Numbers>()
#define GRADIENT() Arg<Numbers>().Arg<Numbers>().RemainingArgs().Ret<Numbers>().RemainingRets()

XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_inner, run, INNER().FORWARD());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_inner_gradient, run_gradient, INNER().GRADIENT());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_outer, run_outer, OUTER().FORWARD().Ret<Numbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_outer_gradient, run_outer_gradient,
                              OUTER().Arg<Numbers>().GRADIENT());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_patches, run_patches, PATCHES().FORWARD().Ret<Numbers>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_patches_gradient, run_patches_gradient,
                              PATCHES().Arg<Numbers>().GRADIENT());
#ifdef __AVX512BF16__
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_outer_half, run_outer_half, OUTER().FORWARD());
XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_patches_half, run_patches_half, PATCHES().FORWARD());
#endif

#ifdef REGISTER
#define REGISTER_ON_HOST(name) XLA_FFI_REGISTER_HANDLER(XLA_FFI_GetApi(), #name, "Host", name)
REGISTER_ON_HOST(keras_tnt_inner);
REGISTER_ON_HOST(keras_tnt_inner_gradient);
REGISTER_ON_HOST(keras_tnt_outer);
REGISTER_ON_HOST(keras_tnt_outer_gradient);
REGISTER_ON_HOST(keras_tnt_patches);
REGISTER_ON_HOST(keras_tnt_patches_gradient);
#ifdef __AVX512BF16__
REGISTER_ON_HOST(keras_tnt_outer_half);
REGISTER_ON_HOST(keras_tnt_patches_half);
#endif
#endif
