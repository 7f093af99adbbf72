"""The second feature network of a data set: a denoising autoencoder, whose features no label has shaped."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.classifier import load_network, shrunk
from runtime.errors import UserError

SUFFIX = "_autoencoder"  # of its file: DATASET_autoencoder.pt beside the classifier's DATASET.pt
CODE_CHANNELS = 16  # at a quarter of the size of an image, on both sides of the feature vector


def block(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution of `size` × `size`, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Autoencoder(nn.Module):
    """Removes Gaussian noise of unknown level from an image through a vector of `feature_dims` numbers.

    A denoising autoencoder (Vincent et al. 2010): the vector has to hold what tells one image from another, whatever
    its class. It sees the means of squares of `shrink` × `shrink` pixels: small weights for large images. UserError
    unless height and width, `size`, are multiples of 4 · shrink from 8 · shrink up.
    """

    def __init__(self, image_channels: int = 1, size: tuple[int, int] = (28, 28), width: int = 16,
                 feature_dims: int = 64, shrink: int = 1) -> None:
        super().__init__()
        if any(side % (4 * shrink) or side < 8 * shrink for side in size):
            raise UserError(f"the height and width of images must be multiples of {4 * shrink} from {8 * shrink} up, "
                            f"not {size[0]}×{size[1]}: let the reader of the data set pad them")
        self.shrink, self.code = shrink, (CODE_CHANNELS, size[0] // (4 * shrink), size[1] // (4 * shrink))
        values = CODE_CHANNELS * self.code[1] * self.code[2]
        self.encoder = nn.Sequential(
            block(image_channels, width), block(width, width, stride=2),                    # (B, width, H/2, W/2)
            block(width, 2 * width), block(2 * width, 2 * width, stride=2),                 # (B, 2 * width, H/4, W/4)
            block(2 * width, CODE_CHANNELS, size=1), nn.Flatten(),                          # (B, values)
            nn.Linear(values, feature_dims, bias=False), nn.BatchNorm1d(feature_dims, affine=False))
        self.widen = nn.Sequential(nn.Linear(feature_dims, values, bias=False), nn.BatchNorm1d(values), nn.ReLU())
        self.decoder = nn.Sequential(
            block(CODE_CHANNELS, 4 * width), nn.PixelShuffle(2),                            # (B, width, H/2, W/2)
            block(width, 2 * width), nn.Conv2d(2 * width, 4 * image_channels, 3, padding=1), nn.PixelShuffle(2))

    def features(self, images: Tensor) -> Tensor:
        """The vectors (B, feature_dims) of images (B, C, H, W) in [-1, 1], each with a variance of about 1."""
        return self.encoder(shrunk(images, self.shrink))

    def forward(self, images: Tensor) -> Tensor:
        """The clean images (B, C, H, W) that noisy ones are taken for, in squares of `shrink` × `shrink` pixels."""
        clean = self.decoder(self.widen(self.features(images)).unflatten(1, self.code))
        return F.interpolate(clean, scale_factor=self.shrink) if self.shrink > 1 else clean


class Unlabelled(nn.Module):
    """In place of a classifier, for pictures without classes: the features of the autoencoder, and a single class."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder, self.marks = autoencoder, None
        self.head = nn.Linear(autoencoder.encoder[-2].out_features, 1).to(next(autoencoder.parameters()).device)

    def features(self, images: Tensor) -> Tensor:
        return self.autoencoder.features(images)


def load_autoencoder(dataset: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """The data set's autoencoder, float32, in evaluation mode. UserError if its file is missing or damaged."""
    return load_network(Autoencoder, dataset, SUFFIX, device)
