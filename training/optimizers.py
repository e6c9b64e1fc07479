"""Optimizers, learning-rate schedules and the moving average of the weights."""

import itertools
import math
from collections.abc import Sequence

import keras
from keras import ops

import config

UNDECAYED = ("bias", "gamma", "beta")
"""Weights without weight decay: offsets, and the scales of normalisation."""


def build_optimizer(
    settings: config.Train,
    steps_per_epoch: int,
    statistics: Sequence[keras.Variable] = (),
) -> "FlatOptimizer":
    """Builds the optimizer that `settings` describes.

    Args:
        settings: Optimizer, schedule, clipping, accumulation and moving average.
        steps_per_epoch: Batches per epoch; the schedules count batches.
        statistics: Batch-normalisation statistics, averaged along with the weights.
    """
    rate = learning_rate(settings, steps_per_epoch)
    options = {
        "learning_rate": rate,
        "global_clipnorm": settings.clip_norm or None,
        "gradient_accumulation_steps": (
            settings.accumulate if settings.accumulate > 1 else None
        ),
    }
    match settings.optimizer:
        case "adam":
            inner = keras.optimizers.Adam(**options)
        case "adamw":
            inner = keras.optimizers.AdamW(
                weight_decay=settings.weight_decay, **options
            )
        case "sgd":
            inner = keras.optimizers.SGD(momentum=0.9, nesterov=True, **options)
    return FlatOptimizer(
        inner,
        learning_rate=rate,
        ema=settings.ema,
        accumulate=settings.accumulate,
        statistics=statistics,
    )


def learning_rate(settings: config.Train, steps_per_epoch: int) -> "Schedule":
    """Builds the learning-rate schedule that `settings` describes, by batch number."""
    return Schedule(
        settings.learning_rate,
        settings.schedule,
        steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
    )


