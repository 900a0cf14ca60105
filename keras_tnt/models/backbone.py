"""Multi-scale feature maps of a model's patches, for detectors and segmentation models.

TNT, DeiT and CaiT have one stride in all blocks. Their feature maps after each quarter of the
blocks are resampled to strides 4, 8, 16 and 32 by transposed convolutions and pooling, as in TNT
with Faster R-CNN (arXiv 2103.00112, table 13), XCiT (arXiv 2106.09681) and ViTDet (arXiv
2203.16527). PyramidTNT's stages have different strides already.
"""

from collections.abc import Iterable

import keras
from keras import ops

from keras_tnt.layers.base import CompositeLayer, LayerNormalization, gelu
from keras_tnt.layers.grid import assert_sides, shape_of, size_error
from keras_tnt.layers.sharding import reshape
from keras_tnt.models import registry
from keras_tnt.models.anatomy import Anatomy, anatomy, is_ours
from keras_tnt.models.features import patch_map
from keras_tnt.models.model_factory import ImageModel

QUARTERS = 4
FINEST = 2  # Level of the feature map after the first quarter of the blocks.


@keras.saving.register_keras_serializable(package="keras_tnt")
class Backbone(ImageModel):
    """Functional model from images to a dict of feature maps by level, built by `backbone`.

    Like a `keras.Model`, it is defined by its inputs and outputs: Keras saves, loads and clones it.
    KerasHub's `RetinaNetBackbone`, `DeepLabV3Backbone` and others accept it as `image_encoder`.
    """

    @property
    def pyramid_outputs(self) -> dict[str, keras.KerasTensor]:
        """Returns the symbolic feature maps by level; "P3" has a stride of 2**3 pixels."""
        return dict(self.output)


def backbone(
    model: keras.Model | str, levels: Iterable[str] | None = None, **arguments
) -> Backbone:
    """Builds a model that returns feature maps of several strides.

    Level "Pn" is a feature map of stride 2**n pixels. For a model with stages, such as PyramidTNT,
    each level is the output of a stage. For other models, "P2", "P3", "P4" and "P5" are the patches
    after 1, 2, 3 and 4 quarters of the blocks (for 12 blocks: 3, 6, 9, 12), resampled to their
    stride. Strides finer than the patches use transposed convolutions of side and stride 2, each
    but the last followed by a layer norm and GELU; coarser strides use max pooling. All levels have
    the dimension of the patches, and no norm follows the blocks.

    The layers `p2`, `p3` and so on are new, and `keras_tnt.finetuning.freeze` leaves them
    trainable. All other layers and weights are shared with the model, so that training one trains
    both.

    Args:
        model: a model of this package, with its top or without; or the name of one, which
            `keras_tnt.create_model` builds without its top.
        levels: names of levels, such as `("P3", "P4", "P5")`. Defaults to all: "P2" to "P5", and
            "P3" to "P6" for PyramidTNT.
        **arguments: keyword arguments of a model that is built by name, such as `input_shape` and
            `weights`. As with `keras_tnt.TNTSmall`, the public ImageNet weights are the default if
            there are any.

    Returns:
        A `Backbone`, a `keras.Model` from the model's images to a dict from level to
        `(batch, height / 2**n, width / 2**n, dim)`, or channels first if the images are. Its
        attribute `pyramid_outputs` is that dict of Keras tensors.

    Raises:
        ValueError: for levels that the model does not have, image sizes that the coarsest stride
            does not divide, patch sizes that are not powers of two, and models of other packages.

    Example:
        >>> backbone = keras_tnt.backbone("tnt_small", weights=None, input_shape=(64, 96, 3))
        >>> {level: x.shape[1:] for level, x in backbone.pyramid_outputs.items()}
        {'P2': (16, 24, 384), 'P3': (8, 12, 384), 'P4': (4, 6, 384), 'P5': (2, 3, 384)}
    """
    if isinstance(model, str):
        model = registry.create_model(model, **{"include_top": False, **arguments})
    elif arguments:
        raise ValueError(
            f"Arguments are for a model that is built by its name. Received {model!r} and "
            f"{', '.join(arguments)}."
        )
    found = find_blocks_of(model)
    available = levels_in_stages(found) if len(found.stages) > 1 else levels_in_quarters(found)
    levels = check_levels(available if levels is None else levels, available, found.family)
    check_stride(found, levels)
    outputs = {}
    for level in levels:
        block, steps = available[level]
        layer = PyramidLevel(
            steps,
            found.image.data_format,
            stride=2 ** int(level[1:]),
            dtype=block.layer.dtype_policy,
            name=found.layer_prefix + level.lower(),
        )
        outputs[level] = layer(patch_map(found, block, f"of_{level.lower()}"))
    return Backbone(found.model.inputs[0], outputs, name=f"{found.model.name}_backbone")


