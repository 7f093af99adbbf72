"""SimpleUNet: the network that predicts the target from a noisy image and its time (Ronneberger et al. 2015)."""

from collections.abc import Sequence

from torch import Tensor, nn

from .layers import ACTIVATIONS, ConditionedNetwork, DownBlock, Stage, UpBlock, normalisation, zero_init

# By patch_size: channels at each resolution, as multiples of base_channels; the lowest is 1/4 of the image's size.
CHANNEL_MULTS = {1: (1, 2, 2), 2: (1, 2), 4: (2,)}


class SimpleUNet(ConditionedNetwork):
    """(x (B, C, H, W), t (B,), labels (B,)) -> (B, C, H, W), or (B, 2C, H, W): a time-embedded U-Net.

    image_channels   1 or 3
    base_channels    channels where channel_mults is 1
    time_emb_dim     size of the time embedding, even
    channel_mults    channels at each resolution as multiples of base_channels; each resolution is half the one before;
                     None: CHANNEL_MULTS[patch_size]
    depth            residual blocks in each stage
    middle_depth     residual blocks in the middle, at the lowest resolution; None: depth
    attention        self-attention at 1/n of the image's size for these n: for 28×28, (4,) is 7×7; None: at the lowest
    activation       "silu", "gelu", "relu" or "mish"
    num_classes      number of labels; None: a model without labels
    patch_size       1, 2 or 4: the stem unshuffles pixels into channels and the head shuffles them back, so all
                     convolutions run at 1/patch_size of the resolution or below (Shi et al. 2016)
    checkpointing    less memory in training, for about 25 % more time: for large networks
    learn_variance   2C output channels: C for the prediction, then C for v of `LearnedVariance`
    dropout          in training mode, the share (0 to 1) of numbers in each residual block that become 0: see
                     `ResidualBlock`. It is not in `self.config`, because the weights are used without it

    The embedding of time and label scales and shifts the channels in every residual block; the skips carry what is lost
    at the lower resolutions. The defaults have the resolutions 28, 14 and 7 for 28×28. H and W must be divisible by
    `self.divisor`. ValueError for other sizes and for arguments outside these.
    """

    def __init__(self, image_channels: int = 1, base_channels: int = 64, time_emb_dim: int = 256,
                 channel_mults: Sequence[int] | None = None, depth: int = 1, middle_depth: int | None = None,
                 attention: Sequence[int] | None = None, activation: str = "silu", num_classes: int | None = None,
                 patch_size: int = 1, checkpointing: bool = False, learn_variance: bool = False,
                 dropout: float = 0.0):
        middle_depth = depth if middle_depth is None else middle_depth
        _check_arguments(image_channels, patch_size)
        super().__init__(image_channels, time_emb_dim, activation, num_classes, base_channels=base_channels,
                         depth=min(depth, middle_depth))
        mults = tuple(CHANNEL_MULTS[patch_size] if channel_mults is None else channel_mults)
        if not mults or min(mults) < 1:
            raise ValueError(f"channel_mults must be whole numbers from 1 up, not {mults}")
        factors = [patch_size * 2**level for level in range(len(mults))]
        attention = factors[-1:] if attention is None else list(attention)
        if not set(attention) <= set(factors):
            raise ValueError(f"attention is possible at 1/n of the image's size for n in {factors}, not {attention}")
        self.config = dict(image_channels=image_channels, base_channels=base_channels, time_emb_dim=time_emb_dim,
                           channel_mults=list(mults), depth=depth, middle_depth=middle_depth, attention=attention,
                           activation=activation, num_classes=num_classes, patch_size=patch_size,
                           checkpointing=bool(checkpointing), learn_variance=bool(learn_variance))
        self.learn_variance = bool(learn_variance)
        out_channels = image_channels * (2 if learn_variance else 1)
        self.divisor = factors[-1]
        widths = [base_channels * m for m in mults]

        def stage(level: int, depth: int = depth) -> dict:
            return dict(depth=depth, attention=factors[level] in attention, activation=activation,
                        checkpointing=checkpointing, dropout=dropout)

        self.stem = nn.Sequential(nn.PixelUnshuffle(patch_size),
                                  nn.Conv2d(image_channels * patch_size**2, widths[0], 3, padding=1))
        inputs = [widths[0], *widths]
        self.downs = nn.ModuleList(DownBlock(inputs[i], widths[i], time_emb_dim, **stage(i))
                                   for i in range(len(widths) - 1))
        self.middle = Stage(inputs[-2], widths[-1], time_emb_dim, **stage(len(widths) - 1, middle_depth))
        self.ups = nn.ModuleList(UpBlock(widths[i + 1], widths[i], time_emb_dim, **stage(i))
                                 for i in reversed(range(len(widths) - 1)))
        self.head = nn.Sequential(normalisation(widths[0]), ACTIVATIONS[activation](),
                                  zero_init(nn.Conv2d(widths[0], out_channels * patch_size**2, 3, padding=1)),
                                  nn.PixelShuffle(patch_size))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self._check(x, t, labels)
        emb = self.act(self.embed(t, labels))                                               # (B, time_emb_dim)
        x, skips = self.stem(x), []                                                         # (B, base, H/p, W/p)
        for down in self.downs:
            x, skip = down(x, emb)                                                          # half the resolution
            skips.append(skip)
        x = self.middle(x, emb)
        for up in self.ups:
            x = up(x, skips.pop(), emb)                                                     # twice the resolution
        return self.head(x)                                                                 # (B, C or 2C, H, W)

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        self.check_inputs(x, t, labels)
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            nearest = [self.divisor * max(1, round(side / self.divisor)) for side in x.shape[2:]]
            raise ValueError(f"image height and width must be divisible by {self.divisor} (patch_size and "
                             f"down-sampling together), got {x.shape[2]}×{x.shape[3]}: choose another image size (the "
                             f"nearest is {nearest[0]}×{nearest[1]}), patch_size or channel_mults")


def _check_arguments(image_channels: int, patch_size: int) -> None:
    if image_channels not in (1, 3):
        raise ValueError(f"image_channels must be 1 or 3, not {image_channels}")
    if patch_size not in CHANNEL_MULTS:
        raise ValueError(f"patch_size must be 1, 2 or 4, not {patch_size}")
