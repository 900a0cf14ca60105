"""Description of a built model: its family, images, patch grid, blocks and heads."""

import dataclasses
from collections.abc import Iterator

import keras

from keras_tnt.images.class_names import imagenet_classes
from keras_tnt.layers import ImageNormalization, Predictions
from keras_tnt.layers.grid import ceil_divide, size_error
from keras_tnt.layers.inputs_outputs import CHANNELS_AXIS
from keras_tnt.models import registry
from keras_tnt.weights.names import HEADS

NORMALIZATION = "image_normalization"


@dataclasses.dataclass(frozen=True)
class Image:
    """Images that a model takes.

    Attributes:
        height: height in pixels; `None` for any multiple of `multiple_of`.
        width: width in pixels; `None` for any multiple of `multiple_of`.
        channels: number of channels.
        data_format: `"channels_last"` or `"channels_first"`.
        mean: mean of pixels in [0, 1], one value per channel.
        std: standard deviation of pixels in [0, 1], one value per channel.
        normalizes: whether the model takes pixels in [0, 255] and normalizes them. If `False`, it
            takes normalized images.
        crop: fraction of the resized image's side that the evaluation crop shows.
        interpolation: interpolation method for resizing images.
        native_size: (height, width) of evaluation images: the model's image size, or the size of
            its position tables if it takes images of any size.
        multiple_of: number that height and width must be multiples of if the model takes images of
            any size; otherwise `None`.
    """

    height: int | None
    width: int | None
    channels: int
    data_format: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalizes: bool
    crop: float
    interpolation: str
    native_size: tuple[int, int]
    multiple_of: int | None = None

    @property
    def normalises(self) -> bool:
        """Returns `normalizes`, by its name in release 0.1."""
        return self.normalizes

    @property
    def shape(self) -> tuple[int | None, int | None, int]:
        """Returns the shape of an image: (height, width, channels), or channels first."""
        return self.layout(self.height, self.width)

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """Returns the shape of an image of the native size."""
        return self.layout(*self.native_size)

    def layout(self, height, width) -> tuple:
        """Returns the shape of an image of this size in `data_format`."""
        channels_first = self.data_format == "channels_first"
        size = (height, width)
        return (self.channels, *size) if channels_first else (*size, self.channels)

    def covered_size(self) -> tuple[int, int]:
        """Returns the (height, width) that an image is resized to cover before the center crop."""
        height, width = self.native_size
        return int(height / self.crop), int(width / self.crop)

    def check_size(self, height: int, width: int) -> None:
        """Raises a `ValueError` that names the nearest valid size if the size is not valid."""
        size, multiple = (height, width), self.multiple_of
        if multiple and any(side < 1 or side % multiple for side in size):
            message, values = size_error(size, multiple)
            raise ValueError(message.format(*values))


