"""Warm-up requests, which TF Serving runs on a version before it serves it."""

import os

FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")


def warmup_requests(model_name, requests):
    """Returns serialized `PredictionLog`s.

    Args:
        model_name: name of the model on the server.
        requests: (signature, input name, array, ...) tuples.
    """
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    logs = []
    for signature, name, value, *_ in requests:
        log = prediction_log_pb2.PredictionLog()
        if signature == "classify":
            request = log.classify_log.request
            for serialized in value:
                request.input.example_list.examples.add().ParseFromString(serialized)
        else:
            request = log.predict_log.request
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        request.model_spec.name = model_name
        request.model_spec.signature_name = signature
        logs.append(log.SerializeToString())
    return logs


def write_warmup(folder, logs):
    """Writes a SavedModel's warm-up file, a TFRecord of `warmup_requests`' logs."""
    import tensorflow as tf

    path = os.path.join(folder, FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tf.io.TFRecordWriter(path) as writer:
        for log in logs:
            writer.write(log)


def image_example(picture):
    """Returns the serialized tf.Example of an encoded image that signature `classify` takes."""
    import tensorflow as tf

    value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[picture]))
    features = tf.train.Features(feature={"image/encoded": value})
    return tf.train.Example(features=features).SerializeToString()
