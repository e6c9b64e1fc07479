import itertools

import numpy as np

from ct.fingerprint import hu_sha256
from ct.scan import AIR_HU


def noise(seed=0, shape=(5, 12, 9)):
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def test_turning_and_mirroring_keep_the_checksum():
    hu = noise()
    for axes in itertools.permutations(range(3)):
        for flipped in itertools.product((1, -1), repeat=3):
            turned = hu.transpose(axes)[tuple(slice(None, None, f) for f in flipped)]
            assert hu_sha256(turned) == hu_sha256(hu)


def test_padding_does_not_count():
    hu = noise()
    hu[:, 0] = AIR_HU
    padded = hu.copy()
    padded[:, 0] = -2000
    assert hu_sha256(padded) == hu_sha256(hu)


def test_another_voxel_or_shape_gives_another_checksum():
    hu = noise()
    found = {hu_sha256(hu), hu_sha256(noise(1)), hu_sha256(hu.reshape(5, 9, 12))}
    assert len(found) == 2  # the sides are the same
    found.add(hu_sha256(hu.reshape(10, 6, 9)))
    for value in (-1023, 32767):
        changed = hu.copy()
        changed[2, 3, 4] = value
        found.add(hu_sha256(changed))
    assert len(found) == 5