@dataclasses.dataclass(frozen=True)
class Block:
    """Block over the patches.

    Attributes:
        layer: the block.
        name: name of the layer without the model's prefix: "block_3", "stage_0_block_1".
        number: index among all blocks, from 0.
        stage: index of the stage, from 0; 0 for models without stages.
        grid: (rows, columns) of the patches; `None` if it depends on the image.
        prefix_tokens: number of class and distillation tokens before the patches.
        reduction: side of the squares of patches that are pooled for keys and values.
        inner: transformer over the words, or `None`.
        outer: transformer over the patches.
    """

    layer: keras.layers.Layer
    name: str
    number: int
    stage: int
    grid: tuple[int, int] | None
    prefix_tokens: int
    reduction: int
    inner: keras.layers.Layer | None
    outer: keras.layers.Layer


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Result of `anatomy`. Layers are in the order of the forward pass.

    Attributes:
        family: name of the model's family.
        model: the model passed to `anatomy`, or the keras_tnt model nested in it.
        layer_prefix: prefix of the names of its layers.
        input_normalization: its `ImageNormalization`.
        image: the `Image`s that the model passed to `anatomy` takes.
        patch_size: side of the first blocks' patches in pixels.
        grid: (rows, columns) of the first blocks' patches; `None` if it depends on the image.
        stem: the layer that embeds words or patches of the image; `None` if the family declares
            none.
        tokens: the layers that add class and distillation token.
        prefix_tokens: number of tokens before the patches in the first blocks.
        class_tokens: number of tokens that the heads read; 0 if they read the mean patch.
        positions: the position embeddings of words and patches.
        merges: the layers that merge the patches and words of a stage for the next stage.
        blocks: the blocks over the patches.
        class_blocks: the class-attention blocks that follow them.
        norm: the layer norm before the heads, or `None`.
        levels: the layers that resample a backbone's feature maps to their strides.
        heads: the `Dense` layers that compute the logits of the class head and, if the model is
            distilled, of the distillation head; without a top, the head of a classifier around it.
        predictions: the layer that computes predictions from logits, or `None`.
    """

    family: str
    model: keras.Model
    layer_prefix: str
    input_normalization: ImageNormalization
    image: Image
    patch_size: int | None
    grid: tuple[int, int] | None
    stem: keras.layers.Layer | None
    tokens: tuple[keras.layers.Layer, ...]
    prefix_tokens: int
    class_tokens: int
    positions: tuple[keras.layers.Layer, ...]
    merges: tuple[keras.layers.Layer, ...]
    blocks: tuple[Block, ...]
    class_blocks: tuple[keras.layers.Layer, ...]
    norm: keras.layers.Layer | None
    levels: tuple[keras.layers.Layer, ...]
    heads: tuple[keras.layers.Layer, ...]
    predictions: keras.layers.Layer | None

    @property
    def entrance(self) -> ImageNormalization:
        """Returns `input_normalization`, by its name in release 0.1."""
        return self.input_normalization

    @property
    def stages(self) -> tuple[tuple[Block, ...], ...]:
        """Returns the blocks by stage."""
        count = self.blocks[-1].stage + 1 if self.blocks else 0
        return tuple(tuple(b for b in self.blocks if b.stage == s) for s in range(count))

    def grid_of(self, block: Block, size: tuple[int, int]) -> tuple[int, int]:
        """Returns (rows, columns) of a block's patches for images of `size`, (height, width)."""
        if block.grid is not None:
            return block.grid
        assert self.patch_size is not None, "the stem declares no patch size"
        height, width = size
        side = self.patch_size * 2**block.stage
        return ceil_divide(height, side), ceil_divide(width, side)


def anatomy(model: keras.Model) -> Anatomy:
    """Describes a built model: family, image size, patch grid, blocks and heads.

    Args:
        model: a model built by this package, also loaded, cloned or quantized, or a functional or
            Sequential model with exactly one such model inside.

    Returns:
        An `Anatomy`.

    Raises:
        ValueError: if the model contains no model of this package, or several.

    Example:
        >>> found = keras_tnt.anatomy(keras_tnt.TNTSmall(weights=None))
        >>> found.family, found.grid, len(found.blocks), found.image.crop
        ('tnt', (14, 14), 12, 0.9)
    """
    core, input_normalization = find_core(model)
    layers = list(core.layers)

    def with_role(role):
        return tuple(layer for layer in layers if role_of(layer) == role)

    stem = next(iter(with_role("stem")), None)
    levels = with_role("level")
    image = describe_image(model, core, input_normalization, stem, with_role("position"), levels)
    prefix = input_normalization.name.removesuffix(NORMALIZATION)
    sides = sides_of(input_normalization.output.shape, input_normalization.data_format)
    blocks = tuple(find_blocks(layers, prefix, sides))
    grid = blocks[0].grid if blocks else None
    patch_size = getattr(stem, "patch_size", None)
    if patch_size is None and grid is not None and sides[0] is not None:
        patch_size = sides[0] // grid[0]
    tokens = with_role("token")
    heads, predictions = find_heads(model, core, prefix)
    norms = [layer for layer in layers if layer.name == f"{prefix}norm"]
    return Anatomy(
        family=input_normalization.family,
        model=core,
        layer_prefix=prefix,
        input_normalization=input_normalization,
        image=image,
        patch_size=patch_size,
        grid=grid,
        stem=stem,
        tokens=tokens,
        prefix_tokens=blocks[0].prefix_tokens if blocks else len(tokens),
        class_tokens=len(tokens),
        positions=with_role("position"),
        merges=with_role("merge"),
        blocks=blocks,
        class_blocks=with_role("class_block"),
        norm=norms[0] if norms else None,
        levels=levels,
        heads=heads,
        predictions=predictions,
    )


