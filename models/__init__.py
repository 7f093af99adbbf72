"""The network. `create_model(**config)` builds it from the config of a checkpoint."""

from .unet import SimpleUNet


def create_model(**config) -> SimpleUNet:
    """SimpleUNet(**config); ValueError if the config has an unknown argument."""
    try:
        return SimpleUNet(**config)
    except TypeError as error:
        raise ValueError(f"the model's config does not fit: {error}") from error
