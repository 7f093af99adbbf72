"""How large a network to train: one rule, which train.py follows wherever a flag leaves the size open."""

from collections.abc import Sequence

import torch

GRID, LOWEST = 16, 8  # positions along a side: at most at the first stage, and about so many at the last
PATCH_SIZES = (2, 4)
FEW_IMAGES, FEW_WIDTH = 2000, 32


def network_size(shape: Sequence[int], images: int, budget: float | None, device: torch.device,
                 patch_size: int | None = None) -> dict:
    """{"base_channels", "patch_size", "channel_mults"} for images of this shape (C, H, W). The rule:

        patch_size      2, or 4 for images above 32 pixels: the convolutions run on a grid of at most 16 × 16 positions
        channel_mults   1 at the first resolution and 2 below; each halves the one above it, down to 8 × 8 positions or
                        the first odd number. There attention is, and `--middle_depth` residual blocks (3); the other
                        stages have `--depth` (1)
        base_channels   on a CPU 24 without a budget (twenty epochs of MNIST in about ten minutes), 32 below one and a
                        half minutes, 48 below twenty, 64 above; on other devices 64. A grid of n times 16 × 16
                        positions counts as an n-th of the budget, because an image takes about n times as long

    Below 2,000 images it is at most 32 channels. Grey and colour are treated alike: colour only changes the first and
    the last layer. For 28 × 28 and 32 × 32 the grids are 14, 7 and 16, 8. Measured (benchmarks/RECORDS.md) are the
    widths on digits and clothes and the patches at 64 × 64; the widths of fewer images and of other grids are not.

    images: the number of training images; budget: seconds, or None; patch_size: that of the flags, which is kept.
    """
    side = max(shape[1:])
    if patch_size is None:
        patch_size = next((p for p in PATCH_SIZES if side <= GRID * p), PATCH_SIZES[-1])
    return dict(base_channels=_width(images, budget, device, max(1.0, (side / patch_size / GRID) ** 2)),
                patch_size=patch_size, channel_mults=_channel_mults(shape, patch_size))


def _channel_mults(shape: Sequence[int], patch_size: int) -> list[int]:
    """The multiples of base_channels, one for each resolution."""
    sides, mults = [side // patch_size for side in shape[1:]], [1]
    while max(sides) > LOWEST and all(side % 2 == 0 for side in sides):
        sides, mults = [side // 2 for side in sides], [*mults, 2]
    return mults if len(mults) > 1 else [2]


def _width(images: int, budget: float | None, device: torch.device, cost: float) -> int:
    """Base channels; cost: of an image, in those of 32 × 32 pixels in patches of 2."""
    if device.type != "cpu":
        width = 64
    else:
        seconds = None if budget is None else budget / cost
        width = 24 if seconds is None else 32 if seconds < 90 else 48 if seconds < 1200 else 64
    return min(width, FEW_WIDTH) if images < FEW_IMAGES else width
