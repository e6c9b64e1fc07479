"""Optimizers, learning-rate schedules and the moving average of the weights."""

import itertools
import math
from collections.abc import Sequence

import keras
from keras import ops

import config

UNDECAYED = ("bias", "gamma", "beta")
"""Weights that weight decay leaves alone: offsets, and the scales of normalisation."""


def build_optimizer(
    settings: config.Train,
    steps_per_epoch: int,
    statistics: Sequence[keras.Variable] = (),
) -> "FlatOptimizer":
    """The optimizer that `settings` describes.

    Args:
        settings: Optimizer, schedule, clipping, accumulation and moving average.
        steps_per_epoch: Batches per epoch; the schedules count batches.
        statistics: Variables that are averaged with the weights: batch normalisation's.
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
    """The learning rate by batch number that `settings` describes."""
    return Schedule(
        settings.learning_rate,
        settings.schedule,
        steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
    )


@keras.saving.register_keras_serializable("nodules")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a decay to zero at the last step.

    With p the share of the steps after warm-up that is done, the rate is `peak` times

        constant     1
        cosine       (1 + cos(pi p)) / 2
        polynomial   (1 - p)^0.9

    Args:
        peak: Rate at the end of the warm-up.
        decay: Name of the decay.
        steps: Number of all batches, the warm-up's included.
        warmup_steps: Batches of warm-up; batch k of them has the share (k + 1) / warmup_steps.

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
    """Applies another optimizer to all weights laid end to end, as one vector.

    The steps are those of the other optimizer; only fewer operations are needed to take
    them. NASNet has 883 small weight tensors: TensorFlow would trace 45 operations for
    each, more than for the network and its gradient together.

    It also keeps the moving average of the weights, if `ema` is above 0, and of the
    statistics of batch normalisation, which belong to the weights they were measured with.

    Args:
        inner: Optimizer that is not built yet.
        learning_rate: The one that `inner` has, for the logs.
        ema: Momentum of the moving average, per step; 0 for none.
        accumulate: Batches per step.
        statistics: Variables that are not trained but averaged.
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
        """One vector of zeros per group of weights."""
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
            vector.assign(laid_flat([self.weights[i] for i in group]))
            flat_grads.append(
                laid_flat(
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
        # The first step starts the average: there is nothing to average with yet. Batches
        # that only add to the gradient leave the weights and so the average alone.
        batch = self.iterations + 1
        momentum = ops.where(
            batch <= self.accumulate,
            0.0,
            ops.where(batch % self.accumulate == 0, self.ema, 1.0),
        )
        for average, vector in zip(self.averages, self.vectors, strict=True):
            average.assign(momentum * average + (1 - momentum) * vector)
        if self.average_statistics is not None:
            present = laid_flat(self.statistics)
            self.average_statistics.assign(
                momentum * self.average_statistics + (1 - momentum) * present
            )

    def write_weights(self, vectors) -> None:
        """Gives the weights the values that lie end to end in `vectors`, one per group."""
        for vector, group in zip(vectors, self.groups, strict=True):
            assign_parts([self.weights[i] for i in group], vector)

    def swap_averages(self) -> None:
        """Exchanges weights and statistics with their averages; again, and they are back."""
        for vector, group in zip(self.vectors, self.groups, strict=True):
            vector.assign(laid_flat([self.weights[i] for i in group]))
        self.write_weights(self.averages)
        for average, vector in zip(self.averages, self.vectors, strict=True):
            average.assign(vector)
        if self.average_statistics is not None:
            present = laid_flat(self.statistics)
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
    """Gives variables the values that lie end to end in `vector`."""
    ends = list(itertools.accumulate(map(size_of, variables)))
    parts = ops.split(vector, ends[:-1]) if ends[:-1] else [vector]
    for variable, part in zip(variables, parts, strict=True):
        variable.assign(ops.reshape(part, variable.shape))


def laid_flat(tensors) -> keras.KerasTensor:
    return ops.concatenate([ops.reshape(tensor, (-1,)) for tensor in tensors])