def role_of(layer: keras.layers.Layer) -> str | None:
    """Returns the role that a layer declares, as documented at `CompositeLayer.role`.

    Layers of plugins for release 0.1 declare it as `part`.
    """
    return getattr(layer, "role", None) or getattr(layer, "part", None)


def is_ours(model: keras.Model) -> bool:
    """Returns whether `anatomy` supports this model."""
    return len(distinct_input_layers(model)) == 1


def find_core(model) -> tuple[keras.Model, ImageNormalization]:
    """Returns the model of this package that `model` is or contains, and its first layer.

    Raises:
        ValueError: if there is no such model, or several.
    """
    found = distinct_input_layers(model)
    name = getattr(model, "name", repr(model))
    if not found:
        raise ValueError(f"Model '{name}' is not built from one of keras_tnt's.")
    if len(found) > 1:
        kinds = ", ".join(layer.family for _, layer in found)
        raise ValueError(
            f"Model '{name}' is built from several of keras_tnt's ({kinds}). Ask one of them."
        )
    return found[0]


def distinct_input_layers(model) -> list[tuple[keras.Model, ImageNormalization]]:
    """Returns (model of this package, its first layer) for each distinct model inside.

    KerasHub's models hold the backbone that they were given and a model built from it.
    """
    return list({id(layer): (core, layer) for core, layer in find_input_layers(model)}.values())


def find_input_layers(model) -> Iterator[tuple[keras.Model, ImageNormalization]]:
    """Yields (model, `ImageNormalization`) for each such layer, in nested models too."""
    for layer in getattr(model, "layers", ()):
        if isinstance(layer, ImageNormalization):
            yield model, layer
        elif isinstance(layer, keras.Model):
            yield from find_input_layers(layer)


def describe_image(
    model, core, input_normalization: ImageNormalization, stem, positions, levels
) -> Image:
    """Returns the images that a model takes; a wrapper may resize and normalize them first."""
    shape = getattr(model, "input_shape", None)  # A Sequential model may not be built.
    if not isinstance(shape, tuple) or len(shape) != 4:
        shape = core.input_shape
    channels = shape[CHANNELS_AXIS[input_normalization.data_format]]
    height, width = sides_of(shape, input_normalization.data_format)
    own_size = sides_of(core.input_shape, input_normalization.data_format)
    native_size = size_of_tables(input_normalization.family, stem, positions)
    for known in (own_size, (height, width)):
        native_size = (known[0] or native_size[0], known[1] or native_size[1])
    mean, std, normalizes = (
        input_normalization.mean,
        input_normalization.std,
        input_normalization.normalises,
    )
    before = [x for x in model._flatten_layers() if isinstance(x, keras.layers.Rescaling)]
    if before and not normalizes:
        mean, std = undo_rescaling(before[0])
        normalizes = True
    crop = input_normalization.crop
    if crop is None:
        crop = registry.family(input_normalization.family).image.crop_at(*native_size)
    multiple_of = getattr(stem, "patch_size", None) if None in own_size else None
    if multiple_of:
        multiple_of = max(multiple_of, *(level.stride or 1 for level in levels), 1)
    return Image(
        height=height,
        width=width,
        channels=channels,
        data_format=input_normalization.data_format,
        mean=mean,
        std=std,
        normalizes=normalizes,
        crop=crop,
        interpolation=input_normalization.interpolation,
        native_size=native_size,
        multiple_of=multiple_of,
    )


def size_of_tables(family: str, stem, positions) -> tuple[int, int]:
    """Returns the (height, width) that a model's position table of the patches is created for.

    Falls back to the image size of the family's first variant if no layer declares such a table or
    the stem has no patch size.
    """
    patch_size = getattr(stem, "patch_size", None)
    for layer in positions:
        # Outputs for words, and relative position biases, have one axis more than patches.
        if patch_size and hasattr(layer, "grid") and len(layer.output.shape) == 3:
            return patch_size * layer.grid[0], patch_size * layer.grid[1]
    variants = registry.family(family).variants.values()
    side = next(iter(variants)).image_size
    return side, side


