"""How the classifiers that judge images are trained: augmentations, a recipe for each data set, the training loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import SPLITS, ImageData, load_dataset, load_marks, to_model
from data_sources.cache import size_step
from evaluation.classifier import Classifier, place, save_network
from evaluation.features import extract_features
from evaluation.metrics import Progress
from runtime.files import check_writable


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shift and slightly bend each image of a batch (B, C, H, W) at random; for digits."""
    count, _, height, width = images.shape

    def uniform(*shape: int, limit: float) -> Tensor:
        return limit * (2 * torch.rand(*shape, generator=generator, device=images.device) - 1)

    angle, scale = uniform(count, limit=math.radians(10)), torch.exp(uniform(count, limit=0.1))
    cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
    linear = torch.stack([cosine, -sine, sine, cosine], dim=1).view(count, 2, 2)
    offset = uniform(count, 2, 1, limit=0.12)                                   # half an image is 1
    grid = F.affine_grid(torch.cat([linear, offset], dim=2), list(images.shape), align_corners=False)
    bends = F.interpolate(uniform(count, 2, 5, 5, limit=0.1), (height, width), mode="bicubic")
    grid = grid + bends.permute(0, 2, 3, 1)                                     # (B, H, W, 2)
    place = "cpu" if images.device.type == "mps" else images.device  # torch before 2.13 has no border on MPS
    moved = F.grid_sample(images.to(place), grid.to(place), padding_mode="border", align_corners=False)
    return moved.to(images.device)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image of a batch (B, C, H, W) horizontally with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def shift(images: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Shift each image of a batch (B, C, H, W) by up to `pixels` in both directions; its edge is repeated."""
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * pixels + 1, (2, count, 1, 1), generator=generator, device=images.device)
    rows = moves[0] + torch.arange(height, device=images.device).view(1, -1, 1)     # (B, H, 1)
    columns = moves[1] + torch.arange(width, device=images.device)                  # (B, 1, W)
    padded = F.pad(images, [pixels] * 4, mode="replicate").permute(0, 2, 3, 1)
    index = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[index, rows, columns].permute(0, 3, 1, 2)                         # (B, C, H, W)


def cut_out(images: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Set a square of `size` pixels at a random place of each image (B, C, H, W) to 0 (mid-grey)."""
    count, _, height, width = images.shape
    corner = torch.rand(2, count, 1, 1, 1, generator=generator, device=images.device)
    top, left = (corner[0] * (height - size + 1)).floor(), (corner[1] * (width - size + 1)).floor()
    rows = torch.arange(height, device=images.device).view(-1, 1)
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    return images.masked_fill(inside, 0.0)


def augment_clothes(images: Tensor, generator: torch.Generator) -> Tensor:
    """For clothes: flip, shift by up to 2 pixels, hide an 8x8 square."""
    return cut_out(shift(flip(images, generator), generator, pixels=2), generator, size=8)


def augment_photos(images: Tensor, generator: torch.Generator) -> Tensor:
    """For photos: flip, shift by up to 4 pixels, hide an 8x8 square."""
    return cut_out(shift(flip(images, generator), generator, pixels=4), generator, size=8)


def augment_any(images: Tensor, generator: torch.Generator) -> Tensor:
    """For pictures of any kind: shift by up to 2 pixels."""
    return shift(images, generator, pixels=2)


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a data set's classifier is built and trained. The defaults are for a data set without a row below."""

    width: int = 48  # of the network
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1  # the peak of the one-cycle learning rate
    weight_decay: float = 5e-4
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = augment_any
    mark_weight: float = 10.0  # of the loss of the marks, where images have some


OWN_IMAGES = 400_000  # of your own pictures, all epochs together: more would take hours without a GPU
JUDGED_SIDE = 64  # pixels along a side that a network that judges sees of your own pictures, at most
CLASSIFIER_RECIPES = {
    "mnist": ClassifierRecipe(width=32, epochs=14, weight_decay=3e-4, augment=warp),
    "glyphs": ClassifierRecipe(width=32, epochs=6, weight_decay=3e-4, augment=warp),
    "fashion_mnist": ClassifierRecipe(epochs=18, augment=augment_clothes),
    "cifar10": ClassifierRecipe(epochs=24, augment=augment_photos),
    "scenes": ClassifierRecipe(width=16, epochs=6),
}


def classifier_recipe(dataset: str | Path, count: int) -> ClassifierRecipe:
    """The data set's row of CLASSIFIER_RECIPES; for `count` of your own pictures the defaults, with fitting epochs."""
    if isinstance(dataset, Path):
        return ClassifierRecipe(epochs=fitting_epochs(count, ClassifierRecipe.epochs))
    return CLASSIFIER_RECIPES.get(dataset, ClassifierRecipe())


def fitting_epochs(count: int, epochs: int, least: int = 1) -> int:
    """How often a network that judges sees each of `count` of your own pictures: `epochs`, less of many, or `least`."""
    return max(least, min(epochs, OWN_IMAGES // count))


def fitting_shrink(data: ImageData) -> int:
    """How many pixels of a side the networks that judge take for one, so that they see JUDGED_SIDE at most.

    More would take hours and many gigabytes. `evaluation.two_sample` and the search for copies see all pixels.
    """
    return size_step(max(data.images.shape[2:])) // size_step(JUDGED_SIDE) if data.folder else 1


def recipe_notes(dataset: str | Path, count: int) -> dict:
    """The data set's recipe for `count` images as JSON types: the name of its augmentation instead of the function."""
    recipe = classifier_recipe(dataset, count)
    return asdict(recipe) | dict(augment=getattr(recipe.augment, "__name__", None))


def train_classifier(model: Classifier, images: Tensor, labels: Tensor, recipe: ClassifierRecipe, *, seed: int = 0,
                     bf16: bool = True, progress: Progress = iter, marks: Tensor | None = None) -> None:
    """Train in place on uint8 images (N, C, H, W) and labels (N,): SGD with a one-cycle learning rate.

    The loss is the cross-entropy of the labels, plus mark_weight times the mean cross-entropy of the marks
    (N, num_marks) bool if they are given. bf16: compute the network in bfloat16.
    """
    device, batch_size = next(model.parameters()).device, recipe.batch_size
    generator = torch.Generator(device).manual_seed(seed)
    labels = labels.to(device)
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, momentum=0.9, nesterov=True,
                                weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, pct_start=0.2, cycle_momentum=False,
                                                   total_steps=recipe.epochs * math.ceil(len(images) / batch_size))
    batches = shuffled_batches(len(images), batch_size, generator)
    for _, chosen in zip(progress(range(schedule.total_steps)), batches, strict=False):
        batch = to_model(images[chosen.to(images.device)].to(device))  # all of them may not fit on a GPU
        batch = recipe.augment(batch, generator) if recipe.augment else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = model.features(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(model.head(features).float(), labels[chosen])
            if marks is not None:
                loss += recipe.mark_weight * F.binary_cross_entropy_with_logits(
                    model.marks(features).float(), marks[chosen.to(marks.device)].to(device, torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of the numbers below `count`, in a new random order in each epoch; none has only one of many."""
    while True:
        batches = torch.randperm(count, generator=generator, device=generator.device).split(batch_size)
        yield from (rows for rows in batches if len(rows) > 1 or count == 1)  # batch norm needs two values


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of correctly classified uint8 images (N, C, H, W), in [0, 1]."""
    right = extract_features(images, model).probabilities.argmax(1) == labels
    return right.double().mean().item()


def mark_accuracy(model: Classifier, images: Tensor, marks: Tensor) -> float:
    """Share of uint8 images (N, C, H, W) of which every mark (N, num_marks) is judged rightly, in [0, 1]."""
    right = ((extract_features(images, model).marks > 0.5) == marks).all(1)
    return right.double().mean().item()


def new_classifier(data: ImageData, device, seed: int, bf16: bool, progress: Progress = iter,
                   marks: Tensor | None = None) -> Classifier:
    """A classifier trained by the data set's recipe on these images, labels and marks alone."""
    recipe = classifier_recipe(data.source, len(data.images))
    torch.manual_seed(seed)
    model = Classifier(**_network_config(data, recipe, marks)).to(device)
    train_classifier(model, data.images, data.labels, recipe, seed=seed, bf16=bf16, progress=progress, marks=marks)
    return model


def _network_config(data: ImageData, recipe: ClassifierRecipe, marks: Tensor | None) -> dict:
    """The arguments of `Classifier` for a data set."""
    config = dict(image_channels=data.images.shape[1], num_classes=len(data.class_names), width=recipe.width,
                  shrink=fitting_shrink(data))
    return config if marks is None else config | dict(num_marks=marks.shape[1])


def train_feature_network(dataset: str | Path, data_dir, device, seed: int, bf16: bool,
                          progress: Progress = iter) -> str:
    """Train a data set's feature network on the training split and write it to its `place`; returns a line about it."""
    check_writable(place(dataset)[0])
    splits = {split: load_dataset(dataset, split, data_dir) for split in SPLITS}
    train, marks = splits.pop("train"), load_marks(dataset, "train", data_dir)
    model = new_classifier(train, device, seed, bf16, progress, marks)
    model.half().float()  # the precision of the file
    accuracies = {split: round(accuracy(model, data.images, data.labels), 4) for split, data in splits.items()}
    accuracies |= {f"{split}_marks": round(mark_accuracy(model, data.images, load_marks(dataset, split, data_dir)), 4)
                   for split, data in splits.items() if marks is not None}
    notes = recipe_notes(dataset, len(train.images)) | dict(seed=seed, bf16=bf16, training_images=len(train.images),
                                         torch=str(torch.__version__))
    config = _network_config(train, classifier_recipe(dataset, len(train.images)), marks)
    path, digest = save_network(dataset, "", model, config, recipe=notes, accuracy=accuracies)
    said = f"; all marks right in {accuracies['test_marks']:.2%} of test" if marks is not None else ""
    return (f"Saved {path}: accuracy {accuracies['test']:.2%} on test, {accuracies['validation']:.2%} on validation"
            f"{said}; sha256 {digest}")
