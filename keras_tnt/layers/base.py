"""Base class, initializers, rematerialization and helpers that the package's layers share."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

_skips_weight_init = contextvars.ContextVar("skips_weight_init", default=False)
_inference_device: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "inference_device", default=None
)
_attention_interceptor: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "attention_interceptor", default=None
)


def skip_weight_init() -> contextlib.AbstractContextManager:
    """Context manager within which initializers return zeros, because a file fills the weights."""
    return context_value(_skips_weight_init, True)


@contextlib.contextmanager
def context_value(variable: contextvars.ContextVar, value):
    """Context manager that sets a context variable and restores it on exit.

    Args:
        variable: a `contextvars.ContextVar`.
        value: value of the variable within the context.

    Yields:
        `value`.
    """
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def inference_device_scope(device: str) -> contextlib.AbstractContextManager:
    """Context manager within which layers are traced by `compile_inference` for a kind of device.

    Args:
        device: `"cpu"` or `"accelerator"`.
    """
    return context_value(_inference_device, device)


def inference_device() -> str | None:
    """Returns the target of `compile_inference`, "cpu" or "accelerator"; `None` outside of it."""
    return _inference_device.get()


def default_device() -> str:
    """Returns the kind of the backend's default device: "cpu" or "accelerator"."""
    return "cpu" if "cpu" in str(ops.zeros(()).device).lower() else "accelerator"


def intercept_attention(observer: Callable) -> contextlib.AbstractContextManager:
    """Context manager that intercepts attention weights and the weights of words.

    Every attention layer and every `WordsToPatches` called in the context passes its weights to
    `observer` and uses the weights that it returns.

    Args:
        observer: function of `(layer, weights)` that returns weights of the same shape. `weights`
            is the softmax of an attention layer, or ones, one per word, of a `WordsToPatches`.
    """
    return context_value(_attention_interceptor, observer)


def attention_interceptor() -> Callable | None:
    """Returns the observer of the active `intercept_attention` context, or `None`."""
    return _attention_interceptor.get()


