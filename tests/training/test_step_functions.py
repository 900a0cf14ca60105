"""Training steps on one and two devices: augmentation, precision, rematerialization, losses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tnt.layers import Dropout, StochasticDepth
from training import configuration, models, optimization, step_functions

pytestmark = pytest.mark.usefixtures("tiny")


def batch(values, seed=0):
    random = np.random.default_rng(seed)
    size = values.batch_size
    return {
        "image": random.integers(0, 256, (size, 32, 32, 3), "uint8"),
        "label": random.integers(0, 10, size),
        "weight": (np.arange(size) != 1).astype("float32"),
        "erase": np.tile(np.int32([[2, 20, 5, 30]]), (size, 1)),
    }


RESULTS = {}


def plain(strategy):
    """Returns the cached result of `train` with default values."""
    if "plain" not in RESULTS:
        RESULTS["plain"] = train(strategy)
    return RESULTS["plain"]


def train(strategy, updates=2, teach=None, **values):
    """Returns (losses, weights by path) after some updates from a fixed start."""
    keras.utils.set_random_seed(0)
    values = configuration.make("digits", batch_size=8, **values)
    with strategy.scope():
        model = models.build(values, 10)
        optimizer = optimization.Optimizer(model, values)
    step = step_functions.make_train_step(strategy, model, optimizer, values, 10, teach)
    each = values.batch_size // strategy.num_replicas_in_sync

    def dataset(context):
        batches = [batch(values, i) for i in range(updates)]
        rows = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
        return tf.data.Dataset.from_tensor_slices(rows).batch(each, drop_remainder=True)

    losses = []
    groups = step_functions.count_groups(values, strategy.num_replicas_in_sync)
    for i, piece in enumerate(strategy.distribute_datasets_from_function(dataset)):
        mixing = step_functions.draw_mixing(values, i, (32, 32), 0, groups)
        arguments = (tf.constant(x) for x in (float(i), 1e-3, 0.0, mixing))
        loss, norm, stop = step(piece, *arguments)
        losses.append(float(loss))
    state = models.state(model) | optimizer.state()
    return losses, {name: variable.numpy() for name, variable in state.items()}


def assert_alike(first, second, tolerance=1e-5):
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [{}, {"mix_groups": 2, "erase_after_mixing": True}], ids=str)
def test_two_devices_match_one(one_device, mirrored, mixing):
    values = {"clip_norm": 0.5, "ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    values |= {"erasing": 0.5, **mixing}
    losses, weights = train(one_device, **values)
    losses_of_two, weights_of_two = train(mirrored, **values)
    np.testing.assert_allclose(losses_of_two, losses, rtol=1e-5)
    assert_alike(weights, weights_of_two)


@pytest.mark.slow
def test_accumulation_matches_the_whole_batch(one_device):
    losses, weights = plain(one_device)
    losses_in_parts, weights_in_parts = train(one_device, accumulation=2)
    np.testing.assert_allclose(losses_in_parts, losses, rtol=1e-5)
    assert_alike(weights, weights_in_parts)


@pytest.mark.slow
def test_xla_per_replica_matches_the_graph(one_device, mirrored):
    assert_alike(plain(one_device)[1], train(mirrored, jit="on")[1])


@pytest.mark.slow
def test_rematerialization_changes_no_weight_with_dropout(one_device):
    rates = {"stochastic_depth": 0.5, "dropout": 0.3}
    losses, weights = train(one_device, **rates)
    losses_again, weights_again = train(one_device, remat=True, **rates)
    np.testing.assert_allclose(losses_again, losses, rtol=1e-5)
    assert_alike(weights, weights_again)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_follows_float32(one_device, precision):
    losses, _ = plain(one_device)
    half, weights = train(one_device, precision=precision)
    np.testing.assert_allclose(half, losses, rtol=0.02)
    assert all(value.dtype != precision for value in weights.values())


@pytest.mark.slow
def test_float16_overflow_halves_the_scale_and_keeps_the_weights(one_device, monkeypatch):
    losses, weights = train(one_device, updates=1, precision="float16")

    def overflowing(self):
        return tf.convert_to_tensor(self.scale[0]) * 1e30

    monkeypatch.setattr(optimization.Optimizer, "loss_scale", overflowing)
    _, kept = train(one_device, updates=1, precision="float16")
    assert kept["loss_scale"] == weights["loss_scale"] / 2
    assert all((kept[name] == 0).all() for name in kept if name.startswith("mean/"))
    assert all((weights[name] != 0).any() for name in kept if name.startswith("mean/"))


@pytest.mark.parametrize("layer", [Dropout(0.5, seed=1), StochasticDepth(0.5, seed=1)])
def test_replicas_draw_different_masks(mirrored, layer):
    with mirrored.scope():
        layer = type(layer).from_config(layer.get_config())

    @tf.function
    def draw():
        return mirrored.run(lambda: layer(tf.ones((64, 1)), training=True))

    first, second = (x.numpy() for x in mirrored.experimental_local_results(draw()))
    again, _ = (x.numpy() for x in mirrored.experimental_local_results(draw()))
    assert 0.2 < (first == second).mean() < 0.8
    assert 0.2 < (first == again).mean() < 0.8


def test_image_with_weight_0_has_no_gradient(one_device, monkeypatch):
    _, weights = plain(one_device)
    original = batch

    def another_image(values, seed=0):
        changed = original(values, seed)
        changed["image"][1] = 0
        return changed

    monkeypatch.setitem(globals(), "batch", another_image)
    assert_alike(weights, train(one_device)[1], 0)


@pytest.mark.slow
def test_teacher_trains_the_distillation_head(one_device):
    def teacher(images):
        return tf.one_hot(tf.zeros(tf.shape(images)[0], tf.int32), 10) * 5.0

    hard = {"distilled": True, "distill": "hard", "teacher": "any.keras"}
    losses, weights = train(one_device, teach=teacher, distill_alpha=0.5, **hard)
    _, untaught = train(one_device, teach=teacher, distill_alpha=0.0, **hard)
    name = "model/head_distillation/bias"
    assert weights[name].argmax() == 0 and weights[name][0] > 0
    assert (untaught[name] == 0).all()


def draws(values, steps, size=(32, 48), groups=8):
    drawn = [step_functions.draw_mixing(values, i, size, 0, groups) for i in range(steps)]
    return np.array(drawn)  # (steps, groups, 5)


def test_mixing_depends_on_seed_step_and_group():
    values = configuration.make("digits", mixup=0.8, cutmix=1.0, epochs=4, mix_off_epochs=1)
    drawn = draws(values, 20)
    np.testing.assert_array_equal(drawn, draws(values, 20))
    # Fewer groups, as on one of several devices, draw the same.
    np.testing.assert_array_equal(drawn[:, :3], draws(values, 20, groups=3))
    rows = {tuple(row) for row in drawn.reshape(-1, 5)}
    assert len(rows) == 20 * 8
    other = draws(configuration.make("digits", mixup=0.8, cutmix=1.0, seed=1), 20)
    # Boxes with integer coordinates may coincide by chance.
    assert len(rows & {tuple(row) for row in other.reshape(-1, 5)}) < 5
    last = step_functions.draw_mixing(values, 7, (32, 48), 3, 2)
    np.testing.assert_array_equal(last, [[1, 0, 0, 0, 0]] * 2)


def shares(drawn, size):
    """Returns the share of each image that is kept, (steps, groups)."""
    area = (drawn[..., 2] - drawn[..., 1]) * (drawn[..., 4] - drawn[..., 3])
    return np.where(drawn[..., 0] < 1, drawn[..., 0], 1 - area / (size[0] * size[1]))


def test_mixing_shares_have_the_reference_distribution():
    size = (60, 96)
    values = configuration.make("tnt_small", batch_size=1024)
    assert step_functions.count_groups(values, 8) == 8
    drawn = draws(values, 800, size)
    random = np.random.default_rng(0)

    def of_cutmix():
        kept = random.beta(1.0, 1.0)
        mask = np.zeros(size, bool)
        box = []
        for side in size:
            middle, length = random.integers(side), int(side * np.sqrt(1 - kept))
            box.append(slice(max(middle - length // 2, 0), middle + length // 2))
        mask[tuple(box)] = True
        return 1 - mask.mean()

    cut = drawn[..., 0] == 1
    assert abs(cut.mean() - 0.5) < 0.03
    found = shares(drawn, size)
    mixed, pasted = random.beta(0.8, 0.8, 4000), np.array([of_cutmix() for _ in range(4000)])
    assert_same_distribution(found[~cut], mixed)
    assert_same_distribution(found[cut], pasted)
    # With a single draw for all eight devices, the mean would vary as much as a draw.
    spread = np.concatenate([mixed, pasted]).std()
    assert abs(found.std() - spread) < 0.015
    assert abs(found.mean(axis=1).std() - spread / np.sqrt(8)) < 0.008
    middles = (drawn[cut][:, 1] + drawn[cut][:, 2]) / 2
    assert abs(middles.mean() - size[0] / 2) < 1
    # Neighboring groups and steps are drawn independently.
    for first, second in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.06


def assert_same_distribution(first, second, level=1.95):
    """Runs a two-sample Kolmogorov-Smirnov test; 1.95 rejects one equal pair in a thousand."""
    grid = np.concatenate([first, second])
    below = [
        np.searchsorted(np.sort(sample), grid, side="right") / len(sample)
        for sample in (first, second)
    ]
    distance = np.abs(below[0] - below[1]).max()
    assert distance < level * np.sqrt(1 / len(first) + 1 / len(second))


@pytest.mark.parametrize(
    ("batch_size", "replicas", "accumulation", "groups"),
    [
        *((1024, replicas, 1, 8) for replicas in (1, 2, 4, 8)),
        *((1024, replicas, 2, 8) for replicas in (1, 2, 4)),
        *((64, replicas, 1, 8) for replicas in (1, 2, 4, 8)),
        *((40, replicas, 1, 20) for replicas in (1, 2, 4)),
        *((24, replicas, 1, 12) for replicas in (1, 2, 3, 4, 6)),
        *((8, replicas, 1, 4) for replicas in (1, 2, 4)),
        (1024, 16, 1, 16),
        (1024, 16, 4, 64),
        (96, 3, 1, 24),
        (2, 1, 1, 1),
        (6, 1, 1, 3),
    ],
)
def test_number_of_groups_does_not_depend_on_devices(batch_size, replicas, accumulation, groups):
    values = configuration.make(
        "digits", mixup=0.8, batch_size=batch_size, accumulation=accumulation
    )
    assert step_functions.count_groups(values, replicas) == groups


def test_mix_groups_are_used_or_raise():
    def count(replicas=1, mixup=0.8, batch_size=48, **values):
        values = configuration.make("digits", mixup=mixup, batch_size=batch_size, **values)
        return step_functions.count_groups(values, replicas)

    assert count(mix_groups=1) == 1 and count(mix_groups=24) == 24
    assert count(4, mix_groups=12) == 12
    for replicas, groups in ((1, 5), (1, 48), (1, 16), (2, 3), (4, 6), (4, 2)):
        with pytest.raises(ValueError, match=f"--mix_groups={groups} does not divide .*Valid: "):
            count(replicas, mix_groups=groups)
    with pytest.raises(ValueError, match=r"Valid: 4, 12, or 0 to choose"):
        count(2, accumulation=2, batch_size=24, mix_groups=3)
    with pytest.raises(ValueError, match="multiple of 4: 2 devices.* mixing takes images two by"):
        count(2, batch_size=50)
    # Without mixing, the number of images per device may be odd for any groups.
    assert count(2, mixup=0.0, batch_size=50, mix_groups=7) == 10
    with pytest.raises(ValueError, match="multiple of 2: 2 devices, --accumulation=1$"):
        count(2, mixup=0.0, batch_size=51)


# === Formulas, with values computed by hand ===


class Drawn:
    """Fake NumPy generator that returns the given integers in order, and one share."""

    def __init__(self, integers, share):
        self.coming, self.share = iter(integers), share

    def integers(self, high):
        value = next(self.coming)
        assert 0 <= value < high
        return value

    def beta(self, first, second):
        self.alphas = (first, second)
        return self.share


@pytest.mark.parametrize(
    ("middle", "box"),
    # For a share of 0.75 of 32 x 48 pixels, the box has half the sides: 16 x 24 around its center.
    [((10, 20), [2, 18, 8, 32]), ((3, 40), [0, 11, 28, 48]), ((31, 0), [23, 32, 0, 12])],
)
def test_cutmix_box_has_the_size_of_its_share(monkeypatch, middle, box):
    values = configuration.make("digits", cutmix=0.5)
    drawn = Drawn([0, *middle], 0.75)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn)
    mixing = step_functions.draw_mixing(values, 5, (32, 48), 0, 1)
    assert mixing.tolist() == [[1, *box]] and drawn.alphas == (0.5, 0.5)


def test_mixup_uses_its_share_and_stops_before_the_last_epochs(monkeypatch):
    values = configuration.make("digits", mixup=0.2, cutmix=1.0, epochs=4, mix_off_epochs=1)
    seeds, drawn = [], Drawn([0], 0.625)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (seeds.append(seed), drawn)[1])
    mixing = step_functions.draw_mixing(values, 5, (32, 48), 2, 1)
    assert mixing.tolist() == [[0.625, 0, 0, 0, 0]] and seeds == [[0, 5, 2, 0]]
    assert drawn.alphas == (0.2, 0.2)
    for epoch in (3, 4):
        last = step_functions.draw_mixing(values, 5, (32, 48), epoch, 1)
        assert last.tolist() == [[1, 0, 0, 0, 0]]
    nothing = configuration.make("digits", mixup=0.0, cutmix=0.0)
    assert step_functions.draw_mixing(nothing, 5, (32, 48), 0, 1).tolist() == [[1, 0, 0, 0, 0]]


def test_label_smoothing_is_spread_over_all_classes():
    hard = step_functions.soft_labels(tf.constant([2, 0]), 4, 0.1)
    np.testing.assert_allclose(hard, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    soft = step_functions.soft_labels(tf.constant([[0.5, 0.5, 0.0, 0.0]]), 4, 0.2)
    np.testing.assert_allclose(soft, [[0.45, 0.45, 0.05, 0.05]], rtol=1e-6)


def test_prediction_is_correct_if_it_is_one_of_several_labels():
    # Relative probabilities 1, 4, 1, 2, 1/2, 1/4, 1/8 for 7 classes; labels by image.
    logits = np.log(np.float32([[1, 4, 1, 2, 0.5, 0.25, 0.125]] * 3))
    labels = np.float32([[0, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]])
    loss, top1, top5 = step_functions.judge_several_labels(tf.constant(logits), labels)
    total = 8.875
    expected = -np.log(np.array([6, 0.5, 0.375]) / total)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert top1.numpy().tolist() == [1, 0, 0] and top5.numpy().tolist() == [1, 1, 0]


def test_top1_and_top5_of_single_labels():
    logits = np.log(np.float32([[16, 4, 8, 2, 1, 0.5, 0.5]] * 4))
    loss, top1, top5 = step_functions.judge_one_label(logits, tf.constant([0, 2, 4, 5]))
    np.testing.assert_allclose(loss, -np.log(np.array([16, 8, 1, 0.5]) / 32), rtol=1e-5)
    assert top1.numpy().tolist() == [1, 0, 0, 0] and top5.numpy().tolist() == [1, 1, 1, 0]


def test_step_mixes_unless_the_augmentation_does():
    def mixes(**values):
        return step_functions.mixes(configuration.make("digits", **values))

    assert mixes(mixup=0.8, cutmix=0.0) and mixes(mixup=0.0, cutmix=1.0)
    assert not mixes(mixup=0.0, cutmix=0.0)
    assert not mixes(mixup=0.8, cutmix=1.0, augmentation="keras_cv")


@pytest.mark.parametrize(
    ("values", "gpus", "compiled"),
    [
        ({"jit": "auto"}, 0, False),
        ({"jit": "auto"}, 2, True),
        ({"jit": "auto", "cpu_devices": 2, "strategy": "mirrored"}, 2, False),
        ({"jit": "on"}, 0, True),
        ({"jit": "off"}, 2, False),
    ],
)
def test_xla_is_used_if_requested_or_with_a_gpu(monkeypatch, values, gpus, compiled):
    found = ["GPU"] * gpus
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: found * (kind == "GPU"))
    assert step_functions.uses_xla(configuration.make("digits", **values)) is compiled


@pytest.mark.slow
def test_each_replica_and_part_has_a_separate_random_stream(mirrored):
    seen = []

    def teacher(images):
        (kept,) = tf.numpy_function(lambda x: (seen.append(x), x)[1:], [images], [tf.float32])
        return tf.zeros((2, 10)) + 0 * tf.reduce_sum(kept)

    values = {"dataset": "synthetic", "distilled": True, "distill": "hard", "teacher": "any.keras"}
    train(mirrored, updates=1, teach=teacher, accumulation=2, seed=3, **values)
    expected = [
        tf.random.stateless_uniform((2, 32, 32, 3), [0, stream + 3 * 1_000_003], 0, 255).numpy()
        for stream in range(4)
    ]
    assert len(seen) == 4
    for images in expected:
        assert sum(np.array_equal(images, found) for found in seen) == 1


# === A whole step of a linear model, compared with NumPy ===

SIZE, CLASSES = (4, 6), 3


@pytest.fixture
def of_one_matrix(monkeypatch):
    """Returns a function that builds a model of `heads` linear heads on the pixels."""
    monkeypatch.setattr(models, "logits_model", lambda model: model)
    monkeypatch.setattr(models, "image_size", lambda model: SIZE)
    monkeypatch.setattr(models, "pixels", lambda model, values: 90.0 + 40.0 * values)

    def make(heads):
        keras.utils.set_random_seed(3)
        images = keras.Input((*SIZE, 3))
        pixels = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(images))
        dense = [keras.layers.Dense(CLASSES, use_bias=False, name=f"head{i}") for i in range(heads)]
        return keras.Model(images, [layer(pixels) for layer in dense])

    return make


def eight_images():
    random = np.random.default_rng(1)
    boxes = [[0, 2, 1, 5], [0, 0, 0, 0], [1, 4, 0, 3], [0, 0, 0, 0]] * 2
    return {
        "image": random.integers(0, 256, (8, *SIZE, 3)).astype("uint8"),
        "label": np.array([0, 1, 2, 1, 2, 2, 0, 1]),
        "weight": np.float32([1, 1, 0, 1, 1, 1, 1, 0]),
        "erase": np.int32(boxes),
    }


def softmax(logits):
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def erased(images, config, step, mixing):
    """Returns eight images after random erasing; noise is drawn per group."""
    each = 8 // len(mixing)
    images = images.copy()
    for j, (top, bottom, left, right) in enumerate(eight_images()["erase"]):
        seed = [step, j // each + config.seed * 1_000_003]
        noise = tf.random.stateless_normal((each, *SIZE, 3), seed).numpy()[j % each]
        images[j, top:bottom, left:right] = 90.0 + 40.0 * noise[top:bottom, left:right]
    return images


def by_numpy(weights, config, mixing, streams, step, teacher_logits=None):
    """Returns (loss, gradients) of eight images in NumPy.

    `mixing` is per group, and synthetic images are drawn per stream.
    """
    data, part = eight_images(), 8 // streams
    images = data["image"].astype("float64")
    if config.dataset == "synthetic":
        seeds = [[step, i + config.seed * 1_000_003] for i in range(streams)]
        shape = (part, *SIZE, 3)
        images = np.concatenate([tf.random.stateless_uniform(shape, s, 0, 255) for s in seeds])
    targets = np.eye(CLASSES)[data["label"]] * (1 - config.label_smoothing)
    targets += config.label_smoothing / CLASSES
    if config.erasing and not config.erase_after_mixing:
        images = erased(images, config, step, mixing)
    old_images, old_targets = images.copy(), targets.copy()
    each = 8 // len(mixing)
    for j in range(8):
        group = j // each
        partner = group * each + each - 1 - j % each
        kept = np.full(SIZE, mixing[group][0], "float64")
        top, bottom, left, right = (int(x) for x in mixing[group][1:])
        kept[top:bottom, left:right] = 0
        images[j] = kept[..., None] * old_images[j] + (1 - kept[..., None]) * old_images[partner]
        targets[j] = kept.mean() * old_targets[j] + (1 - kept.mean()) * old_targets[partner]
    if config.erase_after_mixing and (config.mixup or config.cutmix):
        images = np.rint(images)
    if config.erasing and config.erase_after_mixing:
        images = erased(images, config, step, mixing)
    flat = images.reshape(8, -1) / 255
    weight = data["weight"][:, None].astype("float64") / 8
    logits = [flat @ w for w in weights]
    if teacher_logits is None:
        mean = sum(logits) / len(logits)
        if config.loss == "bce":
            targets = targets if config.label_smoothing else (targets > 0).astype("float64")
            shown = 1 / (1 + np.exp(-mean))
            each = -targets * np.log(shown) - (1 - targets) * np.log1p(-shown)
            gradient = flat.T @ (weight * (shown - targets) / CLASSES) / len(logits)
            return (weight * each).sum() / CLASSES, [gradient] * len(logits)
        loss = -(weight * targets * np.log(softmax(mean))).sum()
        return loss, [flat.T @ (weight * (softmax(mean) - targets)) / len(logits)] * len(logits)
    taught = np.eye(CLASSES)[teacher_logits(images).argmax(axis=-1)]
    loss, gradients = 0.0, [0.0] * len(logits)
    for head, share, wanted in ((0, 1 - ALPHA, targets), (-1, ALPHA, taught)):
        loss -= share * (weight * wanted * np.log(softmax(logits[head]))).sum()
        gradients[head] += share * flat.T @ (weight * (softmax(logits[head]) - wanted))
    return loss, gradients


ALPHA = 0.3
NOT_MIXED = [[1, 0, 0, 0, 0]] * 8
# Shares that avoid rounding ties.
FOUR = [[0.7031234567, 0, 0, 0, 0], [1, 1, 3, 2, 6], [0.2134567891, 0, 0, 0, 0], [1, 0, 4, 0, 1]]
LATER = {"erase_after_mixing": True, "erasing": 0.5}
CASES = {
    "plain": (1, {}, NOT_MIXED),
    "smoothed": (1, {"label_smoothing": 0.2}, NOT_MIXED),
    "two heads": (2, {"label_smoothing": 0.1}, NOT_MIXED),
    "mixup": (1, {"mixup": 0.8, "label_smoothing": 0.1, "mix_groups": 2}, FOUR[:2]),
    "binary": (1, {"loss": "bce", "mixup": 0.8, "mix_groups": 2}, FOUR[:2]),
    "binary, smoothed": (2, {"loss": "bce", "label_smoothing": 0.2}, NOT_MIXED),
    "binary, smoothed and mixed": (
        *(1, {"loss": "bce", "label_smoothing": 0.2, "mixup": 0.8, "cutmix": 1.0}),
        FOUR,
    ),
    "one group": (1, {"mixup": 0.8, "mix_groups": 1}, FOUR[:1]),
    "four groups": (1, {"mixup": 0.8, "cutmix": 1.0}, FOUR),
    "cutmix in parts": (1, {"cutmix": 1.0, "accumulation": 2, "mix_groups": 4}, FOUR),
    "erasing in parts": (1, {"erasing": 0.5, "accumulation": 2, "seed": 5}, NOT_MIXED),
    "erasing, then mixing": (
        *(1, {"erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "mix_groups": 2}),
        FOUR[:2],
    ),
    "mixing, then erasing": (1, {"mixup": 0.8, "mix_groups": 2, "seed": 2, **LATER}, FOUR[:2]),
    "four groups, then erasing": (1, {"mixup": 0.8, "accumulation": 2, **LATER}, FOUR),
    "erasing of what is not mixed": (1, LATER, NOT_MIXED),
    "a large seed": (1, {"seed": 70_000, **LATER}, NOT_MIXED),
    "synthetic": (1, {"dataset": "synthetic", "accumulation": 2}, NOT_MIXED),
    "one head distilled": (1, {"distill": "hard", "teacher": "a.keras"}, NOT_MIXED),
    "distilled": (
        *(2, {"distill": "hard", "teacher": "a.keras", "mixup": 0.8, "mix_groups": 2}),
        [[0.6, 0, 0, 0, 0], [0.1, 0, 0, 0, 0]],
    ),
}


@pytest.mark.parametrize(
    ("devices", "case"),
    [
        *(("one_device", case) for case in CASES),
        *(("mirrored", case) for case in CASES if "group" not in case or "four" in case),
    ],
)
def test_training_step_matches_numpy(of_one_matrix, devices, case, request):
    strategy, (heads, values, mixing) = request.getfixturevalue(devices), CASES[case]
    values = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, **values}
    config = configuration.make(
        "digits", batch_size=8, optimizer="sgd", distill_alpha=ALPHA, **values
    )
    with strategy.scope():
        model = of_one_matrix(heads)
        optimizer = optimization.Optimizer(model, config)

    def teacher(images):
        return tf.stack([tf.reduce_mean(images[:, :, :, i], axis=(1, 2)) for i in range(3)], -1)

    taught = config.distill != "none"
    step = step_functions.make_train_step(
        strategy, model, optimizer, config, CLASSES, teacher if taught else None
    )
    replicas = strategy.num_replicas_in_sync
    dataset = tf.data.Dataset.from_tensor_slices(eight_images()).batch(8 // replicas)
    (batch,) = strategy.distribute_datasets_from_function(lambda context: dataset)
    before = model.get_weights()
    loss, norm, stop = step(batch, *(tf.constant(x) for x in (4.0, 0.5, 1.0, np.float32(mixing))))
    streams = replicas * config.accumulation
    by_hand = (lambda images: images.mean(axis=(1, 2))) if taught else None
    expected, gradients = by_numpy(before, config, mixing, streams, 4, by_hand)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and float(stop) == replicas
    assert float(norm) == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-5)
    for weights, first, gradient in zip(model.get_weights(), before, gradients, strict=True):
        np.testing.assert_allclose(weights, first - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_averages_the_heads_and_counts_by_weight(of_one_matrix, one_device):
    with one_device.scope():
        model = of_one_matrix(2)
    step = step_functions.make_evaluation_step(one_device, model)
    data = eight_images()
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4)
    found = step_functions.evaluate(one_device, step, dataset)
    flat = data["image"].reshape(8, -1) / 255
    probabilities = softmax(sum(flat @ w for w in model.get_weights()) / 2)
    weight, labels = data["weight"], data["label"]
    losses = -np.log(probabilities[np.arange(8), labels])
    right = probabilities.argmax(axis=-1) == labels
    assert found["images"] == weight.sum()
    assert found["evaluation_loss"] == pytest.approx((losses * weight).sum() / weight.sum())
    assert found["accuracy"] == pytest.approx((right * weight).sum() / weight.sum())
    assert found["top5_accuracy"] == 1


# === Losses ===


def test_binary_cross_entropy_treats_positive_shares_as_present():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4, 7)).astype("float32")
    shares = np.float32([[0.3, 0.7, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]] * 2)
    present = shares > 0
    probabilities = 1 / (1 + np.exp(-logits.astype("float64")))
    expected = -np.where(present, np.log(probabilities), np.log1p(-probabilities)).mean(axis=1)
    config = configuration.make("digits", loss="bce", label_smoothing=0.0)
    found = step_functions.find_loss(config)(tf.constant(logits), tf.constant(shares))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.02, 0.3])
@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_binary_cross_entropy_of_smoothed_labels_matches_timm(smoothing, threshold):
    """Labels are smoothed, then mixed, then compared with the threshold."""
    random = np.random.default_rng(2)
    logits = random.normal(size=(6, 5)).astype("float32")
    labels, kept = random.integers(5, size=6), random.uniform(size=(6, 1)).astype("float32")
    targets = np.full((6, 5), smoothing / 5)
    targets[np.arange(6), labels] = 1 - smoothing + smoothing / 5
    targets = kept * targets + (1 - kept) * targets[::-1]
    if threshold is not None:
        targets = (targets > threshold).astype("float64")
    # binary_cross_entropy_with_logits of torch, in its stable form.
    each = np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))
    smoothed = step_functions.soft_labels(tf.constant(labels), 5, smoothing)
    mixed = kept * smoothed + (1 - kept) * smoothed[::-1]
    found = step_functions.binary_cross_entropy(tf.constant(logits), mixed, threshold)
    np.testing.assert_allclose(found, each.mean(axis=1), rtol=1e-5)


def test_loss_option_selects_binary_cross_entropy(one_device):
    losses, _ = train(one_device, updates=1, loss="bce", label_smoothing=0.0)
    # An untrained model has log 2 per class; one of the 8 images has weight 0.
    assert losses[0] == pytest.approx(7 / 8 * np.log(2), rel=0.1)


def test_mixing_continues_in_the_cooldown_and_stops_before_the_end():
    values = {"mixup": 0.8, "epochs": 5, "cooldown_epochs": 3}
    config = configuration.make("digits", **values)
    none = [[1, 0, 0, 0, 0]]
    assert step_functions.draw_mixing(config, 9, (8, 8), 7, 1).tolist() != none
    config = configuration.make("digits", mix_off_epochs=2, **values)
    assert step_functions.draw_mixing(config, 9, (8, 8), 5, 1).tolist() != none
    assert step_functions.draw_mixing(config, 9, (8, 8), 6, 1).tolist() == none
