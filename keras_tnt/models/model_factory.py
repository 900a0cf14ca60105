"""The model class of all families, and its construction from inputs and outputs."""

import functools
import weakref
from collections.abc import Callable

import keras

from keras_tnt.layers import ImageNormalization


@keras.saving.register_keras_serializable(package="keras_tnt")
class ImageModel(keras.Model):
    """Functional model whose dtype policy is that of its layers, also when loaded or cloned.

    Keras neither accepts a policy for a functional model nor saves one, and `compile` reads the
    model's policy to decide about loss scaling, which `"mixed_float16"` needs.

    The first layer, `ImageNormalization`, checks the size of images on every backend.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        """Initializes a functional model; `ImageNormalization` determines its dtype policy."""
        super().__init__(inputs, outputs, name=name, **kwargs)
        input_layers = [layer for layer in self.layers if isinstance(layer, ImageNormalization)]
        if input_layers:
            self.dtype_policy = input_layers[-1].dtype_policy
        layers = [layer for layer in self.layers if not isinstance(layer, keras.layers.InputLayer)]
        if len(self.inputs) == 1 and isinstance(layers[0], ImageNormalization):
            self.input_spec = None  # The error of `ImageNormalization` is more helpful.

    def make_train_function(self, *args, **kwargs):
        """Returns Keras's train function; on JAX, errors do not lose the model's state."""
        return self._recovering("train_function", super().make_train_function, *args, **kwargs)

    def make_test_function(self, *args, **kwargs):
        """Returns Keras's test function; on JAX, errors do not lose the model's state."""
        return self._recovering("test_function", super().make_test_function, *args, **kwargs)

    def make_predict_function(self, *args, **kwargs):
        """Returns Keras's predict function; on JAX, errors do not lose the model's state."""
        return self._recovering("predict_function", super().make_predict_function, *args, **kwargs)

    def _recovering(self, name, make, *args, **kwargs):
        """Returns a step function that restores the model's state if it raises an error."""
        before = getattr(self, name)
        result = make(*args, **kwargs)
        made = getattr(self, name)
        if keras.backend.backend() != "jax" or made is before:
            return result
        setattr(self, name, recovering(self, made))
        return result and getattr(self, name)


def recovering(model: keras.Model, step: Callable) -> Callable:
    """Returns a JAX step function that restores the model's variables if it raises an error.

    Keras detaches the variables' values from the model during a step, and loses them if the first
    batch cannot be computed.

    Args:
        model: the model that is trained, evaluated or used for prediction.
        step: function from (values, iterator of batches) to the step's results and new values.
    """

    @functools.wraps(step)
    def step_or_recover(state, iterator):
        try:
            return step(state, iterator)
        except Exception:
            groups = [model.trainable_variables, model.non_trainable_variables]
            if len(state) > 3:
                groups.append(model.optimizer.variables)
            if len(state) > 2:
                groups.append(model.metrics_variables)
            for variables, values in zip(groups, state, strict=True):
                for variable, value in zip(variables, values, strict=True):
                    if not value.is_deleted():
                        variable.assign(value)
            model._jax_state_synced = True
            raise

    return step_or_recover


# Names of the layers of this package's models, by the input tensor that they are built upon.
_names_upon = weakref.WeakKeyDictionary()


def make_model(inputs, outputs, name: str) -> keras.Model:
    """Builds the model from its input, which may be the output of other layers.

    If a layer name is already used upstream of `inputs`, or by another model on the same input,
    every layer name is prefixed with the model's name.

    Args:
        inputs: Keras tensor of images.
        outputs: predictions or features.
        name: name of the model.
    """
    sources = keras.utils.get_source_inputs(inputs)
    ours = keras.Model(inputs, outputs).operations
    ours = [each for each in ours if not isinstance(each, keras.layers.InputLayer)]
    taken = set().union(*(_names_upon.get(source, ()) for source in sources))
    if not any(inputs is source for source in sources):
        taken |= {operation.name for operation in keras.Model(sources, inputs).operations}
    prefix, number = "", 0
    while taken & {prefix + each.name for each in ours}:
        prefix = f"{name}_{number}_" if number else f"{name}_"
        number += 1
    for each in ours if prefix else ():
        each.name = prefix + each.name
    for source in sources:
        _names_upon.setdefault(source, set()).update(each.name for each in ours)
    return ImageModel(sources[0] if len(sources) == 1 else sources, outputs, name=name)


def find_input_normalization(model: keras.Model) -> ImageNormalization:
    """Returns the model's `ImageNormalization`, the last one if it is built upon another model."""
    return [layer for layer in model.layers if isinstance(layer, ImageNormalization)][-1]
