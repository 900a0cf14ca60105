"""What every layer of this package that is made of other layers has in common."""

import contextlib
import contextvars
from collections.abc import Callable

import keras
from keras import ops

_draws_initial_values = contextvars.ContextVar("draws_initial_values", default=True)
_inference_device = contextvars.ContextVar("inference_device", default=None)

_link_observer = contextvars.ContextVar("link_observer", default=None)


def without_initial_values() -> contextlib.AbstractContextManager:
    """Within the context, layers draw no initial values: all will be filled from a file."""
    return context_value(_draws_initial_values, False)


@contextlib.contextmanager
def context_value(variable, value):
    """Within the context, a context variable has this value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def inference_on(device: str) -> contextlib.AbstractContextManager:
    """Within the context, layers are called for `compile_inference`, on this kind of device."""
    return context_value(_inference_device, device)


def inference_device() -> str | None:
    """What `compile_inference` compiles for: "cpu", "accelerator"; None outside of its programs."""
    return _inference_device.get()


def default_device() -> str:
    """Where the backend computes what it is not told where: "cpu" or "accelerator"."""
    return "cpu" if "cpu" in str(ops.zeros(()).device).lower() else "accelerator"


def observing_links(observer: Callable) -> contextlib.AbstractContextManager:
    """Within the context, a function sees by how much each word and patch is read.

    Args:
        observer: from a layer and its weights, an attention layer's softmax or a one for each word
            that `WordsToPatches` reads, to the weights that the layer is to use.
    """
    return context_value(_link_observer, observer)


def link_observer() -> Callable | None:
    """The function that `observing_links` was given; None outside of it."""
    return _link_observer.get()


class SkipsDrawing:
    """A mixin for initializers: returns zeros within `without_initial_values()`.

    For the largest models drawing takes longer than loading, and on torch and JAX as much memory
    as the model again.
    """

    def __call__(self, shape, dtype=None):
        if not _draws_initial_values.get():
            return keras.ops.zeros(shape, dtype)
        return super().__call__(shape, dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class TruncatedNormal(SkipsDrawing, keras.initializers.RandomNormal):
    """Normal values clipped to [-2, 2], as timm's `trunc_normal_` has them.

    timm cuts at +-2 in absolute terms, 100 standard deviations where `stddev` is 0.02, so the
    values have the standard deviation that is asked for. `keras.initializers.TruncatedNormal` cuts
    at two standard deviations, which leaves 0.0176 of 0.02.
    """

    bound = 2.0

    def __call__(self, shape, dtype=None):
        return ops.clip(super().__call__(shape, dtype), -self.bound, self.bound)


@keras.saving.register_keras_serializable(package="keras_tnt")
class RandomNormal(SkipsDrawing, keras.initializers.RandomNormal):
    """`keras.initializers.RandomNormal`, skipped where all values are loaded from a file."""


@keras.saving.register_keras_serializable(package="keras_tnt")
class RandomUniform(SkipsDrawing, keras.initializers.RandomUniform):
    """`keras.initializers.RandomUniform`, skipped where all values are loaded from a file."""


def torch_uniform(fan_in):
    """Returns a new initializer with the default of PyTorch's `Conv2d` and `Linear`.

    Kaiming uniform with a = sqrt(5) for the kernel, and the same range for the bias:
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
        fan_in: number of inputs of one output value.
    """
    bound = fan_in**-0.5
    return RandomUniform(-bound, bound)


class CompositeLayer(keras.layers.Layer):
    """A layer made of sublayers, which share its dtype policy.

    `model.quantize("int8")` gives each `Dense` inside a policy of its own. The configuration
    records those by path, so that a quantized model is saved and loaded as one.
    """

    # What this layer is to a model that calls it by itself: "stem", "token", "position", "block",
    # "class_block", "merge", or None. `keras_tnt.anatomy` reads it; a family of one's own declares
    # it on its own layers, whatever their base class.
    part = None

    def get_config(self):
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
        """Under `keras.RematScope`, if its mode chooses this layer, see `rematerialized`."""
        chosen = super().rematerialized_call(layer_call, *args, **kwargs) is not layer_call
        return rematerialized(self, layer_call) if chosen else layer_call


def rematerialized(layer: keras.layers.Layer, call: Callable) -> Callable:
    """Returns a layer's call whose activations are recomputed in the backward pass, not saved.

    The recomputation is handed the state from before the call, seeds above all, so that it draws
    the same masks, and the state moves on once.

    Args:
        layer: the layer, built.
        call: its method `call`.
    """
    if keras.backend.backend() == "torch":
        return keras.remat(call)  # `ReplicaSeedGenerator` replays its seeds there

    is_jax = keras.backend.backend() == "jax"

    def call_rematerialized(*args, **kwargs):
        variables = layer.variables
        trainable = {id(variable) for variable in layer.trainable_variables}
        state = [variable for variable in variables if id(variable) not in trainable]
        # All tensors are arguments: TensorFlow has no gradient of those that a closure holds.
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
            # Frozen weights are part of the state and do not change.
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
        outputs, changes = passes[0]  # of the pass that is not a recomputation
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
    """Returns a variable's value as a tensor, which later assignments do not change."""
    if keras.backend.backend() != "tensorflow":
        return variable.value
    import tensorflow as tf

    # Not `ops.convert_to_tensor`, to which a variable of TensorFlow is a tensor already.
    return tf.convert_to_tensor(variable.value)


