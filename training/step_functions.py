"""Training step (mix, forward, backward, all-reduce, apply) and evaluation step."""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_tnt.distillation import DistillationLoss
from keras_tnt.kernels import runtimes
from training import augmentation, models


def cross_entropy(logits, targets):
    """Returns the softmax cross-entropy of each sample, float32 (batch,)."""
    return tf.nn.softmax_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))


def binary_cross_entropy(logits, targets, threshold=None):
    """Returns the binary cross-entropy of each sample, the mean over classes, float32 (batch,).

    Args:
        logits: (batch, classes).
        targets: Soft labels (batch, classes).
        threshold: Number above which a target counts as 1, while all others count as 0. If `None`,
            the targets are used as they are.
    """
    if threshold is not None:
        targets = tf.cast(targets > threshold, tf.float32)
    each = tf.nn.sigmoid_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))
    return tf.reduce_mean(each, axis=-1)


def find_loss(config):
    """Returns the function of `--loss`, from (logits, soft labels) to the loss of each sample.

    Without label smoothing, `bce` has the target threshold 0 of DeiT III: a mixed image shows both
    of its classes. Smoothed targets are all above 0, so they are used as they are, which is timm's
    `BinaryCrossEntropy` without a target threshold.

    Args:
        config: A `training.configuration.Config`.
    """
    if config.loss == "cross_entropy":
        return cross_entropy
    threshold = None if config.label_smoothing else 0.0
    return functools.partial(binary_cross_entropy, threshold=threshold)


def soft_labels(labels, classes, smoothing):
    """Returns float targets (batch, classes) with label smoothing.

    Args:
        labels: Integers (batch,), or soft labels (batch, classes), which are not one-hot encoded.
        classes: Number of classes.
        smoothing: Total weight that is spread evenly over all classes.
    """
    targets = tf.one_hot(labels, classes) if labels.shape.rank == 1 else labels
    return targets * (1 - smoothing) + smoothing / classes


MIX_GROUPS = 8  # processes of TNT's published training, one per GPU


def mixes(config):
    """Returns whether the training step applies mixup or cutmix."""
    return bool(config.mixup or config.cutmix) and config.augmentation == "builtin"


def count_groups(config, replicas):
    """Returns the number of groups that a global batch is divided into for mixing and erasing.

    A group corresponds to the batch of one process in the published training: its images share one
    draw of mixup or cutmix and are paired within it. Groups are consecutive images of the global
    batch and are never split over devices, so that the same groups give the same training on any
    number of devices.

    Args:
        config: A `training.configuration.Config`. With `mix_groups=0` there are 8 groups if batch,
            devices and accumulation allow it, else the next valid number.
        replicas: Number of devices that share the batch.

    Raises:
        ValueError: If devices, accumulation and groups do not divide the batch.
    """
    size, parts = config.batch_size, replicas * config.accumulation
    together = 2 if mixes(config) else 1
    devices = f"{replicas} devices, --accumulation={config.accumulation}"
    if size % (parts * together):
        raise ValueError(
            f"--batch_size={size} must be a multiple of {parts * together}: {devices}"
            + (", and mixing takes images two by two" if mixes(config) else "")
        )
    units = size // together
    valid = [n for n in range(parts, units + 1, parts) if units % n == 0]
    if mixes(config) and config.mix_groups:
        if config.mix_groups not in valid:
            raise ValueError(
                f"--mix_groups={config.mix_groups} does not divide --batch_size={size} into groups "
                f"of an even number of images that lie whole on a device ({devices}). Valid: "
                f"{', '.join(map(str, valid))}, or 0 to choose one of them"
            )
        return config.mix_groups
    # Prefer multiples of the largest power of 2 up to 8, so that most device counts choose the
    # same groups.
    unit = math.gcd(MIX_GROUPS, units)
    valid = [n for n in valid if n % unit == 0]
    return next((n for n in valid if n >= MIX_GROUPS), valid[-1])


