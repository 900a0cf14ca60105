"""Quantization of the dense layers in an ONNX graph to int8."""

import numpy as np

from keras_tnt.export.onnx_fusion import Graph


def check_calibration(images, precision, network) -> np.ndarray | None:
    """Returns the calibration images as float32, or `None` if there are none.

    Args:
        images: the images that the user passed. If `None`, there are none.
        precision: precision of the file.
        network: the network to export.

    Raises:
        ValueError: if images are given for another precision than int8, do not have the model's
            input shape, or are not finite.
    """
    if images is None:
        return None
    if precision != "int8":
        raise ValueError(
            f"`calibration` is for precision='int8'. Received: precision={precision!r}"
        )
    images = np.asarray(images, "float32")
    wanted = tuple(network.inputs[0].shape)
    fits = len(images.shape) == len(wanted) and len(images) > 0
    if not fits or any(b not in (None, a) for a, b in zip(images.shape, wanted, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in wanted[1:])
        raise ValueError(
            f"`calibration` must be images of the shape (batch, {sizes}). Received: {images.shape}"
        )
    if not np.isfinite(images).all():
        raise ValueError("`calibration` has values that are NaN or infinite.")
    return images


def with_ranges_at_run_time(proto, path):
    """Quantizes matrix products dynamically: input ranges are computed at each call.

    Args:
        proto: an ONNX model.
        path: path of a scratch file.

    Returns:
        The quantized model.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx.save(proto, path)
    quant_pre_process(path, path, skip_symbolic_shape=True)
    quantize_dynamic(
        path,
        path,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        # Without VNNI, pairs of products are added in 16 bits; weights of 7 bits do not overflow.
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    return onnx.load(path)


def with_ranges_of(images, proto, path):
    """Quantizes dense layers over patches statically, with input ranges from calibration images.

    Layers over words stay in float32: they are small, so conversion takes longer than int8 saves,
    and `onnx_session` runs them in C++. The embedding of pixels and the head, with one row per
    sample, stay in float32 too.

    Args:
        images: batch of images for calibration.
        proto: an ONNX model.
        path: path of a scratch file.

    Returns:
        The quantized model.

    Raises:
        ValueError: if there is no such layer.
    """
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        """Calibration images one at a time, which limits the memory for activations."""

        def __init__(self):
            self.batches = iter(images[:, None])

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    for number, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    graph = Graph(proto)
    chosen = [
        node.name
        for node in graph.of("MatMul")
        if node.input[1] in graph.constants and len(graph.shapes.get(node.output[0], ())) == 3
    ]
    if not chosen:
        raise ValueError("The model has no dense layer over patches to quantize.")
    proto = onnx.shape_inference.infer_shapes(proto)
    # This marks the model as preprocessed: `onnx_session` would not recognize the patterns that
    # `quant_pre_process` writes.
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    onnx.save(proto, path)
    quantization.quantize_static(
        path,
        path,
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        nodes_to_quantize=chosen,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        # Without VNNI, pairs of products are added in 16 bits; weights of 7 bits do not overflow.
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # Outputs stay in float32, which norms, softmax and residuals read.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    return onnx.load(path)
