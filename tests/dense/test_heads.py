"""KerasHub's detector and segmenter on our backbones: build, train, save, load, predict."""

import keras
import numpy as np
import pytest

import keras_tnt
from tests.helpers.checks import compute, normal
from tests.helpers.golden import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SHAPE = (64, 64, 3)


def tiny_backbone(family, levels):
    if family == "tnt":
        model = keras_tnt.TNT(
            input_shape=SHAPE,
            patch_size=16,
            depth=2,
            outer_dim=16,
            inner_dim=4,
            outer_heads=2,
            inner_heads=2,
            classes=3,
        )
    else:
        model = keras_tnt.PyramidTNT(
            input_shape=SHAPE,
            depths=(1, 1, 1),
            outer_dims=(16, 16, 16),
            inner_dims=(4, 4, 4),
            outer_heads=(2, 2, 2),
            inner_heads=(2, 2, 2),
            reductions=(2, 1, 1),
            classes=3,
        )
    return keras_tnt.backbone(model, levels)


@pytest.fixture(scope="module", params=["tnt", "pyramid_tnt"])
def detector(request):
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.RetinaNetBackbone(
        image_encoder=tiny_backbone(request.param, ("P3", "P4", "P5")),
        min_level=3,
        max_level=5,
        use_p5=False,
        image_shape=SHAPE,
    )
    return keras_hub.models.RetinaNetObjectDetector(
        backbone,
        num_classes=3,
        bounding_box_format="yxyx",
        pre_logits_num_conv_layers=1,
    )


@pytest.fixture(scope="module")
def segmenter():
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.DeepLabV3Backbone(
        image_encoder=tiny_backbone("tnt", ("P2", "P4")),
        spatial_pyramid_pooling_key="P4",
        low_level_feature_key="P2",
        upsampling_size=4,
        dilation_rates=[1],
        image_shape=SHAPE,
    )
    return keras_hub.models.DeepLabV3ImageSegmenter(backbone, num_classes=3)


def check_learns(model, images, targets, tmp_path, **compiled):
    """Checks that one epoch changes a block's weights, and that a reloaded model agrees."""
    block = next(layer for layer in model._flatten_layers() if layer.name.endswith("block_0"))
    before = [np.array(w) for w in block.get_weights()]
    model.compile(
        keras.optimizers.Adam(1e-4), jit_compile=keras.backend.backend() == "jax", **compiled
    )
    model.fit(images, targets, batch_size=2, verbose=0)
    assert any(np.any(a != b) for a, b in zip(before, block.get_weights(), strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected, found = (keras.tree.flatten(compute(m, images)) for m in (model, loaded))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)
    return loaded


def test_detector_trains_and_reloads(detector, tmp_path):
    images = 100 + 50 * normal((2, *SHAPE))
    targets = {
        "boxes": np.array([[[4, 4, 36, 36]], [[20, 16, 60, 48]]], "float32"),
        "labels": np.array([[0], [2]], "float32"),
    }
    loaded = check_learns(detector, images, targets, tmp_path)
    encoder = loaded.backbone.image_encoder
    assert type(encoder).__name__ == "Backbone"
    assert list(encoder.pyramid_outputs) == ["P3", "P4", "P5"]
    found = loaded.predict(images, verbose=0)
    assert found["boxes"].shape == (2, 100, 4)


def test_segmenter_trains_and_reloads(segmenter, tmp_path):
    images = 100 + 50 * normal((2, *SHAPE))
    masks = keras.utils.to_categorical(np.indices(SHAPE[:2]).sum(0) // 50, 3)
    loaded = check_learns(segmenter, images, np.stack([masks] * 2), tmp_path)
    assert loaded.predict(images, verbose=0).shape == (2, 64, 64, 3)


@pytest.mark.one_backend
def test_backbone_inside_a_segmenter_is_found_and_frozen(segmenter):
    found = keras_tnt.anatomy(segmenter)
    assert (found.family, len(found.blocks), len(found.levels)) == ("tnt", 1, 2)
    keras_tnt.finetuning.freeze(segmenter, up_to="head")
    trained = {v.path.split("/")[0] for v in segmenter.trainable_variables}
    assert not any(name.startswith(("block", "word", "patch")) for name in trained)
    assert "p2" in trained and "segmentation_output" in trained
    keras_tnt.finetuning.unfreeze(found.model)
