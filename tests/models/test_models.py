"""Settings and the names they use."""

from dataclasses import replace

import pytest

import config
from configs import CONFIGS
from models import LOSSES, MODELS, build_loss, build_model


def test_choices_of_the_settings_are_the_networks_and_losses():
    assert set(config.choices(config.ModelName)) == set(MODELS)
    assert set(config.choices(config.LossName)) == set(LOSSES)


def test_class_weights_reach_the_loss():
    weighted = config.Loss("weighted_cross_entropy", class_weights=(0.0, 0.0))
    even = [[[[0.5, 0.5]]]]
    assert float(build_loss(weighted)([[[[0, 1]]]], even)) == 0
    default = replace(weighted, class_weights=(1.0, 7.0))
    assert float(build_loss(default)([[[[0, 1]]]], even)) == pytest.approx(
        4.852, abs=1e-3
    )


FIRST_OF_EACH_NETWORK = {
    experiment.model: name for name, (_, experiment) in reversed(CONFIGS.items())
}


@pytest.mark.parametrize("name", FIRST_OF_EACH_NETWORK.values())
def test_every_named_experiment_has_a_network_that_can_be_built(name):
    settings = CONFIGS[name][1].model
    if settings.name == "unet2d":
        model = build_model(replace(settings, filters=2), (32, 32, 1), 2)
        assert model.count_params() > 0
    elif settings.name == "unet3d":
        small = replace(settings, filters=2)
        size = CONFIGS[name][1].batches.volume_px
        model = build_model(small, (*size, 1), 2)
        assert model.count_params() > 0
    else:
        assert len(settings.gcn_kernels) <= 4


def test_imagenet_weights_of_a_network_without_any_are_refused():
    settings = config.Model("unet2d", weights="imagenet")
    with pytest.raises(ValueError, match="use --model.weights none"):
        build_model(settings, (32, 32, 1), 2)
