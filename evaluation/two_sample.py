"""The classifier two-sample test: how often a network that was trained for it tells generated images from real ones.

Lopez-Paz and Oquab 2017: if both sets come from one distribution, no network is right on more than half of the images
that it was not trained on. A random half of each set trains the network, and it judges the other half.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.metrics import Progress

CHANNELS, STRIDES, DROPOUT = (24, 48, 96, 96), (1, 2, 2, 1), 0.3
LR, WEIGHT_DECAY, BATCH_SIZE, EPOCHS = 2e-3, 0.05, 64, 8


def new_network(channels: int, height: int, width: int) -> nn.Sequential:
    """The network: images (B, C, H, W) in 0..1 -> one logit (B, 1), positive for "generated"."""
    layers, count, wide = [], channels, (height, width)
    for out, stride in zip(CHANNELS, STRIDES, strict=True):
        layers += [nn.Conv2d(count, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        count, wide = out, tuple(-(-side // stride) for side in wide)
    features = count * (wide[0] // 2) * (wide[1] // 2)
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(features, 1))


def two_sample(generated: Tensor, real: Tensor, seed: int = 0, progress: Progress = iter) -> Tensor:
    """Whether the network is right on each held-out image, (K,) bool: the generated ones first, then as many real.

    generated (N, C, H, W) and real (M, C, H, W): uint8. As many of both are used, the smaller of N and M.
    """
    count, generator = min(len(generated), len(real)), torch.Generator().manual_seed(seed)
    sets = [images[torch.randperm(len(images), generator=generator)[:count]] for images in (generated, real)]
    half = count // 2
    torch.manual_seed(seed)
    network = new_network(*generated.shape[1:]).to(generated.device, memory_format=torch.channels_last)
    train(network, torch.cat([s[:half] for s in sets]), torch.arange(2 * half) < half, generator, progress)
    guesses = judge(network, torch.cat([s[half:] for s in sets]))
    return guesses == (torch.arange(len(guesses), device=guesses.device) < count - half)


def as_input(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in 0..1, channels last."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def train(network: nn.Module, images: Tensor, fake: Tensor, generator: torch.Generator, progress: Progress) -> None:
    """Train on images (N, C, H, W) uint8 and `fake` (N,) bool: AdamW with a one-cycle learning rate."""
    fake, steps = fake.to(images.device, torch.float32), len(images) // BATCH_SIZE
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps)
    batches = (rows for _ in range(EPOCHS)
               for rows in torch.randperm(len(images), generator=generator)[:steps * BATCH_SIZE].split(BATCH_SIZE))
    network.train()
    for _, rows in zip(progress(range(EPOCHS * steps)), batches, strict=True):
        rows = rows.to(images.device)
        loss = F.binary_cross_entropy_with_logits(network(as_input(images[rows]))[:, 0], fake[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def judge(network: nn.Module, images: Tensor) -> Tensor:
    """Whether the network takes each of the images for a generated one: (N,) bool."""
    return torch.cat([network(as_input(batch))[:, 0] > 0 for batch in images.split(500)])