@keras.saving.register_keras_serializable("nodules")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Learning-rate schedule with linear warm-up, then a constant rate or a decay to zero.

    With p the finished share of the steps after warm-up, the rate is `peak` times

        constant     1
        cosine       (1 + cos(pi p)) / 2
        polynomial   (1 - p)^0.9

    Args:
        peak: Learning rate at the end of the warm-up.
        decay: Name of the decay in the table above.
        steps: Total number of batches, warm-up included.
        warmup_steps: Number of warm-up batches; batch k has `peak` * (k + 1) / warmup_steps.

    Reference: Loshchilov and Hutter 2017 (cosine); nnU-Net (polynomial, exponent 0.9).
    """

    def __init__(self, peak: float, decay: str, *, steps: int, warmup_steps: int = 0):
        super().__init__()
        self.peak = peak
        self.decay = decay
        self.steps = steps
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        length = max(self.steps - self.warmup_steps, 1)
        done = ops.clip((step - self.warmup_steps) / length, 0.0, 1.0)
        match self.decay:
            case "cosine":
                share = (1 + ops.cos(ops.multiply(done, 3.14159265))) / 2
            case "polynomial":
                share = ops.power(1 - done, 0.9)
            case _:
                share = ops.ones_like(done)
        rising = (step + 1) / max(self.warmup_steps, 1)
        return self.peak * ops.where(step < self.warmup_steps, rising, share)

    def get_config(self):
        return {
            "peak": self.peak,
            "decay": self.decay,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable("nodules")
class FlatOptimizer(keras.optimizers.Optimizer):
    """Optimizer that applies another one to all weights concatenated into vectors.

    There is one vector of weights with weight decay and one of weights without. The updates are
    those of the inner optimizer, computed with fewer operations: NASNet has 883 small weight
    tensors, for each of which TensorFlow would trace 45 operations, more than for the network
    and its gradient together.

    If `ema` is above 0, it also keeps the moving average of the weights, and that of the
    batch-normalisation statistics, which belong to the weights that they were measured with.

    Args:
        inner: Optimizer to apply; not built yet.
        learning_rate: Learning rate of `inner`, for the logs.
        ema: Momentum of the moving average, per step; 0 for none.
        accumulate: Batches per step.
        statistics: Variables that are averaged but not trained.
    """

    def __init__(
        self,
        inner,
        *,
        learning_rate,
        ema: float = 0.0,
        accumulate: int = 1,
        statistics: Sequence[keras.Variable] = (),
        name: str = "flat",
    ):
        super().__init__(learning_rate=learning_rate, name=name)
        self.inner = inner
        self.ema = ema
        self.accumulate = accumulate
        self.statistics = tuple(statistics) if ema else ()

    def build(self, variables):
        super().build(variables)
        self.weights = tuple(variables)
        decayed = [v.name not in UNDECAYED for v in variables]
        indices = [
            tuple(i for i, decay in enumerate(decayed) if decay == wanted)
            for wanted in (True, False)
        ]
        self.groups = tuple(group for group in indices if group)
        self.vectors = self.new_vectors("weights")
        self.averages = self.new_vectors("average") if self.ema else ()
        self.average_statistics = (
            self.add_variable((sum(map(size_of, self.statistics)),), name="statistics")
            if self.statistics
            else None
        )
        self.inner.exclude_from_weight_decay(
            var_list=[
                vector
                for vector, group in zip(self.vectors, self.groups, strict=True)
                if not decayed[group[0]]
            ]
        )
        self.inner.build(list(self.vectors))

    def new_vectors(self, name: str) -> tuple[keras.Variable, ...]:
        """Adds one vector of zeros per group of weights."""
        lengths = (
            sum(size_of(self.weights[i]) for i in group) for group in self.groups
        )
        return tuple(self.add_variable((length,), name=name) for length in lengths)

    @property
    def variables(self):
        return super().variables + self.inner.variables

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(list(trainable_variables or ()))
        flat_grads = []
        for vector, group in zip(self.vectors, self.groups, strict=True):
            vector.assign(concatenate_flat([self.weights[i] for i in group]))
            flat_grads.append(
                concatenate_flat(
                    [
                        ops.zeros_like(self.weights[i])
                        if grads[i] is None
                        else grads[i]
                        for i in group
                    ]
                )
            )
        self.inner.apply(flat_grads, list(self.vectors))
        self.write_weights(self.vectors)
        if self.ema:
            self.update_averages()
        self.iterations.assign_add(1)

    def update_averages(self) -> None:
        # The first step sets the average, as there is nothing to average with yet. Batches
        # that only accumulate the gradient change neither the weights nor the average.
        batch = self.iterations + 1
        momentum = ops.where(
            batch <= self.accumulate,
            0.0,
            ops.where(batch % self.accumulate == 0, self.ema, 1.0),
        )
        for average, vector in zip(self.averages, self.vectors, strict=True):
            average.assign(momentum * average + (1 - momentum) * vector)
        if self.average_statistics is not None:
            present = concatenate_flat(self.statistics)
            self.average_statistics.assign(
                momentum * self.average_statistics + (1 - momentum) * present
            )

    def write_weights(self, vectors) -> None:
        """Assigns the concatenated values in `vectors`, one per group, to the weights."""
        for vector, group in zip(vectors, self.groups, strict=True):
            assign_parts([self.weights[i] for i in group], vector)

    def swap_averages(self) -> None:
        """Swaps weights and statistics with their averages; a second call swaps them back."""
        for vector, group in zip(self.vectors, self.groups, strict=True):
            vector.assign(concatenate_flat([self.weights[i] for i in group]))
        self.write_weights(self.averages)
        for average, vector in zip(self.averages, self.vectors, strict=True):
            average.assign(vector)
        if self.average_statistics is not None:
            present = concatenate_flat(self.statistics)
            assign_parts(self.statistics, self.average_statistics)
            self.average_statistics.assign(present)

    def get_config(self):
        base = super().get_config()
        return {
            "inner": keras.optimizers.serialize(self.inner),
            **{name: base[name] for name in ("name", "learning_rate")},
            "ema": self.ema,
            "accumulate": self.accumulate,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.optimizers.deserialize(config.pop("inner"))
        rate = config.pop("learning_rate")
        if isinstance(rate, dict):
            rate = keras.optimizers.schedules.deserialize(rate)
        return cls(inner, learning_rate=rate, **config)


def size_of(variable: keras.Variable) -> int:
    return math.prod(variable.shape)


def assign_parts(
    variables: Sequence[keras.Variable], vector: keras.KerasTensor
) -> None:
    """Assigns consecutive parts of `vector` to the variables."""
    ends = list(itertools.accumulate(map(size_of, variables)))
    parts = ops.split(vector, ends[:-1]) if ends[:-1] else [vector]
    for variable, part in zip(variables, parts, strict=True):
        variable.assign(ops.reshape(part, variable.shape))


def concatenate_flat(tensors) -> keras.KerasTensor:
    return ops.concatenate([ops.reshape(tensor, (-1,)) for tensor in tensors])
