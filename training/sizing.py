"""How large a network to train, and with how large batches: one rule, for what the flags leave open."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

GRID, LOWEST = 32, 8  # positions along a side: at the first stage if a patch size allows, and at most at the last
PATCH_SIZES, GREY_PATCH = (1, 2, 4), 2
FEW_IMAGES, FEW_WIDTH = 2000, 32
TRIAL_IMAGES = 32  # trained at a time to measure the speed
DEVICE_WIDTH = 64  # on other devices than a CPU
# On a CPU with a budget: the width, and how many images a run has to see for it. The second table is for patches of a
# single pixel, with which a network of the same width computes four times as much.
WIDTHS = ((16, 0), (24, 10_000), (32, 40_000), (48, 150_000), (64, 700_000))
FINE_WIDTHS = ((16, 0), (24, 40_000), (32, 150_000), (48, 700_000))
BATCH_SIZE, SMALL_BATCH_SIZE = 128, 64
SMALL_BATCH_IMAGES = 250_000  # a run that sees fewer learns as much or more from smaller batches


def network_stages(shape: Sequence[int], patch_size: int | None = None) -> dict:
    """{"patch_size", "channel_mults"} for images of this shape (C, H, W). The rule:

        patch_size      in colour 1 up to 32 pixels, 2 up to 64 and 4 above, so that the convolutions run on a grid of
                        at most 32 × 32 positions up to 128 pixels. Larger patches are quicker, but the noise within
                        them is learned late (benchmarks/RECORDS.md). In grey 2 is the least: there, seeing more images
                        in the same time is worth more
        channel_mults   1 at the first resolution and 2 below; each halves the one above it, until a side has at most 8
                        positions or an odd number. (A single resolution has 2.) At the lowest there are attention and
                        `--middle_depth` residual blocks (3); the other stages have `--depth` (1)

    For 28 × 28 in grey the grids are 14, 7; for 32 × 32 and 64 × 64 in colour 32, 16, 8. The patches are measured on
    digits, on CIFAR-10 and on `scenes`.

    patch_size: that of the flags, which is kept.
    """
    if patch_size is None:
        allowed = [p for p in PATCH_SIZES if p >= GREY_PATCH or shape[0] > 1]
        patch_size = next((p for p in allowed if max(shape[1:]) <= GRID * p), allowed[-1])
    sides, mults = [side // patch_size for side in shape[1:]], [1]
    while max(sides) > LOWEST and all(side % 2 == 0 for side in sides):
        sides, mults = [side // 2 for side in sides], [*mults, 2]
    return dict(patch_size=patch_size, channel_mults=mults if len(mults) > 1 else [2])


class Size(NamedTuple):
    """The size of a run; images: about how many it will see, or None where that was not measured."""

    base_channels: int
    batch_size: int
    images: float | None


def choose(images: int, budget: float | None, device: torch.device, speed: Callable[[int], float],
           width: int | None = None, channels: int = 1, patch_size: int = 2) -> Size:
    """The width and the batch size of a run. The rule:

        on a CPU with a budget   the widest of WIDTHS, for patches of one pixel of FINE_WIDTHS, that sees enough images;
                                 batches of 64 instead of 128 if it sees fewer than SMALL_BATCH_IMAGES: where steps are
                                 few, more of them help most
        on a CPU without         24 channels: twenty epochs of MNIST in about ten minutes; 16 for patches of one pixel
        on other devices         64 channels

    Below 2,000 training images it is at most 32 channels. In all cases it is at least as wide as a patch has values,
    because fewer channels cannot hold the noise of each pixel. Measured on two cores, on digits up to ten minutes and
    on CIFAR-10 up to an hour (benchmarks/RECORDS.md); the larger bounds follow the trend, and that for few images was
    not measured.

    images: the number of training images; budget: seconds, or None; speed(width): the images a second of the training
    of such a network, asked from the narrowest on, as far as it is needed; width: that of the flags, which is kept;
    channels: 1 or 3, of the images.
    """
    widths, values = FINE_WIDTHS if patch_size == 1 else WIDTHS, channels * patch_size**2
    most = FEW_WIDTH if images < FEW_IMAGES else DEVICE_WIDTH
    if device.type != "cpu" or budget is None:
        narrow = (16 if patch_size == 1 else 24) if device.type == "cpu" else most
        return Size(width or max(narrow, values), BATCH_SIZE, None)
    wide_enough = [row for row in widths if values <= row[0] <= most] or [(values, 0)]
    rows, size = [(width, 0)] if width else wide_enough, None
    for wide, least in rows:
        seen = budget * speed(wide)
        if size and seen < least:
            break
        size = Size(wide, SMALL_BATCH_SIZE if seen < SMALL_BATCH_IMAGES else BATCH_SIZE, seen)
    return size
