"""Conversion of a student's images for its teacher."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt.teacher import PREPROCESSING, Teacher, image_range

CLASSES = 5
PREPROCESS = {
    "caffe": keras.applications.resnet.preprocess_input,
    "tf": keras.applications.mobilenet_v2.preprocess_input,
    "torch": keras.applications.densenet.preprocess_input,
    "pixels": lambda images: images,
    "unit": lambda images: images / 255,
}
# Names of the first layers of keras.applications models, for small models.
NAMES = {
    "caffe": ("block1_conv1", "block1_conv2", "block1_pool"),
    "tf": ("conv1_conv", "conv2_block1_preact_bn"),
    "torch": ("conv2_block1_concat", "conv2_block1_0_bn"),
}


def student(**arguments):
    return keras_tnt.DeiT(
        **{
            "input_shape": (16, 16, 3),
            "patch_size": 8,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 1,
            "classes": CLASSES,
            **arguments,
        }
    )


def pixels(shape=(2, 16, 16, 3)):
    return np.random.default_rng(3).uniform(0, 255, shape).astype("float32")


def answer(model, images):
    model = keras.Model(model.inputs[0], model.outputs[0])
    return ops.convert_to_numpy(model(images, training=False))


def base(kind, size=(16, 16, 3)):
    """Returns a small model with the layer names of a keras.applications model."""
    x = inputs = keras.Input(size)
    for name in NAMES[kind]:
        x = keras.layers.Conv2D(4, 3, name=name, padding="same", strides=2)(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x), name="any_name")


def plain(model):
    return keras.Sequential([model, keras.layers.Dense(CLASSES)])


def functional(model):
    inputs = keras.Input(model.input_shape[1:])
    features = keras.layers.Dropout(0.5)(model(keras.layers.RandomFlip()(inputs)))
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(features))


def nested_twice(model):
    return plain(functional_features(model))


def functional_features(model):
    inputs = keras.Input(model.input_shape[1:])
    return keras.Model(inputs, model(inputs))


def grown(model):
    """Adds a new head to the graph of the base, as after include_top=False."""
    return keras.Model(model.inputs, keras.layers.Dense(CLASSES)(model.outputs[0]))


def assert_given(model, student, kind, images=None, given=None):
    """Checks that a teacher's output is that for images preprocessed for its kind of model."""
    images = pixels() if images is None else images
    found = Teacher(model, student)(images if given is None else given)
    expected = answer(model, PREPROCESS[kind](np.array(images)))
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrap", [plain, functional, nested_twice, grown])
@pytest.mark.parametrize("kind", ["caffe", "tf", "torch"])
def test_applications_are_recognized_inside_other_models(kind, wrap):
    assert_given(wrap(base(kind)), student(), kind)


@pytest.mark.parametrize("kind", ["caffe", "tf", "torch"])
def test_normalized_student_images_are_converted_back(kind):
    images = pixels()
    given = keras_tnt.deit.preprocess_input(images)
    assert_given(plain(base(kind)), student(include_preprocessing=False), kind, images, given)


@pytest.mark.parametrize("kind", ["caffe", "torch"])
def test_channels_first_images_are_converted(kind):
    keras.config.set_image_data_format("channels_first")
    teacher = Teacher(plain(flat(kind)), student(input_shape=(3, 16, 16)))
    images = pixels((2, 3, 16, 16))
    expected = PREPROCESS[kind](np.array(images), data_format="channels_first")
    found = ops.convert_to_numpy(teacher.preprocessing(ops.convert_to_tensor(images)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def flat(kind):
    x = inputs = keras.Input((3, 16, 16))
    x = keras.layers.Flatten()(x)
    for name in NAMES[kind]:
        x = keras.layers.Dense(2, name=name)(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("kind", ["caffe", "tf"])
def test_preprocessing_inside_the_teacher_is_not_repeated(kind):
    inputs = keras.Input((16, 16, 3))
    x = PREPROCESS[kind](inputs)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(base(kind)(x)))
    assert_given(model, student(), "pixels")


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.Rescaling(1 / 127.5, offset=-1),
        keras.layers.Normalization(mean=[120.0, 110.0, 100.0], variance=[9.0, 9.0, 9.0]),
    ],
)
def test_teacher_with_rescaling_receives_pixels(layer):
    model = keras.Sequential(
        [keras.Input((16, 16, 3)), layer, keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    )
    images = pixels()
    given = keras_tnt.deit.preprocess_input(images)
    assert_given(model, student(include_preprocessing=False), "pixels", images, given)


def dense():
    return keras.Sequential(
        [keras.Input((16, 16, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
    )


def test_unknown_teacher_warns_once_and_receives_the_same_images():
    model = dense()
    with pytest.warns(UserWarning, match="Pass `teacher_preprocessing=`") as found:
        distiller = keras_tnt.Distiller(student(), model)
    assert len(found) == 1 and found[0].filename == __file__
    np.testing.assert_allclose(
        ops.convert_to_numpy(distiller.teacher(pixels())), answer(model, pixels()), rtol=1e-4
    )


def test_rescaling_after_the_weights_is_ignored():
    model = keras.Sequential([dense(), keras.layers.Rescaling(0.5)])
    with pytest.warns(UserWarning, match="Cannot tell"):
        Teacher(model, student())


@pytest.mark.parametrize("kind", PREPROCESS)
def test_preprocessing_can_be_set_by_name(kind):
    model = dense()
    found = keras_tnt.Distiller(student(), model, teacher_preprocessing=kind).teacher(pixels())
    expected = answer(model, PREPROCESS[kind](pixels()))
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.one_backend
def test_unknown_preprocessing_name_raises():
    with pytest.raises(ValueError, match="'caffe', 'tf', 'torch'.*Received: 'imagenet'"):
        keras_tnt.Distiller(student(), dense(), teacher_preprocessing="imagenet")


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "arguments", "kind"),
    [
        ("VGG16", 32, {}, "caffe"),
        ("VGG19", 32, {}, "caffe"),
        ("ResNet50", 32, {}, "caffe"),
        ("ResNet101", 32, {}, "caffe"),
        ("ResNet50V2", 32, {}, "tf"),
        ("MobileNet", 32, {"alpha": 0.25}, "tf"),
        ("MobileNetV2", 32, {"alpha": 0.35}, "tf"),
        ("MobileNetV3Small", 32, {}, "pixels"),
        ("MobileNetV3Small", 32, {"include_preprocessing": False}, "tf"),
        ("DenseNet121", 32, {}, "torch"),
        ("Xception", 71, {}, "tf"),
        ("InceptionV3", 75, {}, "tf"),
        ("InceptionResNetV2", 75, {}, "tf"),
        ("NASNetMobile", 32, {}, "tf"),
        ("EfficientNetB0", 32, {}, "pixels"),
        ("EfficientNetV2B0", 32, {}, "pixels"),
        ("EfficientNetV2S", 32, {}, "pixels"),
        ("ConvNeXtTiny", 32, {}, "pixels"),
        ("ConvNeXtTiny", 32, {"include_preprocessing": False}, "torch"),
    ],
)
def test_every_application_is_recognized(name, side, arguments, kind, monkeypatch):
    monkeypatch.setattr(  # initial values do not matter but take most of the time
        keras.initializers.GlorotUniform,
        "__call__",
        lambda self, shape, dtype=None: ops.zeros(shape, dtype),
    )
    build = getattr(keras.applications, name)
    shape = (side, side, 3)
    model = build(weights=None, include_top=False, input_shape=shape, **arguments)
    assert image_range(model) == PREPROCESSING[kind]