def draw_mixing(config, step, size, epoch, groups):
    """Draws the mixup or cutmix parameters of each group, as a function of (seed, step, group).

    Args:
        config: A `training.configuration.Config`.
        step: Updates made before.
        size: (height, width) of the images.
        epoch: Counted from 0.
        groups: Number of groups, from `count_groups`.

    Returns:
        float32 (groups, 5): lambda of mixup, the weight of the image itself, and the box (top,
        bottom, left, right) that cutmix fills with the partner's pixels.
    """
    mixing = np.tile(np.float32([1, 0, 0, 0, 0]), (groups, 1))
    alphas = [("mixup", config.mixup), ("cutmix", config.cutmix)]
    kinds = [(kind, alpha) for kind, alpha in alphas if alpha]
    if not kinds or epoch >= config.total_epochs - config.mix_off_epochs:
        return mixing
    for group, row in enumerate(mixing):
        random = np.random.default_rng([config.seed, step, 2, group])
        kind, alpha = kinds[random.integers(len(kinds))]
        kept = random.beta(alpha, alpha)
        if kind == "mixup":
            row[0] = kept
            continue
        for i, side in enumerate(size):
            middle, reach = random.integers(side), int(side * np.sqrt(1 - kept)) // 2
            row[1 + 2 * i : 3 + 2 * i] = np.clip([middle - reach, middle + reach], 0, side)
    return mixing


