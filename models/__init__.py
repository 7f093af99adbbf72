"""The networks. `create_model(**config)` builds the one that a checkpoint's config describes."""

from .unet import SimpleUNet


def create_model(**config) -> SimpleUNet:
    """SimpleUNet(**config); ValueError if the config has an argument that it does not know."""
    try:
        return SimpleUNet(**config)
    except TypeError as error:
        raise ValueError(f"the model's config does not fit: {error}") from error
