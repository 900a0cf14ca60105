"""Knowledge distillation: a student learns from labels and a teacher (DeiT, arXiv 2012.12877).

See section 4 of the paper. With two heads, as in models built with `distilled=True`, labels train
the class head and the teacher trains the distillation head; with one head, both train it.
"""

from collections.abc import Callable

import keras
from keras import ops

from keras_tnt.models.anatomy import anatomy, is_ours
from keras_tnt.teacher import (
    Teacher,
    activation_of,
    as_float32,
    is_standalone_activation,
    last_layer,
    log,
)
from keras_tnt.weights.names import HEADS

KINDS = ("hard", "soft")
KL_REDUCTIONS = ("mean", "batchmean")


@keras.saving.register_keras_serializable(package="keras_tnt")
class DistillationLoss(keras.losses.Loss):
    """Distillation loss between the logits of student and teacher (DeiT, equations 2 and 3).

    "hard" is the cross-entropy to the teacher's most likely class. "soft" is
    KL(teacher || student) of the two softmaxes at `temperature`, times temperature^2.

    Args:
        kind: `"hard"` or `"soft"`. Defaults to "hard".
        temperature: divisor of both logits for "soft"; positive. Defaults to 1.
        kl_reduction: divisor of the sum over batch and classes for "soft": `"mean"` for batch x
            classes, as in DeiT's released code, or `"batchmean"` for batch, the mean per sample.
            Defaults to "mean".
        reduction: reduction over the batch, as for all Keras losses. Defaults to
            "sum_over_batch_size".
        name: name of the loss. Defaults to "distillation_loss".
        **kwargs: arguments of `keras.losses.Loss`.

    Call arguments:
        y_true: the teacher's logits, `(batch, classes)`.
        y_pred: the student's logits, `(batch, classes)`.

    Raises:
        ValueError: for an unknown `kind` or `kl_reduction`, or a temperature that is not positive.

    Example:
        >>> loss = keras_tnt.distillation.DistillationLoss("soft", temperature=3.0)
        >>> float(loss([[2.0, 0.0]], [[2.0, 0.0]]))
        0.0
    """

    def __init__(
        self,
        kind="hard",
        temperature=1.0,
        kl_reduction="mean",
        reduction="sum_over_batch_size",
        name="distillation_loss",
        **kwargs,
    ):
        """Initializes the loss; the class docstring lists the arguments."""
        check_choice("kind", kind, KINDS)
        check_choice("kl_reduction", kl_reduction, KL_REDUCTIONS)
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive. Received: {temperature!r}")
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.kind = kind
        self.temperature = temperature
        self.kl_reduction = kl_reduction

    def call(self, y_true, y_pred):
        """Returns the loss of each sample, `(batch,)`."""
        if self.kind == "hard":
            return keras.losses.sparse_categorical_crossentropy(
                ops.argmax(y_true, axis=-1), y_pred, from_logits=True
            )
        teacher, student = (
            ops.log_softmax(logits / self.temperature, axis=-1) for logits in (y_true, y_pred)
        )
        divergence = ops.sum(ops.exp(teacher) * (teacher - student), axis=-1)  # (b,)
        classes = y_pred.shape[-1] if self.kl_reduction == "mean" else 1
        return divergence * (self.temperature**2 / classes)

    def get_config(self):
        """Returns the base configuration, `kind`, `temperature` and `kl_reduction`."""
        return {
            **super().get_config(),
            "kind": self.kind,
            "temperature": self.temperature,
            "kl_reduction": self.kl_reduction,
        }


