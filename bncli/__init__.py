"""bncli: how many steps batch normalization saves, what it costs, and whether its gradients are right."""

__version__ = "0.1.0"
