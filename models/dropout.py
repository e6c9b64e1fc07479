"""Seeded dropout at inference for Monte Carlo passes; other layers stay in inference mode."""

import keras
import numpy as np
from keras import layers


class ActiveDropout(layers.Layer):
    """Dropout layer that is also active at inference.

    Args:
        dropout: Wrapped layer; its rate and its random state are used.
    """

    def __init__(self, dropout: layers.Dropout, **kwargs):
        super().__init__(name=dropout.name, **kwargs)
        self.dropout = dropout

    def call(self, inputs):
        return self.dropout(inputs, training=True)


def activate_dropout(network: keras.Model) -> keras.Model:
    """Returns a copy of the network whose dropout is active at inference; layers are shared.

    Calling the network with training=True instead would also make batch normalisation use
    the statistics of the batch.
    """

    def clone(layer):
        return ActiveDropout(layer) if isinstance(layer, layers.Dropout) else layer

    return keras.models.clone_model(network, clone_function=clone)


def seed_dropout(network: keras.Model, seed: int, k: int) -> None:
    """Seeds the dropout of `activate_dropout`: pass k depends on (seed, k) alone."""
    dropping = [layer for layer in network.layers if isinstance(layer, ActiveDropout)]
    for place, layer in enumerate(dropping):
        state = np.random.SeedSequence((seed, k, place)).generate_state(2)
        layer.dropout.seed_generator.state.assign(state)
