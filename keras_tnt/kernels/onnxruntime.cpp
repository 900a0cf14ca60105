// ONNX Runtime custom operator `InnerTransformer`, the inner (word) transformer block in float32:
// words (batch, patches, words, dim) and the 12 tensors of `Weights` to words of the same shape.
// Attribute: epsilon. Tasks of 16 patches run on ONNX Runtime's intra-op thread pool. The kernel,
// inner_forward.h, is included on the command line.
//
// ONNX Runtime's Python package has no headers, so the part of its C API that is needed is declared
// here. The C ABI guarantees that functions keep their index in the function table, and fields of
// OrtCustomOp their order.
#include <algorithm>
#include <cstddef>

namespace {

// Indices of functions in OrtApi.
enum Place {
  CreateStatus = 0,
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  GetTensorElementType = 60,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_float = 85,
  KernelContext_GetInputCount = 88,
  KernelContext_GetOutputCount = 89,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseTensorTypeAndShapeInfo = 99,
  KernelContext_ParallelFor = 274,
};

using Status = void*;  // OrtStatus*: null on success

// OrtApi, as an array of function pointers.
struct Api {
  void* functions[275];

  template <typename... Arguments>
  Status call(Place place, Arguments... arguments) const {
    return reinterpret_cast<Status (*)(Arguments...)>(functions[place])(arguments...);
  }

  Status error(const char* message) const {
    constexpr int invalid_argument = 2;
    return call(CreateStatus, invalid_argument, message);
  }
};

// Returns the status of a failed call from the enclosing function.
#define TRY(...) \
  if (Status status = (__VA_ARGS__)) return status

constexpr uint32_t api_version = 17;  // the first version with KernelContext_ParallelFor
constexpr size_t inputs = 1 + weight_count, patches_at_once = 16, words_rank = 4;
constexpr int float32 = 1, required = 0;

// State of a node of the graph.
struct Kernel {
  const Api* api;
  float epsilon;
};

// One call of the operator; `run` computes the part of at most `patches_at_once` patches.
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

// Reads the shape of a float32 tensor of this rank. Graphs are untrusted, so type and rank are
// checked.
Status read_shape(const Api& api, void* tensor, size_t rank, int64_t* shape) {
  if (!tensor) return api.error("InnerTransformer misses an input.");
  void* info = nullptr;
  TRY(api.call(GetTensorTypeAndShape, tensor, &info));
  int type = 0;
  size_t found = 0;
  Status status = api.call(GetTensorElementType, info, &type);
  if (!status) status = api.call(GetDimensionsCount, info, &found);
  if (!status && (type != float32 || found != rank))
    status = api.error("InnerTransformer takes tensors of float32, words of rank 4.");
  if (!status) status = api.call(GetDimensions, info, shape, rank);
  api.call(ReleaseTensorTypeAndShapeInfo, info);
  return status;
}

// KernelComputeV2: validates the inputs, allocates the output and runs the block in parallel.
Status compute(void* data, void* context) {
  const Kernel& kernel = *static_cast<Kernel*>(data);
  const Api& api = *kernel.api;
  size_t given = 0, wanted = 0;
  TRY(api.call(KernelContext_GetInputCount, context, &given));
  TRY(api.call(KernelContext_GetOutputCount, context, &wanted));
  if (given != inputs || wanted != 1)
    return api.error("InnerTransformer takes words and their weights, and has one output.");

  Task task;
  void* tensor = nullptr;
  static const auto expected = shapes_of_weights(dim, hidden, words);
  for (size_t i = 1; i < inputs; ++i) {
    int64_t shape[2];
    const WeightShape& weight = expected[i - 1];
    TRY(api.call(KernelContext_GetInput, context, i, &tensor));
    TRY(read_shape(api, tensor, weight.rank(), shape));
    if (!weight.is(shape, weight.rank()))
      return api.error("A weight of InnerTransformer has another shape than it was made for.");
    TRY(api.call(GetTensorMutableData, tensor, &task.in[i]));
  }
  int64_t shape[words_rank];  // batch, patches, words, dim
  TRY(api.call(KernelContext_GetInput, context, size_t{0}, &tensor));
  TRY(read_shape(api, tensor, words_rank, shape));
  if (shape[2] != words || shape[3] != dim)
    return api.error("The words of InnerTransformer have another shape than it was made for.");
  TRY(api.call(GetTensorMutableData, tensor, &task.in[0]));
  TRY(api.call(KernelContext_GetOutput, context, size_t{0}, shape, words_rank, &tensor));
  TRY(api.call(GetTensorMutableData, tensor, &task.out));
  task.epsilon = kernel.epsilon;
  task.patches = shape[0] * shape[1];
  const size_t parts = (task.patches + patches_at_once - 1) / patches_at_once;
  if (!parts) return nullptr;
  return api.call(KernelContext_ParallelFor, context, &Task::run, parts, size_t{0}, &task);
}

// CreateKernelV2: reads the attribute epsilon.
Status create(const void*, const Api* api, const void* info, void** made) {
  float epsilon = 0;
  TRY(api->call(KernelInfoGetAttribute_float, info, "epsilon", &epsilon));
  *made = new Kernel{api, epsilon};
  return nullptr;
}

// OrtCustomOp of API version 16. The V1 callbacks are null: ONNX Runtime calls the V2 ones, which
// can return an error.
struct Operator {
  uint32_t version = 16;  // API version whose fields are declared here
  void* (*create_v1)(const Operator*, const Api*, const void*) = nullptr;
  const char* (*name)(const Operator*) = [](const Operator*) { return "InnerTransformer"; };
  const char* (*provider)(const Operator*) = [](const Operator*) -> const char* {
    return nullptr;  // CPUExecutionProvider
  };
  int (*input_type)(const Operator*, size_t) = [](const Operator*, size_t) { return float32; };
  size_t (*input_count)(const Operator*) = [](const Operator*) { return inputs; };
  int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) { return float32; };
  size_t (*output_count)(const Operator*) = [](const Operator*) { return size_t{1}; };
  void (*compute_v1)(void*, void*) = nullptr;
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  int (*input_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return required; };
  int (*output_kind)(const Operator*, size_t) = [](const Operator*, size_t) { return required; };
  int (*memory)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };  // default
  int (*variadic[4])(const Operator*) = {};  // unused: no variadic inputs or outputs
  Status (*create)(const void*, const Api*, const void*, void**) = ::create;
  Status (*compute)(void*, void*) = ::compute;
} inner_transformer;

struct ApiBase {
  const Api* (*get)(uint32_t version);
};

}  // namespace

// The domain of the operator; runtimes.py sets it before it registers the library in session
// options.
extern "C" {
const char* domain = "keras_tnt";
}

extern "C" Status RegisterCustomOps(void* options, const ApiBase* base) {
  const Api* api = base->get(api_version);
  if (!api) return nullptr;  // Too old: loading a graph with the unknown operator then fails.
  void* created = nullptr;
  TRY(api->call(CreateCustomOpDomain, domain, &created));
  TRY(api->call(CustomOpDomain_Add, created, &inner_transformer));
  return api->call(AddCustomOpDomain, options, created);
}
