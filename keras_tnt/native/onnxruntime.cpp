// ONNX Runtime's custom operator `InnerTransformer`: words and the weights to words, epsilon an
// attribute.
//
// Its package for Python brings no headers. What is needed of its C interface stands here; that
// promises never to move a function's place, nor a field of a custom operator.
#include <algorithm>
#include <cstddef>

namespace {

enum Place {
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  GetDimensions = 62,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_float = 85,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseTensorTypeAndShapeInfo = 99,
  KernelContext_ParallelFor = 274,
};

struct Api {
  void* functions[275];

  // Most return a status, null where they succeed; none fails for what a checked graph holds.
  template <typename... Arguments>
  void call(Place place, Arguments... arguments) const {
    reinterpret_cast<void* (*)(Arguments...)>(functions[place])(arguments...);
  }
};

constexpr uint32_t api_version = 17;  // the first that has KernelContext_ParallelFor
constexpr size_t inputs = 1 + weight_count, patches_at_once = 16;
constexpr int float32 = 1, required = 0;

struct Kernel {
  const Api* api;
  float epsilon;
};

struct Task {
  const float* in[inputs];
  float* out;
  float epsilon;
  int64_t patches;

  static void run(void* data, size_t part) {
    const Task& task = *static_cast<Task*>(data);
    const int64_t first = part * patches_at_once;
    const int64_t last = std::min<int64_t>(first + patches_at_once, task.patches);
    Forward{as_weights(task.in + 1), task.epsilon}(task.in[0], task.out, first, last);
  }
};

void compute(void* data, void* context) {
  const Kernel& kernel = *static_cast<Kernel*>(data);
  const Api& api = *kernel.api;
  Task task;
  void *tensor, *info;
  for (size_t i = inputs; i-- > 0;) {  // the words last
    api.call(KernelContext_GetInput, context, i, &tensor);
    api.call(GetTensorMutableData, tensor, &task.in[i]);
  }
  constexpr size_t rank = 4;
  int64_t shape[rank];  // batch, patches, words, dim
  api.call(GetTensorTypeAndShape, tensor, &info);
  api.call(GetDimensions, info, shape, rank);
  api.call(ReleaseTensorTypeAndShapeInfo, info);
  api.call(KernelContext_GetOutput, context, size_t{0}, shape, rank, &tensor);
  api.call(GetTensorMutableData, tensor, &task.out);
  task.epsilon = kernel.epsilon;
  task.patches = shape[0] * shape[1];
  const size_t parts = (task.patches + patches_at_once - 1) / patches_at_once;
  api.call(KernelContext_ParallelFor, context, &Task::run, parts, size_t{0}, &task);
}

struct Operator {
  uint32_t version = 8;  // the fields that stand here
  void* (*create)(const Operator*, const Api*, const void*) =
      [](const Operator*, const Api* api, const void* info) -> void* {
    auto kernel = new Kernel{api, 0.0f};
    api->call(KernelInfoGetAttribute_float, info, "epsilon", &kernel->epsilon);
    return kernel;
  };
  const char* (*name)(const Operator*) = [](const Operator*) { return "InnerTransformer"; };
  const char* (*provider)(const Operator*) = [](const Operator*) -> const char* {
    return nullptr;  // the CPU
  };
  int (*input_type)(const Operator*, size_t) = [](const Operator*, size_t) { return float32; };
  size_t (*input_count)(const Operator*) = [](const Operator*) { return inputs; };
  int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) { return float32; };
  size_t (*output_count)(const Operator*) = [](const Operator*) { return size_t{1}; };
  void (*compute)(void*, void*) = ::compute;
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  int (*input_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return required; };
  int (*output_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return required; };
} inner_transformer;

struct ApiBase {
  const Api* (*get)(uint32_t version);
};

}  // namespace

// The operator's domain in the options that it is registered with next.
extern "C" {
const char* domain = "keras_tnt";
}

extern "C" void* RegisterCustomOps(void* options, const ApiBase* base) {
  const Api* api = base->get(api_version);
  if (!api) return nullptr;  // too old: the operator stays unknown, which is what will be said
  void* created;
  api->call(CreateCustomOpDomain, domain, &created);
  api->call(CustomOpDomain_Add, created, &inner_transformer);
  api->call(AddCustomOpDomain, options, created);
  return nullptr;
}
