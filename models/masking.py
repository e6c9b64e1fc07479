"""Random cube masking: hide cubes of the volume, so that context must explain them.

Trained and run with it, a network segments what it cannot see from what surrounds it; over
many masks, its mean holds lungs whole whatever fills them, and the standard deviation says
where it guessed.

Reference: Zhuang et al. 2025 (ISBI), 7-voxel cubes at 2 mm, 70 % of them replaced by 1.0.
"""

import keras
import numpy as np
from keras import KerasTensor, layers, ops


@keras.saving.register_keras_serializable("nodules")
class RandomCubeMasking(layers.Layer):
    """Replaces an exact number of cubes by a constant, other cubes for every volume.

    The grid of cubes is shifted by a random offset, so cube borders do not always lie in
    the same place; cubes at the border are cut. In training it draws by itself. Otherwise
    the volume passes unchanged, unless `noise` is given: then the masks follow from it
    alone, whatever the batch.

    Args:
        cube_px: Edge of the cubes.
        fraction: Share of the cubes that is replaced, 0 to 1.
        value: What replaces them, in the units of the input.
        varied: In training, replace a share drawn from 0 to `fraction` for each volume, so
            that the network also learns what nothing is hidden of.
        seed: Of the draws in training.

    Call arguments:
        inputs: (batch, z, y, x, channels).
        noise: (batch, n) numbers in 0..1 with n from `noise_size`, e.g. of `mask_noise`.

    Output shape:
        That of `inputs`.
    """

    def __init__(
        self,
        cube_px: int = 7,
        fraction: float = 0.7,
        value: float = 1.0,
        varied: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if cube_px < 1 or not 0 <= fraction <= 1:
            raise ValueError(
                f"cube_px is {cube_px} and fraction {fraction}; expected at least 1, and "
                "0 to 1"
            )
        self.cube_px = cube_px
        self.fraction = fraction
        self.value = value
        self.varied = varied
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def call(self, inputs, noise=None, training=False):
        fraction = self.fraction
        if noise is None:
            if not training:
                return inputs
            volumes = ops.shape(inputs)[0]
            size = noise_size(inputs.shape[1:4], self.cube_px)
            noise = keras.random.uniform((volumes, size), seed=self.seed_generator)
            if self.varied:
                share = keras.random.uniform((volumes, 1), seed=self.seed_generator)
                fraction = fraction * share
        masked = cube_mask(noise, inputs.shape[1:4], self.cube_px, fraction)
        return ops.where(masked[..., None], ops.cast(self.value, inputs.dtype), inputs)

    def get_config(self):
        return {
            **super().get_config(),
            "cube_px": self.cube_px,
            "fraction": self.fraction,
            "value": self.value,
            "varied": self.varied,
            "seed": self.seed,
        }


def grid_shape(shape: tuple[int, ...], cube_px: int) -> tuple[int, ...]:
    """Cubes along z, y and x: enough to cover the volume at any offset."""
    return tuple((size + 2 * (cube_px - 1)) // cube_px for size in shape)


def noise_size(shape: tuple[int, ...], cube_px: int) -> int:
    """Numbers that `cube_mask` needs: one for each cube, and three for the offset."""
    return int(np.prod(grid_shape(shape, cube_px))) + 3


def cube_mask(
    noise: KerasTensor,
    shape: tuple[int, ...],
    cube_px: int,
    fraction: float | KerasTensor,
) -> KerasTensor:
    """Which voxels are hidden.

    Args:
        noise: (batch, `noise_size`) numbers in 0..1; the first three place the grid, the
            others rank the cubes.
        shape: (z, y, x) of the volume.
        cube_px: Edge of the cubes.
        fraction: Share of the cubes that is hidden, rounded to a whole number of cubes; one
            for all volumes, or (batch, 1).

    Returns:
        (batch, z, y, x) bool.
    """
    cubes = grid_shape(shape, cube_px)
    count = int(np.prod(cubes))
    hidden = ops.cast(ops.round(fraction * count), "int32")
    ranks = ops.argsort(ops.argsort(noise[:, 3:], axis=1), axis=1)
    mask = ops.reshape(ranks < hidden, (-1, *cubes))
    offset = ops.cast(ops.floor(noise[:, :3] * cube_px), "int32")  # (batch, 3)
    offset = ops.minimum(offset, cube_px - 1)
    for axis, size in enumerate(shape):
        cube_of = (ops.arange(size)[None] + offset[:, axis : axis + 1]) // cube_px
        places = ops.reshape(
            cube_of, (-1, *(size if a == axis else 1 for a in range(3)))
        )
        places = ops.broadcast_to(
            places,
            (
                ops.shape(noise)[0],
                *(size if a == axis else mask.shape[a + 1] for a in range(3)),
            ),
        )
        mask = ops.take_along_axis(mask, places, axis=axis + 1)
    return mask


def mask_noise(
    passes: range, shape: tuple[int, ...], cube_px: int, *, seed: int
) -> np.ndarray:
    """(passes, `noise_size`) float32: pass k's mask depends on (seed, k) alone."""
    size = noise_size(shape, cube_px)
    return np.stack(
        [np.random.default_rng((seed, k)).random(size, np.float32) for k in passes]
    )
