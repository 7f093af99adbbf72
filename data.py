"""Data sets by name: images in memory as uint8, with labels; and the numbers that networks see for their levels.

Only this module knows the value range of the networks: `LevelCode`.

    train        all training images except the last 5,000
    validation   these 5,000: no network that draws or judges is trained on them; every choice is made with them
    test         only for results that are reported
"""

import contextlib
import hashlib
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_sources.cache import open_split
from data_sources.points import COORDINATES, POINT_SETS, READERS, Coordinates, is_points
from runtime.errors import UserError
from runtime.files import atomic_write, check_writable, one_line
from runtime.progress import Bar, progress

VALIDATION_IMAGES = 5000
SPLITS = ("train", "validation", "test")
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
OBJECTS = ("one", "two", "three", "four")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# ---------------------------------------------------------------------------------------------------- value ranges


def to_model(images: Tensor) -> Tensor:
    """uint8 images 0..255 -> float32 in [-1, 1] by the linear code, for the networks that judge images."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> uint8 0..255, rounded to the nearest level; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class LevelCode:
    """The number in [-1, 1] that a diffusion model learns for each of the 256 levels of a pixel: points (256,), rising.

    Images are decoded to the nearest point. In the linear code, points[k] = k / 127.5 - 1, a network that is off by
    half a level misses the level. Where one level is very common, as the black of a digit's background, that happens in
    most pixels of an image, and a grey haze covers it. `histogram_code` moves common levels away from their neighbours.
    """

    holds = "images"

    def __init__(self, points: Sequence[float] | Tensor, device="cpu"):
        self.points = torch.as_tensor(points, dtype=torch.float64)                          # (256,)
        self.edges = (self.points[1:] + self.points[:-1]) / 2                               # (255,)
        self._values = self.points.float().to(device)  # what `encode` looks up

    @property
    def is_linear(self) -> bool:
        """Whether this is the linear code."""
        return bool((self.points - LINEAR_POINTS).abs().max() < 1e-5)

    def to(self, device) -> "LevelCode":
        """The same code for images on `device`; it also takes others, but then copies its table each time."""
        return LevelCode(self.points, device)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images of any shape -> float32 in [-1, 1]."""
        return self._values.to(images.device)[images.int()]

    def decode(self, images: Tensor) -> Tensor:
        """Float images of any shape -> uint8, the level of the nearest point."""
        return torch.bucketize(images.float().contiguous(), self.edges.float().to(images.device),
                               out_int32=True).to(torch.uint8)


LINEAR_POINTS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
LINEAR = LevelCode(LINEAR_POINTS)
LEVEL_CODES = ("histogram", "linear")
CODE_SHARE, CODE_POWER = 0.95, 0.6  # of `histogram_code`; measured: benchmarks/RECORDS.md
COMMON_NOISE, LEVEL_IMAGES = 0.8, 10_000  # of `noise_level`
CODE_VALUES = 2**29  # it looks at the first images with so many numbers: reading all of a large file takes long


def histogram_code(images: Tensor, share: float = CODE_SHARE, power: float = CODE_POWER) -> LevelCode:
    """A code with larger gaps beside the levels that are common in uint8 images (N, C, H, W).

    The gap between levels k and k + 1, as a share of the range of 2, is (1 - share) / 255 + share · w_k. Each level
    adds to w a weight proportional to (its share of the pixels)^power, half of it on either side, and levels 0 and 255
    all of it on their only side. The sum of all w_k is 1. share = 0 gives the linear code. Where all levels are about
    as common, as in photographs, the code is nearly linear.
    """
    weight = _level_shares(images).pow(power)
    weight = weight / weight.sum()
    beside = (weight[1:] + weight[:-1]) / 2                                                 # (255,)
    beside[0], beside[-1] = beside[0] + weight[0] / 2, beside[-1] + weight[-1] / 2
    gaps = (1 - share) / 255 + share * beside
    points = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]) * 2 - 1
    return LevelCode(points.round(decimals=6))  # as it stands in a checkpoint, so that a resumed run has the same