def undo_rescaling(layer) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, std), three values each, of a `Rescaling` layer."""
    scale, offset = (
        keras.ops.convert_to_numpy(x).astype("float64").ravel() for x in (layer.scale, layer.offset)
    )
    std = 1 / (255 * scale)
    mean = -offset * std
    mean, std = (tuple(x.round(6).tolist()) * (3 // len(x) or 1) for x in (mean, std))
    return mean, std


def sides_of(shape, data_format) -> tuple[int | None, int | None]:
    """Returns (height, width) of a batch of images of this shape."""
    height, width = shape[2:] if data_format == "channels_first" else shape[1:3]
    return height, width


def find_blocks(layers, prefix: str, sides: tuple[int | None, int | None]) -> Iterator[Block]:
    """Yields the blocks in order. A stage begins after a merge of patches.

    Args:
        layers: layers of the model, in the order of the forward pass.
        prefix: prefix of their names.
        sides: (height, width) of the images.
    """
    number = stage = tokens = 0
    merged = False
    for layer in layers:
        role = role_of(layer)
        if role == "merge":
            merged = True
        elif role == "token":
            tokens += 1
        elif role == "block":
            stage += merged
            merged = False
            yield Block(
                layer=layer,
                name=layer.name.removeprefix(prefix),
                number=number,
                stage=stage,
                grid=getattr(layer, "grid", None) or find_grid(layer, tokens, sides),
                prefix_tokens=tokens,
                reduction=getattr(layer, "reduction", 1),
                inner=getattr(layer, "inner", None),
                outer=getattr(layer, "outer", layer),
            )
            number += 1


def find_grid(block, prefix_tokens, sides) -> tuple[int, int] | None:
    """Returns the patch grid of a block, inferred from its number of tokens and the aspect ratio.

    A block with patches that are not square declares its grid by an attribute `grid`.

    Returns:
        (rows, columns), or `None` if sizes are unknown or no such grid exists.
    """
    tokens = keras.tree.flatten(block.input)[0].shape[1]
    if None in (tokens, *sides):
        return None
    height, width = sides
    patches = tokens - prefix_tokens
    rows = round((patches * height / width) ** 0.5)
    columns = round((patches * width / height) ** 0.5)
    return (rows, columns) if rows * columns == patches else None


def find_heads(model, core, prefix: str) -> tuple:
    """Returns (heads, predictions layer or `None`) of our model, or of the model that wraps it."""
    by_name = {layer.name: layer for layer in core.layers}
    heads = tuple(by_name[prefix + name] for name in HEADS if prefix + name in by_name)
    predictions = [layer for layer in core.layers if isinstance(layer, Predictions)]
    if heads or core is model:
        return heads, predictions[-1] if predictions else None
    last = model.layers[-1]
    activations = keras.layers.Activation | keras.layers.Softmax
    if isinstance(last, activations) and len(model.layers) > 1:
        previous = model.layers[-2]
        return ((previous,) if isinstance(previous, keras.layers.Dense) else ()), last
    return ((last,) if isinstance(last, keras.layers.Dense) else ()), None


def class_names(model: keras.Model) -> list[str] | None:
    """Returns the names of the classes that a model predicts.

    Args:
        model: any Keras model; models of this package store the names that they were built with.

    Returns:
        A list, one name per class. For a classifier of 1,000 classes without names, ImageNet's.
        `None` if nothing is known of the classes, and if layers of your own after the classifier
        change their number.

    Example:
        >>> keras_tnt.class_names(keras_tnt.TNTTiny(class_names=["cat", "dog"]))
        ['cat', 'dog']
    """
    names = stored_class_names(model)
    classes = count_outputs(model)
    return names if names is None or classes in (None, len(names)) else None


def count_outputs(model) -> int | None:
    """Returns the number of classes that a model's outputs have; `None` if it is unknown.

    A user's layer may follow our classifier, whose own number of classes differs.
    """
    try:
        outputs = getattr(model, "outputs", None) or ()
    except ValueError:  # of a Sequential model that is not built
        return None
    shapes = {output.shape[1] for output in outputs if len(output.shape) == 2}
    return shapes.pop() if len(shapes) == 1 else None


def stored_class_names(model) -> list[str] | None:
    """Returns the names that a model's layers store, or ImageNet's; `None` without."""
    for layer in reversed(list(model._flatten_layers())):
        if isinstance(layer, Predictions) and layer.class_names is not None:
            return list(layer.class_names)
    if not is_ours(model):
        return None
    parts = anatomy(model)
    heads, names = parts.heads, parts.input_normalization.class_names
    if heads and names is not None and heads[0].units == len(names):
        return list(names)
    if heads and heads[0].units == len(imagenet_classes()):
        return [name for _, name in imagenet_classes()]
    return None
