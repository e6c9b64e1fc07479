"""Random cube masking: hides cubes of a volume, so the network must rely on context.

A network that is trained and run with it infers hidden regions from their surroundings.
Over many masks, the mean prediction covers whole lungs whatever fills them, and the
standard deviation shows where the network was guessing.

Reference: Zhuang et al. 2025 (ISBI), 7-voxel cubes at 2 mm, 70 % of them replaced by 1.0.
"""

import keras
import numpy as np
from keras import KerasTensor, layers, ops


@keras.saving.register_keras_serializable("nodules")
class RandomCubeMasking(layers.Layer):
    """Layer that replaces an exact number of cubes by a constant, drawn anew per volume.

    The grid of cubes is shifted by a random offset, so that cube borders vary; cubes at
    the border are cut. In training the layer draws its own noise. At inference the volume
    passes unchanged unless `noise` is given; the masks then depend on that noise alone, not
    on the batch.

    Args:
        cube_px: Edge length of the cubes in voxels.
        fraction: Share of the cubes to replace, 0 to 1.
        value: Replacement value, in the units of the input.
        varied: In training, replace a share drawn from 0 to `fraction` for each volume, so
            that the network also sees volumes with little or nothing hidden.
        seed: Seed of the random draws in training.

    Call arguments:
        inputs: (batch, z, y, x, channels).
        noise: (batch, n) numbers in 0..1 with n from `noise_size`, e.g. from `mask_noise`.

    Output shape:
        The shape of `inputs`.
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
                f"cube_px is {cube_px} and fraction {fraction}; expected cube_px of at "
                "least 1 and fraction from 0 to 1"
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
    """Returns the number of cubes along z, y, x that cover the volume at any offset."""
    return tuple((size + 2 * (cube_px - 1)) // cube_px for size in shape)


def noise_size(shape: tuple[int, ...], cube_px: int) -> int:
    """Returns how many numbers `cube_mask` needs: one per cube and three for the offset."""
    return int(np.prod(grid_shape(shape, cube_px))) + 3


def cube_mask(
    noise: KerasTensor,
    shape: tuple[int, ...],
    cube_px: int,
    fraction: float | KerasTensor,
) -> KerasTensor:
    """Returns the mask of hidden voxels.

    Args:
        noise: (batch, `noise_size`) numbers in 0..1; the first three set the offset of the
            grid, the others rank the cubes.
        shape: (z, y, x) of the volume.
        cube_px: Edge length of the cubes in voxels.
        fraction: Share of the cubes to hide, rounded to a whole number of cubes; a single
            number for all volumes, or (batch, 1).

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
    """Draws (passes, `noise_size`) float32 noise; that of pass k depends on (seed, k) alone."""
    size = noise_size(shape, cube_px)
    return np.stack(
        [np.random.default_rng((seed, k)).random(size, np.float32) for k in passes]
    )