def _level_shares(images: Tensor) -> Tensor:
    """The share of each of the 256 levels among the values of the first images (N, C, H, W): (256,) float64."""
    counts = images[:max(1, CODE_VALUES // images[0].numel())].flatten().bincount(minlength=256).double()
    return counts / counts.sum()


def code_of(config: dict) -> LevelCode | Coordinates:
    """The code of a checkpoint with this config; linear for files without one, from before 1.0.0."""
    if is_points(config["data"]["shape"]):
        return COORDINATES
    return LevelCode(config["data"]["level_code"]) if "level_code" in config["data"] else LINEAR


PART_VALUES = 2**23  # of the images that go through a network at a time: several hundred MB in its layers


def in_parts(images: Tensor, most: int) -> tuple[Tensor, ...]:
    """images (N, C, H, W) in parts of `most` or, of large ones, of as many as have PART_VALUES values: for memory."""
    return images.split(max(1, min(most, PART_VALUES // math.prod(images.shape[1:]))))


# ------------------------------------------------------------------------------------------------ splits of a data set


@dataclass(frozen=True)
class ImageData:
    """A split of a data set: images (N, C, H, W) uint8, labels (N,) int64, the names of the classes, and a code.

    Points in the plane are images (N, 2, 1, 1) float32, with the code COORDINATES.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    code: LevelCode | Coordinates = LINEAR
    folder: Path | None = None  # of the cache of your own pictures

    @property
    def source(self) -> str | Path:
        """What `load_dataset` takes for the other splits of this data set."""
        return self.folder or self.name

    def to(self, device) -> "ImageData":
        """The same split with images and labels on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), code=self.code.to(device))

    def first(self, count: int | None) -> "ImageData":
        """The first `count` images of the split; None: all."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def coded(self, code: LevelCode) -> "ImageData":
        """The same split with another code."""
        return replace(self, code=code)

    def x_0(self, chosen: Tensor | slice = slice(None)) -> Tensor:
        """The chosen images as a diffusion model learns them: (B, C, H, W) float32 in [-1, 1]."""
        return self.code.encode(self.images[chosen])


def load_dataset(name: str | Path, split: str = "train", data_dir: str | Path = "data",
                 points: bool = False) -> ImageData:
    """Load a split of the data set `name` from `data_dir`; if it is missing, download it (or draw it: glyphs, scenes).

    name: one of DATASETS or, for your own pictures, the folder of their cache (`data_sources.cache`), whose images are
    mapped into memory; without classes their class_names are empty and their labels 0, and a split may be empty.

    points: whether the caller can use points in the plane, too. UserError for points where it cannot, an unknown name
    or split, a damaged file, and a download that fails.
    """
    if isinstance(name, Path):
        images, labels, about = open_split(name, split)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a very large file: that it cannot be written to
            images = torch.from_numpy(images)
        return ImageData(about["name"], split, images, torch.from_numpy(labels),
                         tuple(about["class_names"]), folder=name)
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not points:
        refuse_points(name)
    images, labels = _read(name, Path(data_dir).absolute(), split != "test")
    part = _part(split)
    return ImageData(name, split, images[part], labels[part], DATASETS[name].class_names, DATASETS[name].code)


def load_marks(name: str | Path, split: str, data_dir: str | Path = "data") -> Tensor | None:
    """What is known to be in each image of a split besides its class: (N, marks) bool; None where nothing is.

    For scenes: which colours and kinds of objects (`data_sources.scenes.MARKS`).
    """
    read = DATASETS[name].read_marks if name in DATASETS else None
    return read(Path(data_dir).absolute(), split != "test")[_part(split)] if read else None


def _part(split: str) -> slice:
    """Which images of a file are those of the split."""
    return {"train": slice(None, -VALIDATION_IMAGES), "validation": slice(-VALIDATION_IMAGES, None),
            "test": slice(None)}[split]


def noise_level(name: str, data: ImageData) -> tuple[float, float]:
    """Mean and standard deviation of log(sigma / alpha / data_std) in training.

    Of your own pictures the mean is log(side / 32) + 0.8 · (the share of the most common level among their values).
    Twice the side needs twice the noise, as for `scenes` below; and where one level fills most of a picture, as around
    digits, forms still show through more noise, which was measured (benchmarks/RECORDS.md, "Noise for pictures of
    one's own").
    """
    if data.folder is None:
        return DATASETS[name].noise_level
    share = max(_level_shares(data.images[:LEVEL_IMAGES]).tolist())
    return round(math.log(max(data.images.shape[2:]) / 32) + COMMON_NOISE * share, 2), 1.2


def refuse_points(name: str | Path | None, what: str = "") -> None:
    """UserError if the data set of this name, which `what` was trained on if that is given, holds points."""
    if name in POINT_SETS:
        raise UserError(f"{f'{what} was trained on {name}, which' if what else name} holds points in the plane, and "
                        f"this is for images: points are for train.py, sample.py and visualize_diffusion.py --what "
                        f"field")


@lru_cache(maxsize=1)  # train and validation are parts of the same files: read and checked once
def _read(name: str, data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    return DATASETS[name].read(data_dir, train)


# ------------------------------------------------------------------------------------------------ from torchvision

# sha256 of the unpacked files: a damaged or incomplete file is found before it is used.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def _mnist(kind: str, digests: dict[str, str], data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) of MNIST or one in its format.

    torchvision only downloads the files: its import takes a second and 160 MB. Reading them is simple once the checksum
    is right: the values follow a header of 4 bytes and 4 more for each dimension.
    """
    folder = data_dir / kind / "raw"
    if not all((folder / name).is_file() for name in digests):
        _download(kind, data_dir, f"{kind}/raw")
    contents = {name: _checked(folder / name, digest) for name, digest in digests.items()}
    half = "train" if train else "t10k"
    images, labels = contents[f"{half}-images-idx3-ubyte"][16:], contents[f"{half}-labels-idx1-ubyte"][8:]
    return torch.from_numpy(images).view(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _cifar10(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,)."""
    from torchvision.datasets import CIFAR10

    names = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    files = {data_dir / CIFAR10.base_folder / name: md5 for name, md5 in names}
    if not all(path.is_file() for path in files):
        _download("CIFAR10", data_dir, CIFAR10.base_folder)
    for path, md5 in files.items():
        _checked(path, md5, "md5")
    dataset = CIFAR10(data_dir, train=train, download=False)
    return torch.as_tensor(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(dataset.targets)


def _download(kind: str, data_dir: Path, inner: str) -> None:
    """Download a data set of torchvision, `kind`, to the folder `inner` of data_dir.

    The files come there when all of them are whole, so that another process finds none that is half written. UserError,
    with what to do, if the download fails.
    """
    from torchvision import datasets

    folder = data_dir / inner
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    shown, datasets.utils.tqdm = datasets.utils.tqdm, lambda total=None, **_: Bar(f"downloading {kind}", total, "bytes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
            getattr(datasets, kind)(temporary, download=True)
            for path in (Path(temporary) / inner).iterdir():
                if path.suffix != ".gz":  # the archives
                    os.replace(path, folder / path.name)
    except (RuntimeError, OSError, HTTPException) as error:
        raise UserError(f"could not download {kind} into {data_dir} ({_innermost_reason(error)}): check the network, "
                        f"give the folder that holds it with --data_dir, or, in scripts with this flag, use --dataset "
                        f"glyphs") from error
    finally:
        datasets.utils.tqdm = shown
        for path in made:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def _innermost_reason(error: BaseException) -> str:
    """Why a download failed, such as "Name or service not known", without the errors that were raised because of it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    # torchvision puts the errors of all its addresses into one text, and urllib encloses its reason.
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("Error downloading", "Tried "))]
    text = one_line(lines[-1] if lines else error)
    return re.sub(r"^<urlopen error (.*)>$", r"\1", text) or type(error).__name__


def _checked(path: Path, digest: str, algorithm: str = "sha256") -> np.ndarray:
    """The bytes of a file (N,) uint8. UserError if they are not the original's."""
    content = np.fromfile(path, np.uint8)
    if hashlib.new(algorithm, content).hexdigest() != digest:
        raise UserError(f"{path} is damaged (its checksum is not the original's): delete it and run again")
    return content


# ------------------------------------------------------------------------------------------------------ drawn here


def _glyphs(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """60,000 or 10,000 typeset digits, drawn once and kept in data_dir/glyphs."""
    images, labels = _drawn("glyphs", GLYPHS[train], data_dir, train, "images", "labels")
    return images[:, None], labels.long()


def _scenes(data_dir: Path, train: bool) -> tuple[Tensor, Tensor]:
    """30,000 or 10,000 scenes, drawn once and kept in data_dir/scenes; labels: the number of objects less one."""
    images, labels = _drawn("scenes", SCENES[train], data_dir, train, "images", "labels")
    return images, labels.long()


def _scene_marks(data_dir: Path, train: bool) -> Tensor:
    """Which of MARKS are in each of the scenes: (N, marks) bool."""
    from data_sources.scenes import marks

    return marks(*_drawn("scenes", SCENES[train], data_dir, train, "colours", "kinds"))


GLYPHS, SCENES = ((10_000, 28, 28), (60_000, 28, 28)), ((10_000, 3, 64, 64), (30_000, 3, 64, 64))  # test, train


def _drawn(name: str, shape: tuple[int, ...], data_dir: Path, train: bool, *wanted: str) -> list[Tensor]:
    """The `wanted` arrays of data_dir/NAME/train.npz or test.npz, which is drawn if it is missing.

    shape: of the images in it. UserError for a damaged file.
    """
    path = data_dir / name / ("train.npz" if train else "test.npz")
    if not path.exists():
        _draw(name, shape[0], 0 if train else 1, path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[each] for each in wanted]
        for each, array in zip(wanted, arrays, strict=True):
            fits = array.shape == shape and array.dtype == np.uint8 if each == "images" else len(array) == shape[0]
            if not fits:
                raise UserError(f"its {each} are {array.dtype} {array.shape}")
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # zipfile, zlib and numpy have different errors for a damaged file
        raise UserError(f"{path} is damaged ({one_line(error)}): delete it and run again, "
                        f"then it is drawn again") from error
    return [torch.from_numpy(array) for array in arrays]


def _draw(name: str, count: int, seed: int, path: Path) -> None:
    """Draw a data set and write its arrays to `path`."""
    from data_sources.glyphs import draw_glyphs
    from data_sources.scenes import draw_scenes

    check_writable(path.parent, "another --data_dir")
    print(f"Drawing {count:,} {name} into {path} (once) ...", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with small tensors several threads are slower
    try:
        drawn = {"glyphs": draw_glyphs, "scenes": draw_scenes}[name](count, seed, progress("drawing"))
    finally:
        torch.set_num_threads(threads)
    with atomic_write(path) as file:
        np.savez(file, **drawn._asdict())


class DataSet(NamedTuple):
    """How to read a data set and what is known of it: a row of DATASETS.

    read          read(data_dir, train) -> images (N, C, H, W) uint8 and labels (N,) int64
    class_names   one for each label
    noise_level   mean and standard deviation of log(sigma / alpha / data_std) in training
    read_marks    read_marks(data_dir, train) -> (N, marks) bool: what else is known to be in each image; None: nothing
    code          of the data as they are read
    lowest_noise  where the samplers' noise levels end with a `histogram_code`, as `DiffusionProcess` has it; None: not
                  measured
    guidance      the default strength of the guidance by a label; None: DEFAULT_GUIDANCE of the samplers
    """

    read: Callable[[Path, bool], tuple[Tensor, Tensor]]
    class_names: tuple[str, ...]
    noise_level: tuple[float, float] = (-0.5, 1.2)
    read_marks: Callable[[Path, bool], Tensor] | None = None
    code: LevelCode | Coordinates = LINEAR
    lowest_noise: float | None = None
    guidance: float | None = None


# To add a data set, add a row. Noise levels: measured (benchmarks/RECORDS.md); that of cifar10: Karras et al. 2022; of
# scenes: the same plus log(64 / 32), since twice the side needs twice the noise (Hoogeboom et al. 2023, section 3.1).
DATASETS = {
    "mnist": DataSet(partial(_mnist, "MNIST", MNIST_FILES), DIGITS, noise_level=(0.7, 0.9),
                     lowest_noise=0.3),
    "fashion_mnist": DataSet(partial(_mnist, "FashionMNIST", FASHION_FILES), FASHION, noise_level=(0.0, 1.2),
                             lowest_noise=0.1),
    "cifar10": DataSet(_cifar10, CIFAR, guidance=2.0),
    "glyphs": DataSet(_glyphs, DIGITS, noise_level=(0.7, 0.9), lowest_noise=0.3),
    "scenes": DataSet(_scenes, OBJECTS, noise_level=(0.2, 1.2), read_marks=_scene_marks),
    **{name: DataSet(READERS[name], row.class_names, code=COORDINATES) for name, row in POINT_SETS.items()},
}
