// XLA's custom calls, for JAX and TensorFlow, of the kernels of all sizes: the attribute `kernel`
// names one. Operands are words, `(..., words, dim)`, in the gradient's call what is to be propagated
// back too, the weights in the order of `Weights`, and, if a branch may be skipped, `keep`.
#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

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

// What both calls are given, but for the words.
struct Call {
  const Kernel* kernel;
  std::vector<const float*> weights;
  const float* keep;  // null: every branch is computed
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
  const int64_t count = call.kernel->weight_count;
  for (int64_t i = 0; i < count; ++i) call.weights.push_back(rest.get<Numbers>(i)->typed_data());
  const bool skips = static_cast<int64_t>(rest.size()) > count;
  call.keep = skips ? rest.get<Numbers>(count)->typed_data() : nullptr;
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
    call.kernel->run(in.typed_data(), out->typed_data(), call.weights.data(), call.keep, epsilon,
                     call.patches, i * at_once, std::min((i + 1) * at_once, call.patches));
  });
  return ffi::Error::Success();
}

// The weights' gradients are summed in rows that do not depend on the threads, and so equal calls
// give equal sums.
static ffi::Error run_gradient(ffi::ThreadPool pool, std::string_view name, float epsilon,
                               Numbers in, Numbers dout, ffi::RemainingArgs rest,
                               ffi::Result<Numbers> din, ffi::Result<Numbers> sums) {
  const ffi::ErrorOr<Call> found = read(name, in, rest);
  if (!found.has_value()) return found.error();
  const Call& call = *found;
  const int64_t count = call.kernel->gradient_count, rows = std::min<int64_t>(64, call.patches);
  const std::unique_ptr<float[]> row(new float[rows * count]);
  share(pool, rows, [&](int64_t i) {
    std::fill_n(&row[i * count], count, 0.0f);
    call.kernel->run_gradient(in.typed_data(), dout.typed_data(), din->typed_data(),
                              call.weights.data(), call.keep, &row[i * count], epsilon,
                              call.patches, call.patches * i / rows,
                              call.patches * (i + 1) / rows);
  });
  float* total = sums->typed_data();
  std::fill_n(total, count, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j) total[j] += row[i * count + j];
  return ffi::Error::Success();
}

#define WITH_SETTINGS() \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<std::string_view>("kernel").Attr<float>("epsilon")

XLA_FFI_DEFINE_HANDLER_SYMBOL(keras_tnt_inner_transformer, run,
                              WITH_SETTINGS().Arg<Numbers>().RemainingArgs().Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    keras_tnt_inner_transformer_gradient, run_gradient,
    WITH_SETTINGS().Arg<Numbers>().Arg<Numbers>().RemainingArgs().Ret<Numbers>().Ret<Numbers>());

#ifdef REGISTER
XLA_FFI_REGISTER_HANDLER(XLA_FFI_GetApi(), "keras_tnt_inner_transformer", "Host",
                         keras_tnt_inner_transformer);
XLA_FFI_REGISTER_HANDLER(XLA_FFI_GetApi(), "keras_tnt_inner_transformer_gradient", "Host",
                         keras_tnt_inner_transformer_gradient);
#endif
