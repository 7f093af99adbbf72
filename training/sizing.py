"""How large a network to train, and with how large batches: one rule, for what the flags leave open."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

GRID, LOWEST = 32, 8  # positions along a side: at the first stage if a patch size allows, and at most at the last
PATCH_SIZES = (2, 4)
FEW_IMAGES, FEW_WIDTH = 2000, 32
TRIAL_IMAGES = 32  # trained at a time to measure the speed
EPOCHS_WIDTH, DEVICE_WIDTH = 24, 64  # on a CPU without a budget, and on other devices
# On a CPU with a budget: the width, and how many images a run has to see for it.
WIDTHS = ((16, 0), (24, 10_000), (32, 40_000), (48, 150_000), (64, 700_000))
BATCH_SIZE, SMALL_BATCH_SIZE = 128, 64
SMALL_BATCH_IMAGES = 250_000  # a run that sees fewer learns as much or more from smaller batches


def network_stages(shape: Sequence[int], patch_size: int | None = None) -> dict:
    """{"patch_size", "channel_mults"} for images of this shape (C, H, W). The rule:

        patch_size      2, or 4 for images above 64 pixels: up to 128 pixels the convolutions then run on a grid of at
                        most 32 × 32 positions. Larger patches are quicker, but the noise within them is learned late
                        (benchmarks/RECORDS.md)
        channel_mults   1 at the first resolution and 2 below; each halves the one above it, until a side has at most 8
                        positions or an odd number. (A single resolution has 2.) At the lowest there are attention and
                        `--middle_depth` residual blocks (3); the other stages have `--depth` (1)

    Grey and colour are treated alike: colour only changes the first and the last layer. For 28 × 28, 32 × 32 and
    64 × 64 the grids are 14, 7; 16, 8; and 32, 16, 8. Measured are the patches at 64 × 64.

    patch_size: that of the flags, which is kept.
    """
    if patch_size is None:
        patch_size = next((p for p in PATCH_SIZES if max(shape[1:]) <= GRID * p), PATCH_SIZES[-1])
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
           width: int | None = None, values: int = 1) -> Size:
    """The width and the batch size of a run. The rule:

        on a CPU with a budget   the widest of WIDTHS that sees enough images; batches of 64 instead of 128 if it sees
                                 fewer than SMALL_BATCH_IMAGES: where steps are few, more of them help most
        on a CPU without         24 channels: twenty epochs of MNIST in about ten minutes
        on other devices         64 channels

    Below 2,000 training images it is at most 32 channels. In all cases it is at least as wide as a patch has values,
    because fewer channels cannot hold the noise of each pixel. Measured on digits (benchmarks/RECORDS.md), but for this
    last part.

    images: the number of training images; budget: seconds, or None; speed(width): the images a second of the training
    of such a network, asked from the narrowest on, as far as it is needed; width: that of the flags, which is kept;
    values: the numbers in a patch, such as 48 for 4 × 4 pixels in colour.
    """
    most = FEW_WIDTH if images < FEW_IMAGES else DEVICE_WIDTH
    if device.type != "cpu" or budget is None:
        narrow = min(most, EPOCHS_WIDTH) if device.type == "cpu" else most
        return Size(width or max(narrow, values), BATCH_SIZE, None)
    wide_enough = [row for row in WIDTHS if values <= row[0] <= most] or [(values, 0)]
    rows, size = [(width, 0)] if width else wide_enough, None
    for channels, least in rows:
        seen = budget * speed(channels)
        if size and seen < least:
            break
        size = Size(channels, SMALL_BATCH_SIZE if seen < SMALL_BATCH_IMAGES else BATCH_SIZE, seen)
    return size
