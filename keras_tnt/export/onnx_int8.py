"""An ONNX graph whose dense layers multiply in int8."""

import numpy as np

from keras_tnt.export.onnx_fusion import Graph


def check_calibration(images, precision, network) -> np.ndarray | None:
    """Images to calibrate on, as float32.

    Args:
        images: of the user's; None: there are none.
        precision: of the file.
        network: the network to be exported.

    Raises:
        ValueError: for another precision than int8, and images that the model does not take.
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
    """Quantize the weights of matrix products, whose inputs' ranges are found at each call.

    Args:
        proto: an ONNX model.
        path: of a file to work with.
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
        # Without VNNI two products of bytes are added in 16 bits, which seven bits do not overrun.
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    return onnx.load(path)


def with_ranges_of(images, proto, path):
    """Quantize dense layers over patches, whose inputs have the ranges that these images give them.

    The products among words stay in float32: they are small, and converting takes longer than it
    saves, while `onnx_session` has them in C++. So do the first, of pixels, and the head, one row a
    sample.

    Args:
        images: batch of images to calibrate on.
        proto: an ONNX model.
        path: of a file to work with.

    Raises:
        ValueError: if there is no such layer.
    """
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        """One image at a time: all at once would keep the tensors of all."""

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
    # What `quant_pre_process` would rewrite further, `onnx_session` would not recognise.
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
        # Without VNNI two products of bytes are added in 16 bits, which seven bits do not overrun.
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # What a product makes stays in float32, as norms, softmax and residuals want it.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    return onnx.load(path)
