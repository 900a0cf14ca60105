"""Configuration of a model in a Triton repository, in protobuf text format."""

import json


def configuration(
    name, backend, inputs, outputs, labeled, max_batch_size=8, max_queue_delay=1e-3, instances=1
):
    """Returns the text of a `config.pbtxt`.

    Args:
        name: name of the model.
        backend: Triton backend that runs it.
        inputs: (type, shape without the batch axis) by name.
        outputs: (type, shape without the batch axis) by name.
        labeled: whether `labels.txt` contains class names.
        max_batch_size: as in `keras_tnt.export.triton`. Defaults to 8.
        max_queue_delay: as in `keras_tnt.export.triton`, in seconds. Defaults to 0.001.
        instances: as in `keras_tnt.export.triton`. Defaults to 1.
    """
    labels = {"probabilities": "labels.txt"} if labeled else {}
    # The Python backend's instances are processes that compute on the CPU.
    kind = "KIND_CPU" if backend == "python" else "KIND_AUTO"
    parts = [
        "# Written once; further versions leave what stands here as it is.",
        f"name: {quoted(name)}",
        f"backend: {quoted(backend)}",
        f"max_batch_size: {max_batch_size}",
        *(f"input [ {tensor(key, *value)} ]" for key, value in inputs.items()),
        *(f"output [ {tensor(k, *value, labels.get(k))} ]" for k, value in outputs.items()),
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
        "# Requests that come together are computed together.",
        f"dynamic_batching {{ max_queue_delay_microseconds: {round(1e6 * max_queue_delay)} }}",
        "# A version is served when these have been answered.",
        *(warmup(batch, inputs) for batch in sorted({1, max_batch_size})),
    ]
    return "\n".join(parts) + "\n"


def tensor(name, kind, shape, labels=None):
    """Returns the text of an input or output, with a shape without the batch axis."""
    label = f" label_filename: {quoted(labels)}" if labels else ""
    return f"{{ name: {quoted(name)} data_type: {kind} dims: {sizes(shape)}{label} }}"


def warmup(batch, inputs):
    """Returns the text of a warm-up request of `batch` samples."""
    ((name, (kind, shape)),) = inputs.items()
    data = 'input_data_file: "picture"' if kind == "TYPE_STRING" else "zero_data: true"
    value = f"{{ data_type: {kind} dims: {sizes(shape)} {data} }}"
    return (
        f'model_warmup [ {{ name: "batch of {batch}" batch_size: {batch} '
        f"inputs {{ key: {quoted(name)} value: {value} }} }} ]"
    )


def sizes(shape):
    """Returns the text of a list of integers."""
    return json.dumps(list(shape))


def quoted(text):
    """Returns the text of a string."""
    return json.dumps(text)