def find_blocks_of(model) -> Anatomy:
    """Returns the anatomy of a model of this package.

    Raises:
        ValueError: if it is no such model, only wraps one, or has no blocks.
    """
    if not isinstance(model, keras.Model) or not is_ours(model):
        raise ValueError(
            f"A backbone needs a model with blocks of keras_tnt. Received {model!r}. Give one, or "
            "a name of keras_tnt.list_models(), as in keras_tnt.backbone('tnt_small')."
        )
    found = anatomy(model)
    if found.model is not model:
        raise ValueError(
            f"Model '{model.name}' has no blocks of its own. Pass its layer '{found.model.name}' "
            "instead."
        )
    if not found.blocks:
        raise ValueError(f"Model '{model.name}' has no blocks. Give a deeper one.")
    return found


# === Levels ===


def levels_in_quarters(found: Anatomy) -> dict:
    """Returns (block, number of doublings of the sides) by level, for models with one stride."""
    patch_level = log2(found.patch_size)
    if patch_level is None:
        raise ValueError(
            f"Levels have strides of 2**n pixels, and patches of {found.patch_size} pixels cannot "
            "be brought there. Give a model with patch_size=8, 16 or another power of two."
        )
    count = len(found.blocks)
    return {
        f"P{FINEST + i}": (
            found.blocks[max(1, count * (i + 1) // QUARTERS) - 1],
            patch_level - FINEST - i,
        )
        for i in range(QUARTERS)
    }


def levels_in_stages(found: Anatomy) -> dict:
    """Returns (last block of a stage, 0) by level, for models with stages."""
    levels = {}
    assert found.patch_size is not None, "the stem declares no patch size"
    for number, stage in enumerate(found.stages):
        level = log2(found.patch_size * 2**number)
        if level is not None:
            levels[f"P{level}"] = (stage[-1], 0)
    return levels


def log2(number: int | None) -> int | None:
    """Returns n for 2**n, and `None` for other numbers and for `None`."""
    if number is None or number & (number - 1):
        return None
    return number.bit_length() - 1


def check_levels(levels, available, family) -> list[str]:
    """Returns the levels as a list without duplicates, from fine to coarse.

    Args:
        levels: a level or several.
        available: levels of the model, from fine to coarse.
        family: name of the model's family, for the error message.

    Raises:
        ValueError: if a level is unknown, or there is none.
    """
    if isinstance(levels, str):
        levels = [levels]
    levels = list(levels)
    unknown = [level for level in levels if level not in available]
    if unknown or not levels:
        received = unknown[0] if unknown else levels
        raise ValueError(
            f"`levels` of {family} must be one or more of {tuple(available)}. "
            f"Received: {received!r}"
        )
    return sorted(set(levels), key=list(available).index)


def check_stride(found: Anatomy, levels: list[str]) -> None:
    """Raises a `ValueError` if the coarsest stride does not divide the image size."""
    stride = 2 ** max(int(level[1:]) for level in levels)
    size = (found.image.height, found.image.width)
    if any(side is not None and side % stride for side in size):
        nearest = "x".join(str(max(stride, round(side / stride) * stride)) for side in size)
        raise ValueError(
            f"Level P{log2(stride)} needs images whose sides are multiples of {stride}. Received a "
            f"model of {size[0]}x{size[1]} images. The nearest size is {nearest}; or leave the "
            "level out of `levels`."
        )


@keras.saving.register_keras_serializable(package="keras_tnt")
class PyramidLevel(CompositeLayer):
    """Resampling of a feature map to the stride of a level.

    Args:
        steps: number of times height and width are doubled, each by a transposed convolution of
            side and stride 2. If negative, number of times they are halved, by one max pooling.
        data_format: data format of the output, `"channels_last"` or `"channels_first"`. Defaults to
            Keras's image data format.
        epsilon: epsilon of the layer norms between transposed convolutions. Defaults to 1e-6.
        stride: stride of the output in pixels of the image, for error messages. If `None`, it is
            unknown.

    Call arguments:
        x: feature map `(batch, height, width, dim)`, channels last.

    Returns:
        `(batch, height * 2**steps, width * 2**steps, dim)`, or channels first.

    Raises:
        ValueError: if `2**-steps` does not divide height and width.
    """

    role = "level"

    def __init__(
        self,
        steps: int,
        data_format: str | None = None,
        epsilon: float = 1e-6,
        stride: int | None = None,
        **kwargs,
    ):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.steps = steps
        self.stride = stride
        self.data_format = data_format or keras.config.image_data_format()
        self.epsilon = epsilon

    def build(self, input_shape):
        """Builds a projection per doubling, and a layer norm between two of them."""
        dim = input_shape[-1]
        count = max(self.steps, 0)
        # A transposed convolution with stride equal to kernel size is a projection of each pixel.
        self.projections = [
            keras.layers.Dense(
                4 * dim,
                kernel_initializer="lecun_normal",
                dtype=self.dtype_policy,
                name=f"transposed_convolution_{i}",
            )
            for i in range(count)
        ]
        self.norms = [
            LayerNormalization(epsilon=self.epsilon, dtype=self.dtype_policy, name=f"norm_{i}")
            for i in range(count - 1)
        ]
        for layer in (*self.projections, *self.norms):
            layer.build((*input_shape[:-1], dim))

    def call(self, x):
        """Maps `(batch, height, width, dim)` to the stride and data format of the level."""
        for i, projection in enumerate(self.projections):
            x = unfold(projection(x))
            if i < len(self.norms):
                x = gelu(self.norms[i](x))
        if self.steps < 0:
            side = 2**-self.steps
            x = assert_sides(x, shape_of(x)[1:3], lambda n: n % side == 0, self.describe_size_error)
            x = ops.max_pool(x, side, side, data_format="channels_last")
        if self.data_format == "channels_first":
            x = ops.transpose(x, (0, 3, 1, 2))  # (batch, dim, height, width)
        return x

    def describe_size_error(self, sides):
        """Returns message and values of the error for odd sides, for `assert_sides`."""
        side = 2**-self.steps
        pixels = (self.stride or side) // side
        message, values = size_error([n * pixels for n in sides], pixels * side)
        return f"Level '{self.name}': {message}", values

    def compute_output_shape(self, input_shape):
        """Returns the shape with sides scaled by `2**steps`, in the output's data format."""
        batch, *sides, dim = input_shape
        if self.steps < 0:
            sides = [None if side is None else side // 2**-self.steps for side in sides]
        else:
            sides = [None if side is None else side * 2**self.steps for side in sides]
        channels_first = self.data_format == "channels_first"
        return (batch, dim, *sides) if channels_first else (batch, *sides, dim)


def unfold(x):
    """Rearranges `(batch, height, width, 4 * dim)` to `(batch, 2 * height, 2 * width, dim)`."""
    _, height, width, channels = ops.shape(x)
    x = reshape(x, (-1, height, width, 2, channels // 2))  # (b, h, w, 2, 2 * dim)
    x = ops.transpose(x, (0, 1, 3, 2, 4))  # (b, h, 2, w, 2 * dim)
    return reshape(x, (-1, 2 * height, 2 * width, channels // 4))  # (b, 2 * h, 2 * w, dim)
