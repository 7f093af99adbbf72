"""The feature network of a data set: a small convolutional classifier, its file, and the checksum of that file."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import atomic_write, file_digest

WEIGHTS = Path(__file__).parent / "weights"


def shrunk(images: Tensor, shrink: int) -> Tensor:
    """The means of squares of `shrink` × `shrink` pixels: (B, C, H, W) -> (B, C, H / shrink, W / shrink)."""
    return F.avg_pool2d(images, shrink) if shrink > 1 else images


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
    """Two blocks: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""
    return nn.Sequential(ConvBlock(inputs, outputs, pool=True), ConvBlock(outputs, outputs, residual=True))


class Classifier(nn.Module):
    """Three stages, each of which halves the image, the mean over the positions, and one linear layer.

    The stages have `width`, 2 * `width` and `feature_dims` channels. Images need at least 8x8 pixels. With num_marks
    there is another linear layer, `marks`, from the features to a logit for each mark (`data.load_marks`). Of large
    images the stages see the means of squares of `shrink` × `shrink` pixels.
    """

    def __init__(self, image_channels: int = 1, num_classes: int = 10, width: int = 32, feature_dims: int = 128,
                 num_marks: int = 0, shrink: int = 1) -> None:
        super().__init__()
        self.shrink = shrink
        self.stage1 = make_stage(image_channels, width)
        self.stage2 = make_stage(width, 2 * width)
        self.stage3 = make_stage(2 * width, feature_dims)
        self.head = nn.Linear(feature_dims, num_classes)
        self.marks = nn.Linear(feature_dims, num_marks) if num_marks else None

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, feature_dims), non-negative, of images (B, C, H, W) in [-1, 1]."""
        x = self.stage1(shrunk(images, self.shrink))                            # (B, width, H/2, W/2)
        x = self.stage2(x)                                                      # (B, 2 * width, H/4, W/4)
        x = self.stage3(x)                                                      # (B, feature_dims, H/8, W/8)
        return x.mean(dim=(2, 3))                                               # (B, feature_dims)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))


def place(dataset: str | Path) -> tuple[Path, str]:
    """(folder, name) of the files of a data set's networks; those of your own pictures lie beside their cache."""
    return (dataset, "features") if isinstance(dataset, Path) else (WEIGHTS, dataset)


def is_trained(dataset: str | Path, suffix: str = "") -> bool:
    """Whether the file of a data set's feature network is there and listed in SHA256SUMS; suffix as below."""
    folder, stem = place(dataset)
    name = f"{stem}{suffix}.pt"
    return (folder / name).is_file() and any(line.endswith(f" {name}") for line in _listed_digests(folder))


def weights_digest(dataset: str | Path, suffix: str = "") -> str:
    """The sha256 of a data set's feature network, as listed in SHA256SUMS. UserError if it is not listed.

    suffix: "" for the classifier; other networks have one in the name of their file.
    """
    folder, stem = place(dataset)
    digests = {name: digest for digest, name in map(str.split, _listed_digests(folder))}
    if f"{stem}{suffix}.pt" not in digests:
        train = ("evaluate.py with a checkpoint of these pictures trains it" if isinstance(dataset, Path) else
                 f"train it with python evaluate.py --train_features {dataset}")
        raise UserError(f"there is no {stem}{suffix}.pt in {folder}, which the figures need: {train}")
    return digests[f"{stem}{suffix}.pt"]


def _listed_digests(folder: Path) -> list[str]:
    """The lines of SHA256SUMS: a digest and a file name."""
    path = folder / "SHA256SUMS"
    return path.read_text().splitlines() if path.exists() else []


def load_feature_network(dataset: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """The data set's classifier, float32, in evaluation mode. UserError if its file is missing or damaged."""
    return load_network(Classifier, dataset, "", device)


def load_network(kind: type[nn.Module], dataset: str | Path, suffix: str, device: str | torch.device) -> nn.Module:
    """A network of class `kind` from its file in its `place`, for `load_feature_network` and others like it."""
    digest, (folder, stem) = weights_digest(dataset, suffix), place(dataset)
    path = folder / f"{stem}{suffix}.pt"
    if not path.is_file() or file_digest(path) != digest:
        mend = ("delete it, then evaluate.py trains it again" if isinstance(dataset, Path) else
                f"restore it with git checkout, or train it with python evaluate.py --train_features {dataset}")
        raise UserError(f"{path} is missing or damaged (its sha256 is not the one in SHA256SUMS): {mend}")
    saved = torch.load(path, map_location=device, weights_only=True)
    model = kind(**saved["config"])
    model.load_state_dict(saved["state_dict"])
    return model.to(device).eval().to(memory_format=torch.channels_last).requires_grad_(False)


def save_network(dataset: str | Path, suffix: str, model: nn.Module, config: dict, **notes: dict) -> tuple[Path, str]:
    """Write the weights, rounded to float16, and list their sha256 in SHA256SUMS; returns (path, sha256).

    config: the arguments of the class of `model`; notes: of JSON types, such as the recipe, kept in the file.
    """
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    state = {name: value.contiguous().cpu() for name, value in state.items()}
    folder, stem = place(dataset)
    path = folder / f"{stem}{suffix}.pt"
    with atomic_write(path) as file:
        torch.save({"config": config, "state_dict": state, **notes}, file)
    digest = file_digest(path)
    lines = [line for line in _listed_digests(folder) if not line.endswith(f" {path.name}")]
    with atomic_write(folder / "SHA256SUMS", "w") as file:
        file.write("\n".join(sorted([*lines, f"{digest}  {path.name}"], key=lambda line: line.split()[1])) + "\n")
    return path, digest
