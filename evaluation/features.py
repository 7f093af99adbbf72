"""Features of images: those of the data set's own classifier or of Inception v3, and those of its autoencoder."""

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from data import in_parts, to_model
from evaluation.classifier import Classifier
from evaluation.metrics import ImageFeatures, Progress, torchmetrics_image
from runtime.errors import UserError
from runtime.files import one_line

INCEPTION_FEATURES = 2048
BATCH_SIZE = 250


def load_inception() -> nn.Module:
    """torchmetrics' Inception v3, uint8 (N, 3, H, W) -> (N, 2048). UserError if it is not available."""
    try:
        return torchmetrics_image().fid.FrechetInceptionDistance(feature=INCEPTION_FEATURES).inception
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--features inception is not available here ({one_line(error)}): it needs pip install "
                        f"torch-fidelity and a network to download its weights; --features own needs neither"
                        ) from error


@torch.no_grad()
def extract_features(images: Tensor, classifier: Classifier, inception: nn.Module | None = None,
                     progress: Progress = iter, autoencoder: nn.Module | None = None) -> ImageFeatures:
    """Features and class probabilities of uint8 images (N, C, H, W); the features are Inception's if it is given.

    The second features are the autoencoder's, or None without it; marks are those of a classifier that knows some.

    Every figure is computed from these, for generated images and for files alike. Always in float32 without
    TensorFloat-32, so that numbers can be compared between machines.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    device, features, probabilities, second, marks = next(classifier.parameters()).device, [], [], [], []
    for batch in progress(in_parts(images, BATCH_SIZE)):
        batch = batch.to(device)
        with cudnn.flags(enabled=True, allow_tf32=False):
            x = to_model(batch).contiguous(memory_format=torch.channels_last)
            own = classifier.features(x)
            probabilities.append(classifier.head(own).softmax(1).cpu())
            features.append((own if inception is None else inception(batch.expand(-1, 3, -1, -1)).float()).cpu())
            if autoencoder is not None:
                second.append(autoencoder.features(x).cpu())
            if classifier.marks is not None:
                marks.append(classifier.marks(own).sigmoid().cpu())
    return ImageFeatures(torch.cat(features), torch.cat(probabilities), torch.cat(second) if second else None,
                         torch.cat(marks) if marks else None)
