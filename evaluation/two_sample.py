"""The classifier two-sample test: how often a network that was trained for it tells generated images from real ones.

    two_sample_pixels   the share of images that it judges rightly, all 256 levels      lower is better, 0.5 best
    two_sample_shapes   the same for black-and-white images: each channel >= 128        lower is better, 0.5 best

Lopez-Paz and Oquab 2017: if both sets come from one distribution, no network is right on more than half of the images
that it was not trained on. Here a random half of each set trains the network, and it judges the other half. The floor
of real images can be above one half: MNIST's training and test images were written by different people.

What it does not see: copies of training images, which are real (`evaluation.reference.memorisation` finds them), and
what so small a network does not learn from so few images, such as a jitter of two levels within the strokes of digits
(tests/evaluation/test_planting.py). Figures of different n cannot be compared: more images train a better network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import cudnn

from data import in_parts
from evaluation.metrics import Progress, estimate, jackknife_means, random_groups

CHANNELS, STRIDES, DROPOUT = (24, 48, 96, 96), (1, 2, 2, 1), 0.3
LR, WEIGHT_DECAY, BATCH_SIZE, EPOCHS = 2e-3, 0.05, 64, 8


def black_and_white(images: Tensor) -> Tensor:
    """uint8 images whose levels are 0 below 128 and 255 from there on, in each channel."""
    return (images >= 128).to(torch.uint8) * 255


VIEWS = {"two_sample_pixels": lambda images: images, "two_sample_shapes": black_and_white}


def two_sample_figures(generated: Tensor, real: Tensor, device="cpu",
                       show: Callable[[str], Progress] = lambda title: iter) -> dict[str, dict]:
    """Both figures by name: {"value", "low", "high", "n"}, n the smaller of N and M; arguments: `two_sample_values`."""
    return {name: dict(estimate(values, 0.0, 1.0), n=min(len(generated), len(real)))
            for name, values in two_sample_values(generated, real, device, show).items()}


def two_sample_values(generated: Tensor, real: Tensor, device="cpu",
                      show: Callable[[str], Progress] = lambda title: iter) -> dict[str, Tensor]:
    """Both figures of uint8 images (N, C, H, W) and (M, C, H, W): of all judged images, then without each group.

    (G + 1,) each, for an interval over the images that are judged: the chance in the training of the network is not in
    it. show("pixels") and show("shapes") give the progress bars.
    """
    values = {}
    for name, view in VIEWS.items():
        right = two_sample(generated, real, progress=show(name.split("_")[-1]), view=view, device=device)
        values[name] = jackknife_means(right.cpu(), random_groups(len(right)))
    return values


def two_sample(generated: Tensor, real: Tensor, seed: int = 0, progress: Progress = iter,
               view: Callable[[Tensor], Tensor] = lambda images: images, device="cpu") -> Tensor:
    """Whether the network is right on each held-out image, (K,) bool: the generated ones first, then as many real.

    generated (N, C, H, W) and real (M, C, H, W): uint8. As many of both are used, the smaller of N and M, as `view`
    shows them, in float32 on `device`. The same seed and images give the same result, but for rounding. Torch's own
    random state stays as it is.
    """
    count = min(len(generated), len(real))
    half, generator = count // 2, torch.Generator().manual_seed(seed)
    real, generated = (view(images[torch.randperm(len(images), generator=generator)[:count]]).to(device)
                       for images in (real, generated))
    with torch.random.fork_rng(), cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(seed)
        network = new_network(generated.shape[1]).to(generated.device, memory_format=torch.channels_last)
        train(network, torch.cat([generated[:half], real[:half]]), torch.arange(2 * half) < half, generator, progress)
        guesses = judge(network, torch.cat([generated[half:], real[half:]]))
    return guesses == (torch.arange(len(guesses), device=guesses.device) < count - half)


class Quarters(nn.Module):
    """(B, C, H, W) -> (B, C, 2, 2): the mean over each quarter; of an odd side the one in the middle is in both halves.

    As AdaptiveAvgPool2d(2), which MPS has not got for odd sides.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return F.avg_pool2d(x, ((height + 1) // 2, (width + 1) // 2), (height // 2, width // 2))


def new_network(channels: int) -> nn.Sequential:
    """The network: images (B, C, H, W) in 0..1 of any size -> one logit (B, 1), positive for "generated".

    The mean over each quarter of the image, rather than over all of it, also sees where something is: a shift by one
    pixel. Without any mean it finds less of what is everywhere, such as noise within strokes.
    """
    layers, features = [], channels
    for out, stride in zip(CHANNELS, STRIDES, strict=True):
        layers += [nn.Conv2d(features, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        features = out
    layers += [Quarters(), nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(4 * features, 1)]
    return nn.Sequential(*layers)


def as_input(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in 0..1, channels last."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def train(network: nn.Module, images: Tensor, fake: Tensor, generator: torch.Generator, progress: Progress) -> None:
    """Train on images (N, C, H, W) uint8 and `fake` (N,) bool: AdamW with a one-cycle learning rate."""
    fake, size = fake.to(images.device, torch.float32), min(BATCH_SIZE, len(images))
    steps = len(images) // size  # in an epoch; what is left over waits for the next epoch's order
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps)
    batches = (rows for _ in range(EPOCHS)
               for rows in torch.randperm(len(images), generator=generator)[:steps * size].split(size))
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
    return torch.cat([network(as_input(batch))[:, 0] > 0 for batch in in_parts(images, 500)])
