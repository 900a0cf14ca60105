"""Keras models as TensorFlow functions and as SavedModel signatures."""

import keras

from keras_tnt.export.image import load_images
from keras_tnt.export.pictures import TOP, normalization_of


def tensorflow_function(network):
    """Returns a TensorFlow function that computes `network`.

    Args:
        network: a functional Keras model, on the TensorFlow or JAX backend.

    Returns:
        `(function, variables)`: a function from images to the dict of outputs, and the
        `tf.Variable`s that it reads.
    """
    import tensorflow as tf

    if keras.backend.backend() == "tensorflow":
        return lambda images: network(images, training=False), [v.value for v in network.variables]

    from jax.experimental import jax2tf

    def stateless(weights, images):
        with keras.StatelessScope(list(zip(network.variables, weights, strict=True))):
            return network(images, training=False)

    shape = ", ".join(map(str, network.inputs[0].shape[1:]))
    converted = jax2tf.convert(
        stateless,
        with_gradient=False,
        polymorphic_shapes=[None, f"(batch, {shape})"],
        # An export from a machine with a GPU must run on a server without one.
        native_serialization_platforms=("cpu", "cuda"),
    )
    variables = [
        tf.Variable(keras.ops.convert_to_numpy(v), trainable=False, name=v.path.replace("/", "_"))
        for v in network.variables
    ]
    return lambda images: converted(list(variables), images), variables


def serving_module(network, card, labels_file, signatures):
    """Builds the module and the signatures of a SavedModel.

    Args:
        network: a `serving_network`.
        card: metadata as returned by `describe`.
        labels_file: path of a text file with one label per line, which becomes an asset. If `None`,
            the module has no labels.
        signatures: names of the signatures to build.

    Returns:
        `(module, functions)`: a `tf.Module` that tracks everything the functions use, and the
        functions by signature name. They are traced already, because `tf.saved_model.save` would
        trace them a second time otherwise.
    """
    import tensorflow as tf

    module = tf.Module()
    function, module.network_variables = tensorflow_function(network)
    images_spec = tf.TensorSpec((None, *network.inputs[0].shape[1:]), tf.float32, name="images")
    bytes_spec = tf.TensorSpec((None,), tf.string, name="image_bytes")
    # The signatures call these functions, so that the file contains the network and the decoders
    # once.
    function = tf.function(function, input_signature=[images_spec], autograph=False)

    @tf.function(input_signature=[bytes_spec], autograph=False)
    def decoded(image_bytes):
        pixels = load_images(
            image_bytes, card["image_size"], card["resized_to_cover"], card["channels"]
        )
        return model_input(pixels, card)

    if labels_file:
        module.labels = tf.lookup.StaticHashTable(
            tf.lookup.TextFileInitializer(
                labels_file,
                tf.int64,
                tf.lookup.TextFileIndex.LINE_NUMBER,
                tf.string,
                tf.lookup.TextFileIndex.WHOLE_LINE,
            ),
            default_value="",
        )

    def top(outputs):
        count = min(TOP, outputs["probabilities"].shape[-1])
        scores, places = tf.math.top_k(outputs["probabilities"], count)
        return {"classes": module.labels.lookup(tf.cast(places, tf.int64)), "scores": scores}

    def serving_default(images):
        return named(function(images), ("probabilities", "logits"))

    def features(images):
        return named(function(images), ("features",))

    def serving_bytes(image_bytes):
        outputs = function(decoded(image_bytes))
        if "probabilities" not in outputs:
            return named(outputs, ("features",))
        return {**top(outputs), **named(outputs, ("probabilities",))}

    def classify(inputs):
        feature = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
        image_bytes = tf.io.parse_example(inputs, feature)["image/encoded"]
        return top(function(decoded(image_bytes)))

    examples_spec = tf.TensorSpec((None,), tf.string, name="inputs")
    all_functions = {
        "serving_default": (serving_default, images_spec),
        "serving_bytes": (serving_bytes, bytes_spec),
        "classify": (classify, examples_spec),
        "features": (features, images_spec),
    }
    functions = {}
    for name in signatures:
        python_function, spec = all_functions[name]
        traced = tf.function(python_function, input_signature=[spec], autograph=False)
        functions[name] = traced.get_concrete_function()
    return module, functions


def model_input(pixels, card):
    """Converts pixels (batch, height, width, channels) in [0, 255] to the model's input."""
    import tensorflow as tf

    if card["input"] == "normalised":
        mean, std = normalization_of(card)
        pixels = (pixels / 255.0 - mean) / std
    if card["data_format"] == "channels_first":
        pixels = tf.transpose(pixels, (0, 3, 1, 2))  # (b, c, h, w)
    return pixels


def named(outputs, names):
    """Returns those of the named outputs that exist, or `features` if there are none."""
    import tensorflow as tf

    names = [name for name in names if name in outputs] or ["features"]
    return {name: tf.identity(outputs[name], name) for name in names}
