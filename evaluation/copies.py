"""Whether few pictures were learned by heart: how close generated images are to training pictures, pixel by pixel.

For pictures too few for the figures of `evaluation.metrics`. What is compared with are held-out pictures or, where none
are held out, each training picture and the nearest different one.
"""

import hashlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data import ImageData, load_dataset
from evaluation.metrics import closeness, nearest_version, versions
from runtime.errors import UserError
from runtime.files import write_json
from utils import save_images

FEW = 256  # so many held-out pictures are needed for the other figures: twice the features of a `Classifier`
ENOUGH = 3000  # of so many pictures each of the two tenths, whose sizes chance decides, has FEW nearly always
PAIRS = 32  # in nearest.png
VALUES = 2**24  # of pictures and of images, compared at a time: large ones would need much memory as float64


def too_few(data: ImageData) -> bool:
    """Whether one's own pictures have too few held-out ones for figures with a floor."""
    return data.folder is not None and min(
        len(load_dataset(data.folder, split).images) for split in ("validation", "test")) < FEW


def refuse_few(data: ImageData, args: Namespace) -> None:
    """UserError for flags of evaluate.py that ask for figures, of which so few pictures have none."""
    asked = [name for name in ("compare", "sweep", "cas", "likelihood", "reference")
             if getattr(args, name) not in (None, False)]
    asked += ["features"] if args.features == "inception" else []
    if asked:
        raise UserError(f"--{asked[0]} needs {FEW} held-out pictures for each of validation and test, which "
                        f"{ENOUGH:,} different pictures give, and {data.name} has fewer: leave it out")


def distances_to(pictures: Tensor, images: Tensor, mirrored: bool = False) -> Iterator[tuple[int, Tensor]]:
    """For some images (N, C, H, W) uint8 at a time: the number of the first, and the distances (n, M) to pictures.

    mirrored: a picture's mirror image counts as the picture itself, for a network that has seen both.
    """
    def distances(part: Tensor) -> Tensor:
        flat = part.flatten(1).double() / 255  # not by matrix products, which are inexact: copies are at distance 0
        return torch.cat([torch.cdist(flat, some.flatten(1).double() / 255,
                                      compute_mode="donot_use_mm_for_euclid_dist") for some in pictures.split(rows)], 1)

    rows = max(1, min(256, VALUES // pictures[0].numel()))
    for first in range(0, len(images), rows):
        yield first, torch.stack([distances(part) for part in versions(images[first:first + rows], mirrored)]).amin(0)


def different(pictures: Tensor, mirrored: bool) -> Tensor:
    """The first of the pictures (N, C, H, W) uint8 that are the same; mirrored: mirror images count as the same."""
    first = {}
    for row, picture in enumerate(pictures):
        sides = [picture, picture.flip(2)] if mirrored else [picture]
        first.setdefault(min(hashlib.sha256(side.numpy().tobytes()).digest() for side in sides), row)
    return pictures[list(first.values())] if len(first) < len(pictures) else pictures


def among_each_other(pictures: Tensor, mirrored: bool = False) -> Tensor:
    """The distance of each picture (N, C, H, W) uint8 to the nearest different one; infinite where there is none."""
    pictures, rows = different(pictures, mirrored), []
    for first, distances in distances_to(pictures, pictures, mirrored):
        distances.diagonal(first).fill_(torch.inf)
        rows.append(distances.amin(1))
    return torch.cat(rows)


def by_heart(images: Tensor, pictures: Tensor, mirrored: bool = False) -> Tensor:
    """Which images (N, C, H, W) uint8 repeat a training picture (N,): not exactly, as a network never does.

    Those that are less than a third as far from the nearest picture as from the second nearest different one: Gu et
    al. 2025, "On memorization in diffusion models" (also in their code, DiffMemorize), after Yoon et al. 2023.
    """
    pictures = different(pictures, mirrored)
    if len(pictures) < 2:
        return torch.ones(len(images), dtype=torch.bool)
    nearest_two = [distances.topk(2, largest=False).values
                   for _, distances in distances_to(pictures, images, mirrored)]
    first, second = torch.cat(nearest_two).T
    return first < second / 3


def copies(images: Tensor, data: ImageData, mirrored: bool = False) -> tuple[dict, Tensor]:
    """(the report of `closeness`, with the share `by_heart`, the nearest training pictures) of uint8 images.

    data: the pictures that the network learned from; mirrored: whether it has seen them mirrored, too (--hflip).
    """
    images, train = images.cpu(), data.images.cpu()
    held_out = torch.cat([load_dataset(data.folder, split).images for split in ("validation", "test")])
    distances, index = nearest_version(versions(images, mirrored), train)
    real = (nearest_version(versions(held_out, mirrored), train)[0] if len(held_out)
            else among_each_other(train, mirrored))
    real = real if bool(real.isfinite().all()) else torch.zeros(1)  # all pictures are the same
    report = closeness(distances, real) | dict(
        by_heart=by_heart(images, train, mirrored).double().mean().item(), training_images=len(train),
        real_images=len(real), held_out=len(held_out), images=len(images))
    return report, train[index]


def copies_line(report: dict) -> str:
    """The report in a sentence."""
    held_out = report["held_out"]
    real, to = ("held-out pictures", "") if held_out else ("training pictures", " to another")
    return (f"Learned by heart? {report['by_heart']:.1%} of {report['images']:,} new images: they are less than a "
            f"third as far from one training picture as from every other. {report['closer_than_99_percent']:.1%} are "
            f"closer to one than 99% of the {real} are{to} ({report['expected']:.1%} is expected); median distance "
            f"{report['median']:.2f}, of the {real}{to} {report['real_median']:.2f}")


def report_copies(images: Tensor, data: ImageData, mirrored: bool, command: Sequence[str], output: Path) -> None:
    """Print what can be said of images of few pictures; writes evaluation.json and nearest.png. As for `copies`."""
    report, pictures = copies(images, data, mirrored)
    shown = slice(None, PAIRS)
    save_images(torch.stack([images[shown], pictures[shown]], 1).flatten(0, 1), output / "nearest.png", columns=8)
    print(f"{data.name}: too few pictures for the other figures, which need {FEW} held-out ones for each of validation "
          f"and test: {ENOUGH:,} different pictures are enough")
    print(copies_line(report))
    write_json(dict(command=list(command), dataset=data.name, figures={}, memorisation=report,
                    images_sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest()), output / "evaluation.json")
    print(f"Saved {output / 'evaluation.json'} and {output / 'nearest.png'}: each image beside the nearest picture")
