"""A small convolutional classifier: its features and its accuracy judge generated images.

Images enter the network as floats in [-1, 1]; data sets are held as uint8 in 0...255.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """3x3 convolution, optional 2x2 max pooling, batch norm, ReLU; `residual` adds the input to the result."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        result = F.relu(self.norm(self.pool(self.conv(x))))
        return x + result if self.residual else result


def make_stage(inputs: int, outputs: int) -> nn.Sequential:
    """Two blocks that take (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
    return nn.Sequential(ConvBlock(inputs, outputs, pool=True), ConvBlock(outputs, outputs, residual=True))


class Classifier(nn.Module):
    """Three stages that each halve the image, a mean over the remaining positions, and one linear layer.

    The stages have `width`, 2 * `width` and `feature_dims` channels; images need at least 8x8 pixels.
    """

    def __init__(
        self, image_channels: int = 1, num_classes: int = 10, width: int = 32, feature_dims: int = 128
    ) -> None:
        super().__init__()
        self.stage1 = make_stage(image_channels, width)
        self.stage2 = make_stage(width, 2 * width)
        self.stage3 = make_stage(2 * width, feature_dims)
        self.head = nn.Linear(feature_dims, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, feature_dims), non-negative, of images (B, C, H, W) in [-1, 1]."""
        x = self.stage1(images)                                                 # (B, width, H/2, W/2)
        x = self.stage2(x)                                                      # (B, 2 * width, H/4, W/4)
        x = self.stage3(x)                                                      # (B, feature_dims, H/8, W/8)
        return x.mean(dim=(2, 3))                                               # (B, feature_dims)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly rotate, scale, shift and gently bend each image of a batch (B, C, H, W); for digits."""
    count, _, height, width = images.shape

    def uniform(*shape: int, limit: float) -> Tensor:
        return limit * (2 * torch.rand(*shape, generator=generator, device=images.device) - 1)

    angle, scale = uniform(count, limit=math.radians(10)), torch.exp(uniform(count, limit=0.1))
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    linear = torch.stack([cosine, -sine, sine, cosine], dim=1).view(count, 2, 2)
    offset = uniform(count, 2, 1, limit=0.12)                                   # half an image is 1
    grid = F.affine_grid(torch.cat([linear, offset], dim=2), list(images.shape), align_corners=False)
    bends = F.interpolate(uniform(count, 2, 5, 5, limit=0.1), (height, width), mode="bicubic")
    grid = grid + bends.permute(0, 2, 3, 1)                                     # (B, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of a batch (B, C, H, W) left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def shift(images: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Move each image of a batch (B, C, H, W) by up to `pixels` both ways, repeating its edge."""
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * pixels + 1, (2, count, 1, 1), generator=generator, device=images.device)
    rows = moves[0] + torch.arange(height, device=images.device).view(1, -1, 1)     # (B, H, 1)
    columns = moves[1] + torch.arange(width, device=images.device)                  # (B, 1, W)
    padded = F.pad(images, [pixels] * 4, mode="replicate").permute(0, 2, 3, 1)
    index = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[index, rows, columns].permute(0, 3, 1, 2)                         # (B, C, H, W)


def cut_out(images: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Set a square of `size` pixels, at a random place in each image (B, C, H, W), to 0 (mid-grey)."""
    count, _, height, width = images.shape
    corner = torch.rand(2, count, 1, 1, 1, generator=generator, device=images.device)
    top, left = (corner[0] * (height - size + 1)).floor(), (corner[1] * (width - size + 1)).floor()
    rows = torch.arange(height, device=images.device).view(-1, 1)
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    return images.masked_fill(inside, 0.0)


def augment_clothes(images: Tensor, generator: torch.Generator) -> Tensor:
    """The recipe for Fashion-MNIST: mirror, move by up to 2 pixels, hide an 8x8 square."""
    return cut_out(shift(flip(images, generator), generator, pixels=2), generator, size=8)


def augment_photos(images: Tensor, generator: torch.Generator) -> Tensor:
    """The recipe for CIFAR-10: mirror, move by up to 4 pixels, hide an 8x8 square."""
    return cut_out(shift(flip(images, generator), generator, pixels=4), generator, size=8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images in 0...255 to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def train_classifier(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    seed: int = 0,
    bf16: bool = True,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train in place on uint8 images (N, C, H, W) and labels (N,): SGD, one-cycle rate with the peak `lr`.

    `progress(epoch, mean_loss)` is called after every epoch; `bf16` computes the network in bfloat16.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    steps = math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator, device=device).split(batch_size):
            batch = to_float(images[chosen])
            batch = augment(batch, generator) if augment else batch
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if progress:
            progress(epoch, total / len(images))
    model.eval()


@torch.no_grad()
def evaluate_classifier(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of correctly classified uint8 images (N, C, H, W), in [0, 1]."""
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        guesses = model(to_float(batch.to(device))).argmax(dim=1)
        correct += (guesses == truth.to(device)).sum().item()
    return correct / len(images)


# What each data set's weights in models/weights were made with: arguments of Classifier and of train_classifier.
CLASSIFIERS = {
    "mnist": dict(image_channels=1, width=32),
    "glyphs": dict(image_channels=1, width=32),
    "fashion_mnist": dict(image_channels=1, width=48),
    "cifar10": dict(image_channels=3, width=48),
}
RECIPES = {
    "mnist": dict(epochs=14, batch_size=128, lr=0.1, weight_decay=3e-4, augment=warp),
    "glyphs": dict(epochs=6, batch_size=128, lr=0.1, weight_decay=3e-4, augment=warp),
    "fashion_mnist": dict(epochs=18, batch_size=128, lr=0.1, weight_decay=5e-4, augment=augment_clothes),
    "cifar10": dict(epochs=24, batch_size=128, lr=0.1, weight_decay=5e-4, augment=augment_photos),
}


def save_classifier(model: Classifier, path: str | Path, config: dict, recipe: dict, accuracy: dict) -> None:
    """Write the weights, rounded to float16, with the arguments of `Classifier` and two JSON-type notes."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    state = {name: value.contiguous().cpu() for name, value in state.items()}
    torch.save({"config": config, "state_dict": state, "recipe": recipe, "accuracy": accuracy}, path)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """The float32 classifier, in evaluation mode, from a file of `save_classifier`."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = Classifier(**saved["config"])
    model.load_state_dict(saved["state_dict"])
    return model.to(device).eval()