class SkippableInitializer(keras.initializers.Initializer):
    """Mixin for initializers that returns zeros within `skip_weight_init()`.

    For the largest models, drawing random values takes longer than loading the weights, and on
    torch and JAX it takes as much memory as the model itself.
    """

    def __call__(self, shape, dtype=None):
        """Returns initial values, or zeros within `skip_weight_init()`."""
        if _skips_weight_init.get():
            return keras.ops.zeros(shape, dtype)
        return super().__call__(shape, dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class TruncatedNormal(SkippableInitializer, keras.initializers.RandomNormal):
    """Normal initializer with values clipped to [-2, 2], as timm's `trunc_normal_`.

    timm truncates at +-2 in absolute terms, which is 100 standard deviations for a `stddev` of
    0.02, so the values have the requested standard deviation. `keras.initializers.TruncatedNormal`
    truncates at two standard deviations, which reduces 0.02 to 0.0176.
    """

    bound = 2.0

    def __call__(self, shape, dtype=None):
        """Returns normal values of `shape`, clipped to [-2, 2]."""
        return ops.clip(super().__call__(shape, dtype), -self.bound, self.bound)


@keras.saving.register_keras_serializable(package="keras_tnt")
class RandomNormal(SkippableInitializer, keras.initializers.RandomNormal):
    """`keras.initializers.RandomNormal` that is skipped within `skip_weight_init()`."""


@keras.saving.register_keras_serializable(package="keras_tnt")
class RandomUniform(SkippableInitializer, keras.initializers.RandomUniform):
    """`keras.initializers.RandomUniform` that is skipped within `skip_weight_init()`."""


def torch_uniform(fan_in: int) -> RandomUniform:
    """Returns a new initializer with the default of PyTorch's `Conv2d` and `Linear`.

    That is Kaiming uniform with a = sqrt(5) for the kernel, and the same range for the bias:
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
        fan_in: number of inputs of one output value.
    """
    bound = fan_in**-0.5
    return RandomUniform(-bound, bound)


class ConfiguredLayer(keras.layers.Layer):
    """Base class of layers that store each constructor argument in an attribute of its name.

    The configuration is derived from the signature of the constructor.
    """

    def get_config(self) -> dict[str, Any]:
        """Returns Keras's configuration of a layer and the arguments of the constructor."""
        config = super().get_config()
        constructor = type(self).__init__
        if constructor is keras.layers.Layer.__init__:  # The layer adds no arguments.
            return config
        parameters = list(inspect.signature(constructor).parameters.values())[1:]  # without self
        names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        return config | {name: getattr(self, name) for name in names}


class CompositeLayer(ConfiguredLayer):
    """Base class of layers made of sublayers, which share the layer's dtype policy.

    `model.quantize("int8")` gives each inner `Dense` a separate policy. The configuration records
    these policies by path, so that a quantized model survives saving and loading.
    """

    # Role of the layer in a model that calls it directly: "stem", "token", "position", "block",
    # "class_block", "merge", or None. `keras_tnt.anatomy` reads it. A custom family declares it on
    # its layers, which may have any base class.
    role: str | None = None

    def get_config(self):
        """Returns the configuration, with the policies of quantized sublayers by path."""
        config = super().get_config()
        quantized = {
            layer.path: layer.dtype_policy
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy)
        }
        if quantized:
            policies = keras.dtype_policies.DTypePolicyMap(default_policy=self.dtype_policy)
            for path, policy in quantized.items():
                policies[path] = policy
            config["dtype"] = keras.dtype_policies.serialize(policies)
        return config

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Returns the `rematerialized` call if `keras.RematScope` selects this layer."""
        chosen = super().rematerialized_call(layer_call, *args, **kwargs) is not layer_call
        return rematerialized(self, layer_call) if chosen else layer_call


def rematerialized(layer: keras.layers.Layer, call: Callable) -> Callable:
    """Returns a layer's call that recomputes activations in the backward pass (checkpointing).

    The recomputation starts from the state before the call, including the seeds, so that it draws
    the same masks; the state is updated once.

    Args:
        layer: the layer, built.
        call: the layer's `call` method.
    """
    if keras.backend.backend() == "torch":
        return keras.remat(call)  # `ReplicaSeedGenerator` replays its seeds on torch.

    is_jax = keras.backend.backend() == "jax"

    def call_rematerialized(*args, **kwargs):
        variables = layer.variables
        trainable = {id(variable) for variable in layer.trainable_variables}
        state = [variable for variable in variables if id(variable) not in trainable]
        # All tensors are arguments, as TensorFlow computes no gradients of captured tensors.
        leaves = keras.tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if ops.is_tensor(leaf)]
        passes = []

        def pure(*tensors):
            inputs = list(leaves)
            for place, tensor in zip(places, tensors[: len(places)], strict=True):
                inputs[place] = tensor
            inputs, keywords = keras.tree.pack_sequence_as((args, kwargs), inputs)
            values = zip(variables, tensors[len(places) :], strict=True)
            with keras.StatelessScope(state_mapping=values) as scope:
                before = [scope.get_current_value(variable) for variable in state]
                outputs = call(*inputs, **keywords)
                after = [scope.get_current_value(variable) for variable in state]
            # The state also contains frozen weights, which do not change.
            changes = [
                (variable, new)
                for variable, old, new in zip(state, before, after, strict=True)
                if new is not old
            ]
            passes.append((outputs, changes))
            if is_jax:
                return outputs, [new for _, new in changes]
            return keras.tree.flatten(outputs)

        tensors = [leaves[place] for place in places]
        tensors += [value_now(variable) for variable in variables]
        results = keras.remat(pure)(*tensors)
        outputs, changes = passes[0]  # The first pass is not a recomputation.
        if is_jax:
            outputs, values = results
        else:
            outputs = keras.tree.pack_sequence_as(outputs, results)
            values = [value for _, value in changes]
        for (variable, _), value in zip(changes, values, strict=True):
            variable.assign(value)
        return outputs

    return call_rematerialized


def value_now(variable: keras.Variable):
    """Returns a variable's value as a tensor that later assignments do not change."""
    if keras.backend.backend() != "tensorflow":
        return variable.value
    import tensorflow as tf

    # `ops.convert_to_tensor` would return the TensorFlow variable itself.
    return tf.convert_to_tensor(variable.value)