class Distiller(keras.Model):
    """Model that trains a student on labels and on a teacher's outputs for the same images.

    The loss is (1 - alpha) * loss(labels, class head) + alpha * DistillationLoss(teacher,
    distillation head) (DeiT, section 4). `fit`, `evaluate` and `predict` work as for the student
    alone, and so do `save`, which writes the student only, and `save_weights`. `evaluate` and `fit`
    report, in addition to the metrics of `compile`, which receive the student's prediction:
    `class_loss` and `distillation_loss` before the weighting by alpha; `head_accuracy`, and
    `head_distillation_accuracy` of a second head, on the labels; and `teacher_agreement`, the
    fraction of images for which the distillation head predicts the teacher's class.

    The teacher runs in inference mode, without gradients, and is neither changed nor saved. Images
    are resampled to its input size (bicubic, antialiased).

    Args:
        student: a model of this package, or any functional model that ends in one softmax or
            logits. A model with layers `head` and `head_distillation` trains two heads.
        teacher: any Keras model with the student's classes.
        kind: `"hard"` for the teacher's most likely class, or `"soft"` for its probabilities.
            Defaults to "hard".
        alpha: weight of the distillation loss, in [0, 1]. Defaults to 0.5.
        temperature: temperature of the soft loss; positive. Defaults to 1.
        kl_reduction: `"mean"` divides the soft loss by batch x classes, as in DeiT's released code;
            `"batchmean"` divides it by batch alone, which multiplies its weight by the number of
            classes. Defaults to "mean".
        teacher_preprocessing: function from the student's images, already resampled to the
            teacher's size, to the teacher's inputs; or the name of the teacher's inputs: `"pixels"`
            (in [0, 255]), `"unit"` (in [0, 1]), `"caffe"`, `"tf"` or `"torch"` (the modes of
            `keras.applications`' `preprocess_input`), or `"same"` (the student's inputs). If
            `None`, it is detected for models of this package, models that begin with a `Rescaling`,
            a `Normalization` or a `preprocess_input`, and those of `keras.applications`, also
            inside other models; any other teacher receives the student's inputs, with a warning.
        teacher_from_logits: whether the teacher's outputs are logits, not probabilities. If `None`,
            it is detected from the last layer, or else from the outputs: rows that sum to one are
            probabilities.
        name: name of the model. Defaults to "distiller".

    Raises:
        ValueError: for values outside these ranges, and for student and teacher that do not match.

    Example:
        >>> student = keras_tnt.TNT(input_shape=(32, 32, 3), patch_size=8, inner_stride=2, depth=2,
        ...                         outer_dim=48, inner_dim=12, outer_heads=3, inner_heads=2,
        ...                         classes=10, distilled=True)
        >>> distiller = keras_tnt.Distiller(student, teacher, kind="hard")
        >>> distiller.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> distiller.fit(images, labels)
        >>> student.save("student.keras")
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        kind: str = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        *,
        kl_reduction: str = "mean",
        teacher_preprocessing: Callable | str | None = None,
        teacher_from_logits: bool | None = None,
        name: str = "distiller",
    ):
        """Initializes the model; the class docstring lists the arguments."""
        super().__init__(name=name, autocast=False, dtype=policy_of(student))
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1]. Received: {alpha!r}")
        self.alpha = alpha
        self.distillation_loss = DistillationLoss(kind, temperature, kl_reduction)
        self.student = student
        self.heads = Heads(student)
        self.teacher = Teacher(teacher, student, teacher_preprocessing, teacher_from_logits)
        names = ["class_loss", "distillation_loss", "teacher_agreement"]
        names += [f"{head}_accuracy" for head in self.heads.names]
        self.averages = {key: keras.metrics.Mean(name=key) for key in names}
        self.built = True

    @property
    def non_trainable_variables(self):
        """Returns the student's, and all of the teacher's for JAX's stateless training step."""
        own = super().non_trainable_variables
        known = {id(variable) for variable in self.variables}
        return own + [v for v in self.teacher.model.variables if id(v) not in known]

    def compile(self, optimizer="rmsprop", loss="crossentropy", **kwargs):
        """Configures training, like `keras.Model.compile`.

        Args:
            optimizer: as for any model. Defaults to "rmsprop".
            loss: base loss of the class head, such as the student could be compiled with. A Keras
                loss with `from_logits=True` receives the head's logits, any other loss the output
                of the student's activation. `"crossentropy"` accepts integer and one-hot labels.
                Defaults to "crossentropy".
            **kwargs: as for any model.
        """
        super().compile(optimizer=optimizer, loss=loss, **kwargs)
        if getattr(loss, "from_logits", False):
            self.base_activation = keras.activations.linear
        elif loss == "crossentropy":
            self.base_activation = keras.activations.softmax
        else:
            self.base_activation = self.heads.activation
        self.distillation_loss.reduction = getattr(loss, "reduction", "sum_over_batch_size")

    def call(self, images, training=False):
        """Returns a dict of the student's `predictions` and the logits of each head."""
        return self.heads.network(images, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Returns the weighted loss, and updates the metrics that need the teacher."""
        logits = y_pred["head"]
        class_output = self.base_activation(as_float32(logits))
        base = super().compute_loss(x, y, class_output, sample_weight, training)
        # Regularization losses and losses of layers are not weighted by alpha.
        penalty = sum(ops.sum(loss) for loss in self.losses)
        class_loss = base - penalty
        teacher_logits = self.teacher(x)
        last_logits = y_pred.get("head_distillation", logits)
        distillation = self.distillation_loss(teacher_logits, last_logits, sample_weight)

        batch = ops.shape(logits)[0]
        self.averages["class_loss"].update_state(class_loss, sample_weight=batch)
        self.averages["distillation_loss"].update_state(distillation, sample_weight=batch)
        self.averages["teacher_agreement"].update_state(
            same_class(teacher_logits, last_logits), sample_weight
        )
        return (1 - self.alpha) * class_loss + self.alpha * distillation + penalty

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Updates the accuracy of each head and the compiled metrics."""
        for head in self.heads.names:
            self.averages[f"{head}_accuracy"].update_state(
                same_class(y, y_pred[head]), sample_weight
            )
        return super().compute_metrics(x, y, y_pred["predictions"], sample_weight)

    def predict(self, *args, **kwargs):
        """Calls the student's `predict`."""
        return self.student.predict(*args, **kwargs)

    def save(self, *args, **kwargs):
        """Calls the student's `save`; the file contains the student alone."""
        return self.student.save(*args, **kwargs)


def policy_of(model: keras.Model) -> keras.DTypePolicy:
    """Returns the dtype policy for training: `mixed_float16` if any layer has it (loss scaling).

    A functional model that a user built, or that an earlier release saved, has the global policy,
    for any policy of its layers.
    """
    policies = [layer.dtype_policy for layer in model._flatten_layers()]
    return next((p for p in policies if p.name == "mixed_float16"), model.dtype_policy)


class Heads:
    """Function from images to the student's prediction and the logits of each head.

    It is not a layer, so that the student's weights are saved only once.
    """

    def __init__(self, student):
        """Builds the network with the logits of each head as outputs.

        Args:
            student: a functional or Sequential model with one output.

        Raises:
            ValueError: if the student has several outputs, hides two heads inside another model, or
                ends in an unknown activation.
        """
        if len(getattr(student, "outputs", None) or ()) != 1:
            raise ValueError(
                "The student must be a functional or Sequential model with one output. Received: "
                f"'{student.name}' of type {type(student).__name__}"
            )
        heads = student_heads(student)
        own = [layer for layer in heads if layer in student.layers]
        if len(heads) == 2 and not own:
            raise ValueError(
                f"Student '{student.name}' wraps a model with two heads, which hides them. Distill "
                "that model itself; what stands before it can be its `input_tensor`."
            )
        last = last_layer(student)
        self.activation = activation_of(last) or keras.activations.linear
        self.names = HEADS[: max(len(own), 1)]
        if len(own) == 2:
            outputs = {name: layer.output for name, layer in zip(HEADS, own, strict=True)}
        else:
            outputs = {"head": student_logits(student, last)}
        self.network = keras.Model(
            student.inputs[0], {"predictions": student.outputs[0], **outputs}
        )


def student_heads(student):
    """Returns the heads of a student: those of our model, or the layers with their names."""
    if is_ours(student):
        return anatomy(student).heads
    return tuple(layer for layer in student._flatten_layers() if layer.name in HEADS)


def student_logits(student, last):
    """Returns the symbolic logits of a student with one head.

    Raises:
        ValueError: if the last activation is neither linear nor softmax.
    """
    if is_standalone_activation(last) and last in student.layers:
        return last.input
    activation = activation_of(last)
    if activation is keras.activations.linear:
        return student.outputs[0]
    if activation is keras.activations.softmax:
        return log(student.outputs[0])
    raise ValueError(
        f"Cannot tell whether student '{student.name}' gives logits or probabilities: its last "
        f"layer is {last}. Let it end in a Dense, Activation or Softmax layer."
    )


def same_class(targets, logits):
    """Returns 1 for each sample whose largest logit is at the target class, else 0, `(batch,)`.

    Args:
        targets: class indices, or `(batch, classes)` with the largest value at the class.
        logits: `(batch, classes)`.
    """
    classes = logits.shape[-1]
    if len(targets.shape) == 2 and targets.shape[-1] == classes:
        targets = ops.argmax(targets, axis=-1)
    targets = ops.reshape(targets, (-1,))  # (b,)
    return ops.cast(ops.equal(ops.cast(targets, "int32"), ops.argmax(logits, axis=-1)), "float32")


def check_choice(argument, value, choices):
    """Raises a `ValueError` if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}. Received: {value!r}"
        )
