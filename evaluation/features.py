"""What a network sees in images: the data set's own classifier, its weights checked, or Inception v3."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from data import SPLITS, load_dataset, to_model
from evaluation.classifier import (
    CLASSIFIERS,
    RECIPES,
    Classifier,
    evaluate_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from runtime.errors import UserError
from runtime.files import atomic_write, check_writable, one_line

WEIGHTS = Path(__file__).parent / "weights"
INCEPTION_FEATURES = 2048
BATCH = 250  # images at a time
Progress = Callable  # wraps what is looped over, as tqdm does


def weights_digest(dataset: str) -> str:
    """The sha256 of a data set's feature network, as listed in SHA256SUMS beside it. UserError if not listed."""
    digests = {name: digest for digest, name in map(str.split, _sums())}
    if f"{dataset}.pt" not in digests:
        raise UserError(f"there is no feature network for {dataset} in {WEIGHTS}: train one with "
                         f"python evaluate.py --train_features {dataset}")
    return digests[f"{dataset}.pt"]


def _sums() -> list[str]:
    path = WEIGHTS / "SHA256SUMS"
    return path.read_text().splitlines() if path.exists() else []


def load_feature_network(dataset: str, device="cpu") -> Classifier:
    """The data set's classifier, in eval mode. UserError if its file is missing or is not the one in SHA256SUMS."""
    digest, path = weights_digest(dataset), WEIGHTS / f"{dataset}.pt"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise UserError(f"{path} is missing or damaged (its sha256 is not the one in SHA256SUMS): restore it with "
                         f"git checkout, or train it with python evaluate.py --train_features {dataset}")
    return load_classifier(path, device).to(memory_format=torch.channels_last).requires_grad_(False)


def torchmetrics_image():
    """torchmetrics.image with its fid and kid. UserError if torchmetrics is not installed."""
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ImportError as error:
        raise UserError("evaluate.py needs torchmetrics: pip install -r requirements-eval.txt") from error
    return torchmetrics.image


def load_inception() -> nn.Module:
    """torchmetrics' Inception v3, uint8 (N, 3, H, W) -> (N, 2048). UserError where it cannot be had."""
    try:
        return torchmetrics_image().fid.FrechetInceptionDistance(feature=INCEPTION_FEATURES).inception
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--features inception is not available here ({one_line(error)}): it needs pip install "
                         f"torch-fidelity and a network to download its weights; --features own needs neither"
                         ) from error


class Seen(NamedTuple):
    """What networks see in N images: features (N, D) float32 and class probabilities (N, classes), on the CPU."""

    features: Tensor
    probabilities: Tensor


@torch.no_grad()
def look(images: Tensor, classifier: Classifier, inception: nn.Module | None = None, progress: Progress = iter) -> Seen:
    """Features and class probabilities of uint8 images (N, C, H, W); the features are inception's if it is given.

    This is the only way to the figures, whether images were generated or read: all have been uint8. Always in float32,
    never TensorFloat-32, so that numbers compare between machines.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    device, features, probabilities = next(classifier.parameters()).device, [], []
    for batch in progress(images.split(BATCH)):
        batch = batch.to(device)
        with cudnn.flags(enabled=True, allow_tf32=False):
            own = classifier.features(to_model(batch).contiguous(memory_format=torch.channels_last))
            probabilities.append(classifier.head(own).softmax(1).cpu())
            features.append((own if inception is None else inception(batch.expand(-1, 3, -1, -1)).float()).cpu())
    return Seen(torch.cat(features), torch.cat(probabilities))


def new_classifier(dataset: str, images: Tensor, labels: Tensor, device, seed: int, bf16: bool,
                   progress: Progress = iter) -> Classifier:
    """A classifier trained by the data set's recipe on uint8 images (N, C, H, W) and labels (N,) alone."""
    torch.manual_seed(seed)
    model, epochs = Classifier(**CLASSIFIERS[dataset]).to(device), iter(progress(range(RECIPES[dataset]["epochs"])))
    next(epochs)  # shows the bar at 0
    train_classifier(model, images, labels, **RECIPES[dataset], seed=seed, bf16=bf16,
                     progress=lambda *_: next(epochs, None))
    return model


def train_features(dataset: str, data_dir, device, seed: int, bf16: bool, progress: Progress = iter) -> str:
    """Train a data set's feature network, write it to WEIGHTS and list its sha256; returns a line about it.

    It learns from the training split alone.
    """
    check_writable(WEIGHTS)
    splits = {split: load_dataset(dataset, split, data_dir) for split in SPLITS}
    train = splits.pop("train")
    model = new_classifier(dataset, train.images, train.labels, device, seed, bf16, progress)
    model.half().float()  # as the file keeps it
    accuracy = {split: round(evaluate_classifier(model, data.images, data.labels), 4) for split, data in splits.items()}
    recipe = dict(RECIPES[dataset], seed=seed, bf16=bf16, training_images=len(train.images),
                  torch=str(torch.__version__))
    recipe["augment"] = getattr(recipe["augment"], "__name__", None)
    path = WEIGHTS / f"{dataset}.pt"
    with atomic_write(path) as file:
        save_classifier(model, file, CLASSIFIERS[dataset], recipe, accuracy)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [line for line in _sums() if not line.endswith(f" {path.name}")]
    with atomic_write(WEIGHTS / "SHA256SUMS", "w") as file:
        file.write("\n".join(sorted([*lines, f"{digest}  {path.name}"], key=lambda line: line.split()[1])) + "\n")
    return (f"Saved {path}: accuracy {accuracy['test']:.2%} on test, {accuracy['validation']:.2%} on validation; "
            f"sha256 {digest}")
