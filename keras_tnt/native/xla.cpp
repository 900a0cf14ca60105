// XLA's custom calls, for JAX and TensorFlow. Operands are words `(..., words, dim)`, tokens `(batch,
// tokens, dim)` or the words of each patch side by side, `(batch, patches, inputs)`; the weights in the
// order of `Weights` or `PatchWeights`; and, if a branch may be skipped, `keep`. In the gradient's calls
// what is to be propagated back, and what the forward pass kept, stand in front. Those of the inner
// transformer are kernels of one size each, which the attribute `kernel` names.
#include <algorithm>
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

extern "C" void keras_tnt_add_kernel(const char* name, const Kernel* kernel) {
  std::lock_guard<std::mutex> lock(guard);
  kernels[name] = kernel;
}

// Calls part(i) for each i from 0 to before `parts`. Whoever is free takes the next; the calling
// thread too, so that it waits for none that no one has begun.
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

// Fills in pointers to the weights. Returns `keep`: null where every branch is computed.
template <int count>
static const float* read_weights(ffi::RemainingArgs rest, const float* (&weights)[count]) {
  for (int i = 0; i < count; ++i) weights[i] = rest.get<Numbers>(i)->typed_data();
  return rest.size() > count ? rest.get<Numbers>(count)->typed_data() : nullptr;
}

// Where the gradients of the weights go.
template <int count>
struct Pointers {
  float* at[count];

  explicit Pointers(ffi::RemainingRets gradients) {
    for (int i = 0; i < count; ++i) at[i] = (*gradients.get<Numbers>(i))->typed_data();
  }
};

// === The inner transformer ===

// What both calls are given, but for the words.
struct Call {
  const Kernel* kernel;
  const float* weights[weight_count];
  const float* keep;
  int64_t patches;
};

static ffi::ErrorOr<Call> read(std::string_view name, Numbers in, ffi::RemainingArgs rest) {
  Call call;
  {
    std::lock_guard<std::mutex> lock(guard);
    const auto found = kernels.find(name);
    if (found == kernels.end())
      return ffi::Unexpected(ffi::Error::InvalidArgument(
          "No inner transformer of these sizes was loaded: " + std::string(name)));
    call.kernel = found->second;
  }
  call.keep = read_weights(rest, call.weights);
  call.patches = in.element_count() / call.kernel->patch_size;
  return call;
}

static ffi::Error run(ffi::ThreadPool pool, std::string_view name, float epsilon, Numbers in,
                      ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  constexpr int64_t at_once = 16;
  const ffi::ErrorOr<Call> found = read(name, in, rest);
  if (!found.has_value()) return found.error();
  const Call& call = *found;
  share(pool, (call.patches + at_once - 1) / at_once, [&](int64_t i) {
    call.kernel->run(in.typed_data(), out->typed_data(), call.weights, call.keep, epsilon,
                     call.patches, i * at_once, std::min((i + 1) * at_once, call.patches));
  });
  return ffi::Error::Success();
}

// The weights' gradients are summed in rows that do not depend on the threads, and so equal calls
// give equal sums.
static ffi::Error run_gradient(ffi::ThreadPool pool, std::string_view name, float epsilon,
                               Numbers dout, Numbers in, ffi::RemainingArgs rest,
                               ffi::Result<Numbers> din, ffi::RemainingRets gradients) {
  const ffi::ErrorOr<Call> found = read(name, in, rest);
  if (!found.has_value()) return found.error();
  const Call& call = *found;
  const int64_t size = call.kernel->sums_size;
  const int64_t rows = std::clamp<int64_t>(call.patches, 1, 64);
  Space space;
  float* sums = space.zeros(rows * size);
  share(pool, rows, [&](int64_t i) {
    call.kernel->run_gradient(in.typed_data(), dout.typed_data(), din->typed_data(), call.weights,
                              call.keep, sums + i * size, epsilon, call.patches,
                              call.patches * i / rows, call.patches * (i + 1) / rows);
  });
  const Pointers<weight_count> to(gradients);
  call.kernel->add_up(sums, rows, to.at);
  return ffi::Error::Success();
}

// === The outer transformer ===

static void share_with(void* pool, int64_t parts, void (*part)(void*, int64_t), void* data) {
  share(*static_cast<ffi::ThreadPool*>(pool), parts, [=](int64_t i) { part(data, i); });
}