@keras.saving.register_keras_serializable(package="keras_tnt")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization` that centers before it scales on JAX.

    The values are the same. Keras applies scale and offset to the uncentered input, whose gradient
    XLA compiles badly: on a CPU, a training step of TNT-S takes 1.75 times as long that way.
    """

    def call(self, inputs):
        """Normalizes `inputs` over `axis`, in float32 or float64; preserves the shape."""
        if keras.backend.backend() != "jax":
            return super().call(inputs)
        x = ops.cast(inputs, at_least_float32(inputs.dtype))
        x -= ops.mean(x, axis=self.axis, keepdims=True)
        variance = ops.mean(ops.square(x), axis=self.axis, keepdims=True)
        gamma, beta = (ops.cast(weight, x.dtype) for weight in (self.gamma, self.beta))
        x = x * (ops.rsqrt(variance + self.epsilon) * gamma) + beta
        return ops.cast(x, self.compute_dtype)


def projection(
    units: int, use_bias: bool = True, *, fan_in: int | None = None, dtype, name: str
) -> keras.layers.Dense:
    """Returns a `Dense` layer with the initialization of the published code.

    Args:
        units: number of outputs.
        use_bias: whether the layer has a bias. Defaults to `True`.
        fan_in: number of inputs, for a layer that is a `Conv2d` in the published code, whose
            `_init_weights` leaves PyTorch's default there. If `None`, the layer is initialized as a
            `Linear`: truncated normal of 0.02, zero bias.
        dtype: dtype policy of the layer.
        name: name of the layer.
    """
    linear = fan_in is None
    return keras.layers.Dense(
        units,
        use_bias=use_bias,
        kernel_initializer=TruncatedNormal(stddev=0.02) if linear else torch_uniform(fan_in),
        bias_initializer="zeros" if linear else torch_uniform(fan_in),
        dtype=dtype,
        name=name,
    )


def slice_tokens(x, count: int | None):
    """Returns the first `count` tokens of `x`, or `x` itself if it or `count` is `None`.

    A slice of all tokens would be a copy in ONNX Runtime.
    """
    return x if x is None or count is None else x[..., :count, :]


def slice_tokens_spec(x, count: int | None, dtype) -> keras.KerasTensor:
    """Returns the symbolic output for the first `count` tokens of `x`; all if it is `None`."""
    return keras.KerasTensor((*x.shape[:-2], count or x.shape[-2], x.shape[-1]), dtype=dtype)


def at_least_float32(dtype) -> str:
    """Returns the dtype for softmax and statistics: float32 instead of float16 and bfloat16."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def gelu(x):
    """Returns exact GELU, `x * Phi(x)`, in the form that each backend compiles and exports best.

    torch has a kernel for `keras.ops.gelu`. TensorFlow computes it with `erfc`, which tf2onnx
    writes to an ONNX file that no runtime loads; `erf` is supported. On JAX, `erf` is 2.4 times as
    fast, but TensorFlow cannot load it from a SavedModel, so only programs of `compile_inference`
    use it.
    """
    backend = keras.backend.backend()
    if backend == "torch" or (backend == "jax" and inference_device() is None):
        return ops.gelu(x, approximate=False)
    half, root_half = (ops.cast(c, x.dtype) for c in (0.5, 0.5**0.5))
    return half * x * (1 + ops.erf(x * root_half))
