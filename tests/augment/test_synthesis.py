"""Tissues and their random HU."""

import numpy as np

from augment import synthesis
from augment.synthesis import AIR, BONE, DENSE, FAT, LUNG, SOFT


def test_tissues_are_told_by_hu_and_lungs():
    hu = np.array([[[-1000, -100, 40, 400, -850, -500, 40]]])
    lung = np.array([[[0, 0, 0, 0, 2, 1, 1]]])
    found = synthesis.tissues(hu, lung).ravel().tolist()
    assert found == [AIR, FAT, SOFT, BONE, LUNG, DENSE, DENSE]


def blocks():
    """A body of soft tissue in air, with a lung, fat and bone, each of many voxels."""
    hu = np.full((24, 40, 40), -1000, np.int16)
    hu[:, 4:36, 4:36] = 40
    lung = np.zeros(hu.shape, np.uint8)
    lung[:, 8:32, 8:20] = 1
    hu[lung > 0] = -850
    hu[:, 8:20, 24:34] = -100
    hu[:, 22:34, 24:34] = 400
    return hu, lung


def test_tissues_get_one_density_each_from_their_range():
    hu, lung = blocks()
    tissue = synthesis.tissues(hu, lung)
    inner = {  # 3 voxels within, where borders are not soft
        AIR: np.s_[3:-3, :2, :], SOFT: np.s_[3:-3, 8:32, 21:22],
        FAT: np.s_[3:-3, 11:17, 27:31], BONE: np.s_[3:-3, 25:31, 27:31],
    }  # fmt: skip
    means = {key: [] for key in inner}
    for seed in range(20):
        found = synthesis.synthesize_patch(hu, lung, np.random.default_rng(seed))
        assert found.dtype == np.float32
        for key, part in inner.items():
            assert (tissue[part] == key).all()
            low, high = synthesis.RANGES_HU[key]
            mean = found[part].mean()
            assert low - 60 < mean < high + 60, key
            means[key].append(mean)
    for key, values in means.items():
        low, high = synthesis.RANGES_HU[key]
        assert np.ptp(values) > (high - low) / 2, key


def test_the_same_seed_gives_the_same_volume_and_another_another():
    hu, lung = blocks()
    first, again, other = (
        synthesis.synthesize_patch(hu, lung, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_tissues_of_the_patch_matter():
    hu, lung = blocks()
    denser = np.where(hu == 40, 60, hu)
    found, same = (
        synthesis.synthesize_patch(image, lung, np.random.default_rng(0))
        for image in (hu, denser)
    )
    assert np.array_equal(found, same)
