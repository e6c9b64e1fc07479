"""Dropout in use, for Monte-Carlo passes: seeded, everything else as in inference."""

import keras
import numpy as np
from keras import layers


class Dropping(layers.Layer):
    """A dropout layer that also drops in use.

    Args:
        dropout: The layer; its rate and its state are used.
    """

    def __init__(self, dropout: layers.Dropout, **kwargs):
        super().__init__(name=dropout.name, **kwargs)
        self.dropout = dropout

    def call(self, inputs):
        return self.dropout(inputs, training=True)


def with_dropout(network: keras.Model) -> keras.Model:
    """The network, its layers shared, with dropout in use.

    Called with training=True instead, it would also normalise by the batch.
    """

    def clone(layer):
        return Dropping(layer) if isinstance(layer, layers.Dropout) else layer

    return keras.models.clone_model(network, clone_function=clone)


def seed_dropout(network: keras.Model, seed: int, k: int) -> None:
    """Makes what a network `with_dropout` drops next follow from (seed, k) alone."""
    dropping = [layer for layer in network.layers if isinstance(layer, Dropping)]
    for place, layer in enumerate(dropping):
        state = np.random.SeedSequence((seed, k, place)).generate_state(2)
        layer.dropout.seed_generator.state.assign(state)
