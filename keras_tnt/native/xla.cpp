// XLA's custom call, for JAX, and under NAME for TensorFlow.
#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Words = ffi::Buffer<ffi::F32>;

// Whoever is free takes the next few patches; the calling thread too, so that it waits for none
// that no one has begun.
static ffi::Error run(ffi::ThreadPool pool, float epsilon, Words in, ffi::RemainingArgs rest,
                      ffi::Result<Words> out) {
  constexpr int64_t patches_at_once = 16;
  struct Work {
    Weights weights;
    std::atomic<int64_t> next{0}, done{0};
  };
  std::array<const float*, weight_count> pointers;
  for (int i = 0; i < weight_count; ++i) pointers[i] = rest.get<Words>(i)->typed_data();
  auto work = std::make_shared<Work>();
  work->weights = as_weights(pointers.data());
  const float* from = in.typed_data();
  float* to = out->typed_data();
  const int64_t patches = in.element_count() / (words * dim);
  const auto take = [=] {
    for (int64_t first; (first = work->next.fetch_add(patches_at_once)) < patches;) {
      const int64_t last = std::min(first + patches_at_once, patches);
      transform(from, to, work->weights, epsilon, first, last);
      work->done.fetch_add(last - first);
    }
  };
  for (int64_t i = std::min(pool.num_threads(), patches / patches_at_once); i > 1; --i)
    pool.Schedule([take] { take(); });
  take();
  while (work->done.load() < patches) std::this_thread::yield();
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(inner_transformer, run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("epsilon")
                                  .Arg<Words>()
                                  .RemainingArgs()
                                  .Ret<Words>());

#ifdef NAME
XLA_FFI_REGISTER_HANDLER(XLA_FFI_GetApi(), NAME, "Host", inner_transformer);
#endif
