"""The layers of the network: time embedding, residual block, self-attention, down- and up-sampling."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "mish": nn.Mish}


def normalisation(channels: int) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018) with groups of 8 channels, or of more where the number of channels asks for it."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set the weights and the bias to zero: a residual branch that ends in this layer adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """t (B,), whole or real -> (B, time_emb_dim): sines and cosines of t, then an MLP.

    The frequencies are 10000^(-2i / time_emb_dim), i = 0 .. time_emb_dim / 2 - 1: from 1 to a little above 1/10000.

    Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """

    def __init__(self, time_emb_dim: int, activation: str = "silu"):
        super().__init__()
        if time_emb_dim < 2 or time_emb_dim % 2:
            raise ValueError(f"time_emb_dim must be an even number from 2 up, not {time_emb_dim}")
        frequencies = torch.exp(-math.log(10000) * torch.arange(time_emb_dim // 2) / (time_emb_dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(time_emb_dim, time_emb_dim), ACTIVATIONS[activation](),
                                 nn.Linear(time_emb_dim, time_emb_dim))

    def sinusoids(self, t: Tensor) -> Tensor:
        """The embedding before the MLP: (B,) -> (B, time_emb_dim), values in [-1, 1]."""
        angles = t.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(t))


class ResidualBlock(nn.Module):
    """x + f(x, embedding): two 3×3 convolutions; a linear map of the embedding scales and shifts between them.

    Pre-activation as in He et al. 2016; adaptive GroupNorm as in Dhariwal and Nichol 2021, section 3; the last
    convolution starts at zero. In training, dropout acts on its input, as in Ho et al. 2020, appendix B: each number
    becomes 0 with probability `dropout`, and the others are divided by 1 - dropout (Srivastava et al. 2014).
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, activation: str = "silu",
                 dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = normalisation(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalisation(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.scale_shift = nn.Linear(emb_dim, 2 * out_channels)
        self.act, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))                                             # (B, C_out, H, W)
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(self.act(h)))


class Attention(nn.Module):
    """x + self-attention over the H·W positions of x (B, C, H, W) (Vaswani et al. 2017); about 32 channels per head."""

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // head_channels))
        self.norm, self.qkv = normalisation(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        if x.is_cuda and qkv.stride(-1) != 1:
            qkv = qkv.contiguous()  # flash attention needs it
        q, k, v = qkv.unbind(1)                                                             # (B, heads, H·W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, C, H, W)
        return x + self.project(h)


class Stage(nn.Module):
    """`depth` residual blocks at one resolution; with attention=True, self-attention after the middle one.

    checkpointing: store only the input of each block and recompute the rest in the backward pass (Chen et al. 2016).
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, depth: int, attention: bool, activation: str,
                 checkpointing: bool = False, dropout: float = 0.0):
        super().__init__()
        self.checkpointing, self.is_random = checkpointing, dropout > 0
        self.blocks = nn.ModuleList(ResidualBlock(in_channels if i == 0 else out_channels, out_channels, emb_dim,
                                                  activation, dropout) for i in range(depth))
        self.attention = nn.ModuleList(Attention(out_channels) if attention and i == depth // 2 else nn.Identity()
                                       for i in range(depth))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # Without dropout nothing in a block is random, and no random state has to be kept for the second pass.
        options = dict(use_reentrant=False, preserve_rng_state=self.is_random and self.training)
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = checkpoint(block, x, emb, **options) if self.checkpointing else block(x, emb)
            x = attention(x)
        return x


class DownBlock(nn.Module):
    """A stage, then a convolution of stride 2 that halves the resolution: returns (halved, skip)."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, **stage):
        super().__init__()
        self.stage = Stage(in_channels, out_channels, emb_dim, **stage)
        self.down = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.stage(x, emb)                                                           # (B, C_out, H, W)
        return self.down(skip), skip                                                        # (B, C_out, H/2, W/2)


class UpBlock(nn.Module):
    """Interpolation and a convolution that double the resolution, concatenation with the skip, then a stage.

    Interpolation before a convolution avoids the checkerboards of transposed convolutions (Odena et al. 2016).
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, **stage):
        super().__init__()
        self.up = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.stage = Stage(2 * out_channels, out_channels, emb_dim, **stage)

    def forward(self, x: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        x = self.up(F.interpolate(x, scale_factor=2, mode="nearest"))                       # (B, C_out, 2H, 2W)
        return self.stage(torch.cat([x, skip], dim=1), emb)


class ConditionedNetwork(nn.Module):
    """What all networks share: the embedding of time and label, and the checks of what they are called with.

    image_channels, time_emb_dim, activation, num_classes: as in SimpleUNet. counts: other arguments that are numbers
    from 1 up. ValueError for numbers below and for unknown activations.
    """

    def __init__(self, image_channels: int, time_emb_dim: int, activation: str, num_classes: int | None, **counts):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        for name, value in dict(counts, num_classes=num_classes).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")
        self.image_channels, self.num_classes = image_channels, num_classes
        self.time_embedding = TimeEmbedding(time_emb_dim, activation)
        # The last of the num_classes + 1 entries means "no label".
        self.label_embedding = nn.Embedding(num_classes + 1, time_emb_dim) if num_classes else None
        self.act = ACTIVATIONS[activation]()

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The embedding of the time, plus that of the label where the model has labels: (B, time_emb_dim).

        labels (B,) int64 in 0..num_classes, where num_classes, like labels=None, means "no label".
        """
        emb = self.time_embedding(t)
        if self.label_embedding is None:
            return emb
        return emb + self.label_embedding(t.new_full(t.shape, self.num_classes).long() if labels is None else labels)

    def check_inputs(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """ValueError unless x is (B, image_channels, H, W), t is (B,), and labels, where there are any, are (B,)."""
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise ValueError(f"this network takes images (B, {self.image_channels}, H, W), not {tuple(x.shape)}")
        if t.shape != x.shape[:1]:  # without len(x), which would fix the batch size of an exported network
            raise ValueError(f"t must have one entry for each of the {len(x)} images, not shape {tuple(t.shape)}")
        if labels is not None and self.label_embedding is None:
            raise ValueError("this network was built without labels (num_classes=None): call it without them")
        if labels is not None and labels.shape != t.shape:
            raise ValueError(f"labels must have one entry for each of the {len(x)} images, not shape "
                             f"{tuple(labels.shape)}")
