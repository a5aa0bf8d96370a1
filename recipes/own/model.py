"""Models of your own, as a recipe names them; docs/own-model.md says what bncli asks of them.

A function is called with the shape of one example, the number of classes, and `norm`, which makes the recipe's norm for
a number of channels and is None where the recipe has `norm: none`. Further arguments are the recipe's.
"""

import math

from torch import nn


def make(shape, classes, norm, width=32):
    """Two hidden layers, for examples of any shape."""

    def layer(inputs):
        linear = nn.Linear(inputs, width, bias=norm is None)  # a norm subtracts the mean, and with it any bias
        return [linear, *([norm(width)] if norm else []), nn.ReLU()]

    return nn.Sequential(nn.Flatten(), *layer(math.prod(shape)), *layer(width), nn.Linear(width, classes))


def make_cnn(shape, classes, norm, channels=(8, 16)):
    """A small convolutional net, for images: shape is (channels, height, width)."""
    layers, inputs = [], shape[0]
    for outputs in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm is None)]
        layers += [norm(outputs)] if norm else []
        layers += [nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
