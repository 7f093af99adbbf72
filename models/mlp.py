"""PointMLP: the network for points in the plane, so small that it learns in seconds."""

import torch
from torch import Tensor, nn

from .layers import ACTIVATIONS, ConditionedNetwork, zero_init


class MLPBlock(nn.Module):
    """x + f(x, embedding): two linear layers; a linear map of the embedding scales and shifts between them."""

    def __init__(self, width: int, emb_dim: int, activation: str = "silu"):
        super().__init__()
        self.norm1, self.linear1 = nn.LayerNorm(width), nn.Linear(width, width)
        self.norm2, self.linear2 = nn.LayerNorm(width), zero_init(nn.Linear(width, width))
        self.scale_shift = nn.Linear(emb_dim, 2 * width)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.linear1(self.act(self.norm1(x)))                                           # (B, width)
        scale, shift = self.scale_shift(emb).chunk(2, dim=1)
        return x + self.linear2(self.act(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class PointMLP(ConditionedNetwork):
    """(x (B, C, 1, 1), t (B,), labels (B,)) -> (B, C, 1, 1): a residual MLP with the U-Net's time and label embedding.

    image_channels   C, the number of coordinates
    base_channels    the width of the hidden layers
    depth            the number of residual blocks
    others           as in SimpleUNet

    ValueError for other sizes and for arguments outside these.
    """

    def __init__(self, image_channels: int = 2, base_channels: int = 128, time_emb_dim: int = 128, depth: int = 3,
                 activation: str = "silu", num_classes: int | None = None):
        super().__init__(image_channels, time_emb_dim, activation, num_classes, base_channels=base_channels,
                         depth=depth)
        self.config = dict(network="mlp", image_channels=image_channels, base_channels=base_channels,
                           time_emb_dim=time_emb_dim, depth=depth, activation=activation, num_classes=num_classes)
        self.learn_variance, self.divisor = False, 1
        self.stem = nn.Linear(image_channels, base_channels)
        self.blocks = nn.ModuleList(MLPBlock(base_channels, time_emb_dim, activation) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(base_channels), ACTIVATIONS[activation](),
                                  zero_init(nn.Linear(base_channels, image_channels)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.check_inputs(x, t, labels)
        if x.shape[2:] != (1, 1):
            raise ValueError(f"this network takes points (B, {self.image_channels}, 1, 1), not {tuple(x.shape)}")
        emb = self.act(self.embed(t, labels))                                               # (B, time_emb_dim)
        h = self.stem(x.flatten(1))                                                         # (B, width)
        for block in self.blocks:
            h = block(h, emb)
        return self.head(h)[:, :, None, None]                                               # (B, C, 1, 1)