@keras.saving.register_keras_serializable(package="keras_tnt")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, which on JAX centres first and scales what is centred.

    The numbers are the same. Keras multiplies and adds around the uncentred input, whose gradient
    XLA compiles badly: a training step of TNT-S takes 1.75 times as long so on a CPU.
    """

    def call(self, inputs):
        if keras.backend.backend() != "jax":
            return super().call(inputs)
        x = ops.cast(inputs, at_least_float32(inputs.dtype))
        x -= ops.mean(x, axis=self.axis, keepdims=True)
        variance = ops.mean(ops.square(x), axis=self.axis, keepdims=True)
        gamma, beta = (ops.cast(weight, x.dtype) for weight in (self.gamma, self.beta))
        x = x * (ops.rsqrt(variance + self.epsilon) * gamma) + beta
        return ops.cast(x, self.compute_dtype)


def projection(units, use_bias=True, *, fan_in=None, dtype, name):
    """Returns a `Dense` layer with the initial values of the published code.

    Args:
        units: number of outputs.
        use_bias: whether the layer has a bias.
        fan_in: number of inputs, for a layer that is a `Conv2d` in the published code, whose
            `_init_weights` leave PyTorch's default there. If `None`, the layer starts as a
            `Linear` does: truncated normal of 0.02, zero bias.
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


def take_first(x, count):
    """The first `count` tokens of x, or all; a slice of all would be a copy in ONNX Runtime."""
    return x if count is None else x[..., :count, :]


def take_first_spec(x, count, dtype):
    """The symbolic result of a layer that computes the first `count` tokens of x, or all."""
    return keras.KerasTensor((*x.shape[:-2], count or x.shape[-2], x.shape[-1]), dtype=dtype)


def at_least_float32(dtype):
    """The dtype in which softmax and statistics of a tensor of `dtype` are computed."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def gelu(x):
    """Exact GELU, `x * Phi(x)`, in the form that each backend compiles and exports best.

    `keras.ops.gelu` is one kernel on torch. On TensorFlow it is written with `erfc`, which tf2onnx
    puts into an ONNX file that no runtime loads; `erf` it has. On JAX it is the other way about:
    `erf` is 2.4 times as fast, but TensorFlow does not read it from a SavedModel; so it is for
    programs that `compile_inference` makes.
    """
    backend = keras.backend.backend()
    if backend == "torch" or (backend == "jax" and inference_device() is None):
        return ops.gelu(x, approximate=False)
    half, root_half = (ops.cast(c, x.dtype) for c in (0.5, 0.5**0.5))
    return half * x * (1 + ops.erf(x * root_half))
