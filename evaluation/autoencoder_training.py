"""How the autoencoders, whose features are compared besides the classifier's, are trained."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import ImageData, in_parts, load_dataset, to_model
from evaluation.autoencoder import SUFFIX, Autoencoder
from evaluation.classifier import place, save_network
from evaluation.classifier_training import fitting_epochs, fitting_shrink
from evaluation.metrics import Progress
from runtime.files import check_writable


@dataclass(frozen=True)
class AutoencoderRecipe:
    """How an autoencoder is built and trained. The defaults are for a data set without a row below."""

    width: int = 16  # of the network
    feature_dims: int = 96
    largest_noise: float = 1.0  # images lie in [-1, 1]
    epochs: int = 8
    batch_size: int = 128
    lr: float = 3e-3  # the peak of the one-cycle learning rate
    weight_decay: float = 0.01
    shrink: int = 1  # pixels of a side that the network sees as one


LEAST_STEPS = 1_000  # for your own pictures, however few they are
AUTOENCODER_RECIPES = {
    "mnist": AutoencoderRecipe(feature_dims=64),
    "glyphs": AutoencoderRecipe(feature_dims=64),
    "fashion_mnist": AutoencoderRecipe(feature_dims=64),
    "scenes": AutoencoderRecipe(epochs=6, shrink=2),
}


def noised(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """images + s · noise, with Gaussian noise and s uniform in 0..largest for each image of (B, C, H, W)."""
    level = largest * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return images + level * torch.randn(images.shape, generator=generator, device=images.device)


def train_autoencoder(data: ImageData, recipe: AutoencoderRecipe, device, seed: int = 0,
                      progress: Progress = iter) -> tuple[Autoencoder, dict]:
    """(network, the arguments of its class): trained on these images to remove noise from them; labels are not read.

    The loss is the mean of (network(x + s · noise) - x)². AdamW with a one-cycle learning rate, in float32.
    """
    channels, *size = data.images.shape[1:]
    config = dict(image_channels=channels, size=size, width=recipe.width, feature_dims=recipe.feature_dims,
                  shrink=recipe.shrink)
    torch.manual_seed(seed)
    model = Autoencoder(**config).to(device, memory_format=torch.channels_last).train()
    generator, images = torch.Generator(device).manual_seed(seed), data.images
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    steps = steps_of_epoch(len(images), recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.epochs * steps, pct_start=0.2)
    batches = (rows for _ in range(recipe.epochs) for rows in torch.randperm(
        len(images), generator=generator, device=device)[:steps * recipe.batch_size].split(recipe.batch_size))
    for _, rows in zip(progress(range(schedule.total_steps)), batches, strict=True):
        clean = to_model(images[rows.to(images.device)].to(device)).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(model(noised(clean, recipe.largest_noise, generator)), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), config


def steps_of_epoch(count: int, recipe: AutoencoderRecipe) -> int:
    """How many batches an epoch of `count` images has: all images but the last few of a random order."""
    return max(1, count // recipe.batch_size)


@torch.no_grad()
def denoising_error(model: Autoencoder, data: ImageData, largest: float, seed: int = 0, batch_size: int = 500) -> float:
    """The mean squared error per value of the network's images, for values in [-1, 1], at noise of 0..largest."""
    device = next(model.parameters()).device
    generator, total = torch.Generator(device).manual_seed(seed), 0.0
    for batch in in_parts(data.images, batch_size):
        clean = to_model(batch.to(device))
        total += F.mse_loss(model(noised(clean, largest, generator)), clean, reduction="sum").item()
    return total / data.images.numel()


def train_second_network(dataset: str | Path, data_dir, device, seed: int, progress: Progress = iter) -> str:
    """Train a data set's autoencoder on the training split and write it to its `place`; returns a line about it."""
    check_writable(place(dataset)[0])
    train, recipe = load_dataset(dataset, "train", data_dir), AUTOENCODER_RECIPES.get(dataset, AutoencoderRecipe())
    if train.folder:
        least = math.ceil(LEAST_STEPS / steps_of_epoch(len(train.images), recipe))
        recipe = replace(recipe, epochs=fitting_epochs(len(train.images), recipe.epochs, least),
                         shrink=fitting_shrink(train))
    model, config = train_autoencoder(train, recipe, device, seed, progress)
    model.half().float()  # the precision of the file
    error = denoising_error(model, load_dataset(dataset, "validation", data_dir), recipe.largest_noise)
    notes = asdict(recipe) | dict(seed=seed, training_images=len(train.images), torch=str(torch.__version__))
    path, digest = save_network(dataset, SUFFIX, model, config, recipe=notes, error=dict(validation=round(error, 5)))
    return f"Saved {path}: mean squared error {error:.4f} on noisy validation images; sha256 {digest}"