struct OuterCall {
  outer::Sizes sizes;
  Weights<> weights;
  const float* keep;

  OuterCall(int64_t heads, float epsilon, Numbers in, ffi::RemainingArgs rest) {
    const float* pointers[weight_count];
    keep = read_weights(rest, pointers);
    weights = as_weights(pointers);
    const auto shape = in.dimensions();
    const int64_t hidden = rest.get<Numbers>(fc1_bias)->element_count();
    sizes = {shape[0], shape[1], shape[2], heads, hidden, epsilon};
  }
};

// What making a program took, hundreds of MiB, is given back before its first step takes as much. A
// program is known by the shape of its tokens.
static void give_back_before_first_step(Numbers tokens) {
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
  const OuterCall call(heads, epsilon, in, rest);
  give_back_before_first_step(in);
  outer::transform(call.sizes, {share_with, &pool}, in.typed_data(), call.weights, call.keep,
                   out->typed_data(), outer::Kept(kept->typed_data(), call.sizes));
  return ffi::Error::Success();
}

static ffi::Error run_outer_gradient(ffi::ThreadPool pool, int64_t heads, float epsilon,
                                     Numbers dout, Numbers kept, Numbers in,
                                     ffi::RemainingArgs rest, ffi::Result<Numbers> din,
                                     ffi::RemainingRets gradients) {
  const OuterCall call(heads, epsilon, in, rest);
  const Pointers<weight_count> to(gradients);
  const float* from = kept.typed_data();
  outer::transform_gradient(call.sizes, {share_with, &pool}, in.typed_data(), dout.typed_data(),
                            call.weights, call.keep, outer::Kept(from, call.sizes),
                            din->typed_data(), as_weights(to.at));
  return ffi::Error::Success();
}

#ifdef __AVX512BF16__
static ffi::Error run_outer_half(ffi::ThreadPool pool, int64_t heads, float epsilon, Numbers in,
                                 ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  const OuterCall call(heads, epsilon, in, rest);
  const outer::Parallel parallel = {share_with, &pool};
  const outer::HalfKernels kernels(call.sizes.dim, call.sizes.hidden, call.weights, parallel);
  outer::transform(call.sizes, parallel, pool.num_threads(), in.typed_data(), call.weights, kernels,
                   out->typed_data());
  return ffi::Error::Success();
}
#endif

// === From words to patches ===

struct PatchesCall {
  patches::Sizes sizes;
  PatchWeights<> weights;

  PatchesCall(float epsilon, Numbers in, ffi::RemainingArgs rest) {
    const float* pointers[count_of<PatchWeights>];
    read_weights(rest, pointers);
    weights = as_weights<PatchWeights>(pointers);
    const auto shape = in.dimensions();
    sizes = {shape[0], shape[1], shape[2], rest.get<Numbers>(patch_bias)->element_count(), epsilon};
  }
};

static ffi::Error run_patches(ffi::ThreadPool pool, float epsilon, Numbers in,
                              ffi::RemainingArgs rest, ffi::Result<Numbers> out,
                              ffi::Result<Numbers> kept) {
  const PatchesCall call(epsilon, in, rest);
  patches::project(call.sizes, {share_with, &pool}, in.typed_data(), call.weights,
                   out->typed_data(), kept->typed_data());
  return ffi::Error::Success();
}

static ffi::Error run_patches_gradient(ffi::ThreadPool pool, float epsilon, Numbers dout,
                                       Numbers kept, Numbers in, ffi::RemainingArgs rest,
                                       ffi::Result<Numbers> din, ffi::RemainingRets gradients) {
  const PatchesCall call(epsilon, in, rest);
  const Pointers<count_of<PatchWeights>> to(gradients);
  patches::project_gradient(call.sizes, {share_with, &pool}, in.typed_data(), dout.typed_data(),
                            call.weights, kept.typed_data(), din->typed_data(),
                            as_weights<PatchWeights>(to.at));
  return ffi::Error::Success();
}

#ifdef __AVX512BF16__
static ffi::Error run_patches_half(ffi::ThreadPool pool, float epsilon, Numbers in,
                                   ffi::RemainingArgs rest, ffi::Result<Numbers> out) {
  const PatchesCall call(epsilon, in, rest);
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
// Operands and results. Where the forward pass keeps something it is one more of either.
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
