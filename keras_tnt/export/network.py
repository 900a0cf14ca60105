"""The float32 model with named outputs that all exporters write."""

import keras
import numpy as np

from keras_tnt.models.anatomy import anatomy, is_ours


def serving_network(model):
    """Returns a float32 functional model with the weights of `model` and a dict of named outputs.

    Args:
        model: a functional model with one input and one output, which is or contains a model of
            this package.

    Returns:
        A model with the outputs `probabilities`, `logits` and, if a single vector reaches the head,
        `features` (for two heads, the mean of their vectors). Without a classifier, the only output
        is `features`.

    Raises:
        ValueError: if the model is not functional, has several inputs or outputs, is quantized, or
            has an unknown input size that the package does not support.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(
            f"A functional keras.Model can be exported. Received: {type(model).__name__}. Of a "
            "Distiller export its student."
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            "A model of one input and one output can be exported. Received: "
            f"{len(model.inputs)} inputs and {len(model.outputs)} outputs."
        )
    if takes_any_size(model) and not (is_ours(model) and anatomy(model).image.channels):
        raise ValueError(
            "Every size of the input but the batch must be known. Received: input shape "
            f"{model.inputs[0].shape}. Build the model with `input_shape`."
        )
    model = as_float32(model)
    network = keras.Model(model.inputs[0], named_outputs(model), name=model.name)
    if isinstance(model.layers[-1], keras.Model):
        check_same(model, network)
    return network


def takes_any_size(model):
    """Returns whether an input size other than the batch is unknown."""
    return None in model.inputs[0].shape[1:]


def check_same(model, network):
    """Raises a ValueError unless a named output equals the model's own output."""
    shape = model.inputs[0].shape[1:]
    if takes_any_size(model):
        shape = anatomy(model).image.native_shape
    images = np.random.default_rng(0).uniform(0, 1, (1, *shape))
    expected = np.asarray(model.predict_on_batch(images))
    outputs = network.predict_on_batch(images).values()
    alike = [np.shape(x) == expected.shape and np.allclose(x, expected, atol=1e-4) for x in outputs]
    if not any(alike):
        raise ValueError(
            f"The layers of model '{model.name}' before its last, the model "
            f"'{model.layers[-1].name}', are no chain. Build it from layers instead, or export "
            f"'{model.layers[-1].name}' alone."
        )


def as_float32(model):
    """Returns `model` if it computes in float32, or a float32 copy."""
    policies = [layer.dtype_policy for layer in all_layers(model)]
    if any(isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy) for policy in policies):
        raise ValueError(
            f"Model '{model.name}' is quantized. Export it as it was before `quantize`; for ONNX, "
            'precision="int8" quantizes the file.'
        )
    if all(policy.name == "float32" for policy in policies):
        return model

    def clone(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.Layer):  # operations have no dtype policy
            config["dtype"] = "float32"
        return type(layer).from_config(config)

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def all_layers(model):
    """Yields the layers of a model and of its nested models."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from all_layers(layer)
        else:
            yield layer


def named_outputs(model):
    """Returns output tensors by name, found from the model's last layers."""
    last, output = model.layers[-1], model.outputs[0]
    if isinstance(last, keras.Model):
        # The layers before it are assumed to be a chain, which `check_same` verifies.
        before = model.layers[-2].output if len(model.layers) > 1 else model.inputs[0]
        return keras.Model(last.inputs[0], named_outputs(last))(before)
    if len(output.shape) != 2:
        return {"features": output}
    if isinstance(last, keras.layers.Dense):
        logits, vectors = without_activation(last), [last.input]
    elif isinstance(last, keras.layers.Activation | keras.layers.Softmax):
        heads = anatomy(model).heads if is_ours(model) else ()
        logits, vectors = last.input, [head.input for head in heads if head in model.layers]
    else:
        return {"features": output}

    if getattr(last, "activation", None) is keras.activations.linear:
        probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
    else:
        probabilities = output
    outputs = {"probabilities": probabilities, "logits": logits}
    if len(vectors) == 2:
        vectors = [keras.layers.Average(dtype="float32", name="features")(vectors)]
    if vectors and len(vectors[0].shape) == 2:
        outputs["features"] = vectors[0]
    return outputs


def without_activation(dense):
    """Returns the logits of a Dense layer, from a linear copy if it has an activation."""
    if dense.activation is keras.activations.linear:
        return dense.output
    linear = keras.layers.Dense(
        dense.units, use_bias=dense.use_bias, dtype="float32", name=f"{dense.name}_logits"
    )
    logits = linear(dense.input)
    linear.set_weights(dense.get_weights())
    return logits
