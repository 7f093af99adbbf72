"""The network. `create_model(**config)` builds it from the config of a checkpoint."""

from torch import nn

from .mlp import PointMLP
from .unet import SimpleUNet

NETWORKS = {"unet": SimpleUNet, "mlp": PointMLP}  # by the key "network" of the config


def create_model(network: str = "unet", **config) -> nn.Module:
    """The network of this name, with these arguments; ValueError if there is none, or if it has not got an argument."""
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}: choose one of {', '.join(NETWORKS)}")
    try:
        return NETWORKS[network](**config)
    except TypeError as error:
        raise ValueError(f"the model's config does not fit: {error}") from error
