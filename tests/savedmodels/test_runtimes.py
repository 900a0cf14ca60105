"""Exported SavedModels run outside of Keras with the model's predictions."""

from pathlib import Path

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.export.verification import draw_picture
from keras_tnt.export.warmup import image_example
from tests.helpers.checks import SHALLOW, compute, shallow
from tests.helpers.saved_model_runtimes import CSession, Servable, TF1Session, replay

pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_serving")


def tiny():
    return keras_tnt.TNT(
        input_shape=(32, 32, 3), classes=7, outer_dim=16, inner_dim=8, depth=1, outer_heads=2,
        inner_heads=2, distilled=True,
    )  # fmt: skip


def features_of(model):
    heads = [layer for layer in model.layers if layer.name.startswith("head")]
    return keras.Model(model.inputs[0], [head.input for head in heads])


def check_signatures(model, path):
    """Checks all signatures with batch sizes 1 and 5 in both runtimes, and the warm-up file."""
    logits = keras.Model(model.inputs[0], model.layers[-1].input)
    features = features_of(model)
    labels = (Path(path) / "assets" / "labels.txt").read_bytes().splitlines()
    for runtime in (CSession, TF1Session):
        servable = Servable(path, runtime)
        assert set(servable.signatures) == {
            "serving_default",
            "serving_bytes",
            "classify",
            "features",
        }
        for batch in (1, 5):
            random = np.random.default_rng(batch)
            images = random.uniform(0, 255, (batch, *model.input_shape[1:])).astype("float32")
            found = servable("serving_default", images=images)
            close(found["probabilities"], compute(model, images))
            close(found["logits"], compute(logits, images))
            vectors = compute(features, images)
            vectors = np.mean(vectors, axis=0) if isinstance(vectors, list) else vectors
            close(servable("features", images=images)["features"], vectors)

            pictures = [draw_picture(10 + seed) for seed in range(batch)]
            expected = compute(model, keras_tnt.load_images(pictures, model))
            found = servable("serving_bytes", image_bytes=np.array(pictures, object))
            np.testing.assert_allclose(found["probabilities"], expected, atol=2e-3)
            order = np.argsort(-found["probabilities"], axis=-1, kind="stable")[:, :5]
            assert [[labels[i] for i in row] for row in order] == found["classes"].tolist()
            examples = np.array([image_example(picture) for picture in pictures], object)
            classified = servable("classify", inputs=examples)
            np.testing.assert_allclose(classified["scores"], found["scores"], atol=1e-6)
            assert (classified["classes"] == found["classes"]).all()
        assert replay(path, servable) == dict.fromkeys(servable.signatures, 2)
        servable.close()


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected), rtol=0)


@pytest.mark.slow
def test_signatures_in_the_c_api_and_a_tf1_session(tmp_path):
    model = tiny()
    check_signatures(model, keras_tnt.export.saved_model(model, tmp_path / "tnt"))


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_signatures_of_the_smallest_variant_of_each_family(name, tmp_path):
    model = shallow(name)
    check_signatures(model, keras_tnt.export.saved_model(model, tmp_path / name))


@pytest.mark.slow
def test_broken_image_error_has_its_index(tmp_path):
    model = tiny()
    path = keras_tnt.export.saved_model(model, tmp_path / "tnt", signatures=["serving_bytes"])
    good = draw_picture(0)
    servable = Servable(path, CSession)
    with pytest.raises(RuntimeError, match=r"Places in the batch:\] \[1 3\]"):
        servable("serving_bytes", image_bytes=np.array([good, b"?", good, good[:300]], object))
    servable.close()