def make_train_step(strategy, model, optimizer, config, classes, teacher=None):
    """Builds the function that trains on one global batch.

    Args:
        strategy: A `tf.distribute.Strategy`.
        model: The `keras.Model`, on pixels.
        optimizer: A `training.optimization.Optimizer`.
        config: A `training.configuration.Config`.
        classes: Number of classes.
        teacher: Function from pixels to a teacher's logits, which the last head is trained to
            match. If `None`, there is no distillation.

    Returns:
        `train_step(batch, step, learning_rate, stop, mixing)`, which returns the loss and the
        gradient norm, scalars, and the sum over the replicas of `stop`, in its shape. `mixing` is
        the result of `draw_mixing`.
    """
    logits_model = models.logits_model(model)
    size = models.image_size(model)
    trainable = [v.value for v in model.trainable_variables]
    parts = strategy.num_replicas_in_sync * config.accumulation
    part = config.batch_size // parts  # images of one forward pass
    part_groups = count_groups(config, strategy.num_replicas_in_sync) // parts
    erases = config.erasing and config.augmentation == "builtin"
    base_loss = find_loss(config)
    statistics = moving_statistics(model)
    distillation = None
    if teacher:
        distillation = DistillationLoss(config.distill, config.temperature, reduction=None)

    def seed_of(step, stream):
        """Returns the seed of an update and a stream: a part of the batch, or a group."""
        return tf.stack([step, stream + config.seed * 1_000_003])

    def erase(images, boxes, step, stream):
        # Noise is drawn per group, so that it does not depend on the number of devices.
        shape = (part // part_groups, *images.shape[1:])
        groups = [stream * part_groups + i for i in range(part_groups)]
        noise = [tf.random.stateless_normal(shape, seed_of(step, group)) for group in groups]
        erased = augmentation.box_mask(boxes, size)
        return tf.where(erased, models.pixels(model, tf.concat(noise, axis=0)), images)

    def pixels_and_targets(batch, step, stream, mixing):
        images = tf.cast(batch["image"], tf.float32)
        if config.dataset == "synthetic":
            images = tf.random.stateless_uniform(tf.shape(images), seed_of(step, stream), 0, 255)
        images = tf.ensure_shape(images, (part, *size, 3))
        targets = soft_labels(batch["label"], classes, config.label_smoothing)
        if erases and not config.erase_after_mixing:
            images = erase(images, batch["erase"], step, stream)
        if mixes(config):
            boxes = augmentation.box_mask(tf.cast(mixing[:, 1:], tf.int32), size)
            kept = mixing[:, 0, None, None, None] * (1 - tf.cast(boxes, tf.float32))
            images = augmentation.mix(images, kept)  # kept: (groups, height, width, 1)
            if config.erase_after_mixing:
                images = tf.round(images)
            targets = augmentation.mix(targets, tf.reduce_mean(kept, axis=(1, 2)))
        if erases and config.erase_after_mixing:
            images = erase(images, batch["erase"], step, stream)
        return images, targets

    @runtimes.local_program()
    def forward_backward(batch, loss_scale, step, stream, mixing):
        images, targets = pixels_and_targets(batch, step, stream, mixing)
        with tf.GradientTape() as tape:
            logits = keras.tree.flatten(logits_model(images, training=True))
            if teacher:
                losses = (1 - config.distill_alpha) * base_loss(logits[0], targets)
                learned = tf.cast(logits[-1], tf.float32)
                losses += config.distill_alpha * distillation(teacher(images), learned)
            else:
                losses = base_loss(tf.add_n(logits) / len(logits), targets)
            loss = tf.reduce_sum(losses * batch["weight"]) / config.batch_size
            scaled = loss * loss_scale
        gradients = tape.gradient(scaled, trainable, unconnected_gradients="zero")
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    if uses_xla(config):
        forward_backward = tf.function(forward_backward, jit_compile=True, autograph=False)

    def replica_step(batch, step, rate, stop, mixing):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        loss, gradients = 0.0, [0.0] * len(trainable)
        before = [tf.identity(v) for v in statistics]
        for i in range(config.accumulation):
            piece = {name: x[i * part : (i + 1) * part] for name, x in batch.items()}
            stream = tf.cast(replica, tf.int64) * config.accumulation + i
            first = tf.cast(stream, tf.int32) * part_groups
            own = tf.slice(mixing, [first, 0], [part_groups, 5])
            scale = optimizer.loss_scale()
            piece_loss, piece_gradients = forward_backward(
                piece, scale, tf.cast(step, tf.int64), stream, own
            )
            loss += piece_loss
            gradients = [g + p for g, p in zip(gradients, piece_gradients, strict=True)]
        norm = optimizer.apply(gradients, step, rate)
        synchronize(statistics, before, optimizer.is_kept(norm))
        return tf.concat([[loss], tf.reshape(stop, [-1])], 0), norm

    @tf.function(autograph=False)
    def train_step(batch, step, rate, stop, mixing):
        sums, norms = strategy.run(replica_step, args=(batch, step, rate, stop, mixing))
        sums = strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
        norm = strategy.reduce(tf.distribute.ReduceOp.MEAN, norms, axis=None)
        return sums[0], norm, tf.reshape(sums[1:], tf.shape(stop))

    return train_step


def moving_statistics(model):
    """Returns the `tf.Variable`s of batch normalization's moving statistics."""
    return [
        v.value
        for v in model.non_trainable_variables
        if v.path.rsplit("/", 1)[-1].startswith(("moving_", "running_"))
    ]


def synchronize(statistics, before, kept):
    """Sets the moving statistics of every replica to their mean over the replicas.

    Each replica normalizes with the statistics of its part of the batch, but the moving statistics
    must be equal on all, because a checkpoint stores those of the first replica.

    Args:
        statistics: List of `tf.Variable`s.
        before: Their values before this update.
        kept: Boolean tensor, false if the update overflowed and must leave the statistics
            unchanged. If `None`, the update is always applied.
    """
    replica = tf.distribute.get_replica_context()
    if not statistics or (replica.num_replicas_in_sync == 1 and kept is None):
        return
    after = [tf.convert_to_tensor(v) for v in statistics]
    if replica.num_replicas_in_sync > 1:
        # The mean of the changes, so that frozen statistics stay bit-identical.
        changes = [new - old for old, new in zip(before, after, strict=True)]
        changes = replica.all_reduce(tf.distribute.ReduceOp.MEAN, changes)
        after = [old + change for old, change in zip(before, changes, strict=True)]
    for variable, old, new in zip(statistics, before, after, strict=True):
        variable.assign(new if kept is None else tf.where(kept, new, old))


def make_execution(train_step):
    """Builds the function that trains on several global batches in one execution.

    Args:
        train_step: Result of `make_train_step`.

    Returns:
        `execute(iterator, count, first, rates, stop, mixings)`, which runs updates `first` to
        `first + count - 1` on the next `count` batches of a distributed iterator, with one learning
        rate and one draw of mixing each. It returns losses and gradient norms, (count,), and the
        last sum of `stop`. It is traced once for every `count`; its attribute
        `experimental_get_tracing_count` is that of the `tf.function` in it.
    """

    @tf.function(autograph=False)
    def updates(iterator, count, first, rates, stop, mixings):
        def update(i, losses, norms, _):
            step = tf.cast(first + i, tf.float32)
            loss, norm, stops = train_step(next(iterator), step, rates[i], stop, mixings[i])
            return i + 1, losses.write(i, loss), norms.write(i, norm), stops

        arrays = [tf.TensorArray(tf.float32, count, element_shape=[]) for _ in range(2)]
        _, losses, norms, stops = tf.while_loop(
            lambda i, *_: i < count,
            update,
            (tf.constant(0), *arrays, tf.zeros_like(stop)),
            parallel_iterations=1,
        )
        return losses.stack(), norms.stack(), stops

    def any_length(values):
        return tf.TensorSpec([None, *values.shape[1:]], values.dtype)

    def execute(iterator, count, first, rates, stop, mixings):
        # Not an `input_signature`, because the type of the iterator is known only here.
        concrete = updates.get_concrete_function(
            iterator, count, first, any_length(rates), stop, any_length(mixings)
        )
        return concrete(iterator, count, first, rates, stop, mixings)

    execute.experimental_get_tracing_count = updates.experimental_get_tracing_count
    return execute


def make_evaluation_step(strategy, model):
    """Builds the function that evaluates one batch.

    Args:
        strategy: A `tf.distribute.Strategy`.
        model: The `keras.Model`, on pixels. The logits of several heads are averaged.

    Returns:
        `evaluation_step(batch)`, which returns float32 (4,), sums over the batch: loss, top-1,
        top-5, images. Padding has weight 0 and does not count.
    """
    logits_model = models.logits_model(model)

    def replica_step(batch):
        logits = keras.tree.flatten(logits_model(tf.cast(batch["image"], tf.float32)))
        logits = tf.cast(tf.add_n(logits) / len(logits), tf.float32)
        labels, weight = batch["label"], batch["weight"]
        judge = judge_several_labels if labels.shape.rank == 2 else judge_one_label
        loss, top1, top5 = judge(logits, labels)
        return tf.stack(
            [tf.reduce_sum(x * weight) for x in (loss, top1, top5, tf.ones_like(weight))]
        )

    @tf.function(autograph=False)
    def evaluation_step(batch):
        sums = strategy.run(replica_step, args=(batch,))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return evaluation_step


def judge_one_label(logits, labels):
    """Returns cross-entropy, top-1 and top-5 of images with one label, float32 (batch,) each.

    Args:
        logits: float32 (batch, classes).
        labels: Integers (batch,).
    """
    classes = logits.shape[-1]
    loss = cross_entropy(logits, tf.one_hot(labels, classes))
    top = [tf.math.in_top_k(labels, logits, min(k, classes)) for k in (1, 5)]
    return loss, *(tf.cast(right, tf.float32) for right in top)


def judge_several_labels(logits, labels):
    """Returns loss, top-1 and top-5 of images with several correct labels, float32 (batch,) each.

    The loss is the negative log of the total probability of the correct labels. A prediction in the
    top 1 (top 5) is correct if it is one of them.

    Args:
        logits: float32 (batch, classes).
        labels: float32 (batch, classes), 1 at the correct labels.
    """
    right_ones = tf.where(labels > 0, tf.nn.log_softmax(logits), tf.float32.min)
    best = tf.math.top_k(logits, min(5, logits.shape[-1])).indices
    right = tf.gather(labels, best, batch_dims=1)  # (batch, 5)
    return -tf.reduce_logsumexp(right_ones, axis=-1), right[:, 0], tf.reduce_max(right, axis=-1)


def evaluate(strategy, evaluation_step, dataset):
    """Returns the mean metrics over a data set.

    Args:
        strategy: A `tf.distribute.Strategy`.
        evaluation_step: Result of `make_evaluation_step`.
        dataset: A `tf.data.Dataset` of batches for one replica each.

    Returns:
        A dict: `accuracy`, `top5_accuracy`, `evaluation_loss`, `images`.
    """
    sums = np.zeros(4)
    for batch in strategy.distribute_datasets_from_function(lambda context: dataset):
        sums += evaluation_step(batch).numpy()
    loss, top1, top5, images = sums
    counted = max(images, 1.0)
    return {
        "accuracy": float(top1 / counted),
        "top5_accuracy": float(top5 / counted),
        "evaluation_loss": float(loss / counted),
        "images": round(images),
    }


def uses_xla(config):
    """Returns whether XLA compiles the training step; `--jit=auto` compiles it on GPUs."""
    if config.jit == "auto":
        return bool(tf.config.list_physical_devices("GPU")) and not config.cpu_devices
    return config.jit == "on"
