"""The images that evaluate.py measures: made by a checkpoint, or read from files."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import load_model, training_flag
from data import ImageData, LevelCode, code_of, load_dataset
from data_sources.pictures import read_images
from diffusion import DiffusionProcess
from runtime import distributed, threads
from runtime.errors import UserError
from runtime.memory import run_or_suggest_batch_size
from runtime.progress import Bar
from runtime.sampling import check_interval, dataset_of, is_student, place_of_pictures, sampling_options
from samplers import SAMPLERS, STUDENT_SAMPLER, final_image, generate
from utils import autocast, pick_precision

SWEEP_STEPS = (5, 10, 20, 50)


class GeneratedImages(NamedTuple):
    """Images (N, C, H, W) uint8, the requested labels (N,) or None, NFE of one image, and seconds of all."""

    images: Tensor
    labels: Tensor | None
    nfe: float
    seconds: float


class LoadedCheckpoint(NamedTuple):
    """A network that makes images, and the arguments of samplers.generate for each set of images to measure.

    train_images, mirrored: it learned from so many training images (0: all), and from their mirror images, too
    """

    model: nn.Module
    diffusion: DiffusionProcess
    config: dict
    dataset: str | Path
    code: LevelCode
    shape: Sequence[int]
    labels: Tensor | None
    options: list[dict]
    train_images: int
    mirrored: bool


def open_checkpoint(args: Namespace, device: torch.device, check: Callable[[str | None], None]) -> LoadedCheckpoint:
    """Load --checkpoint. UserError if it cannot do what the flags ask for.

    check(pictures): whether the results can be written; pictures: the place of the user's own pictures, or None. It is
    called once the network is there, on rank 0, and before data are downloaded or drawn.
    """
    model, diffusion, checkpoint = load_model(args.checkpoint, device, args.use_ema)
    config, dataset, labels = checkpoint["config"], dataset_of(checkpoint, args.data_dir, args.dataset), None
    if distributed.rank() == 0:
        check(place_of_pictures(checkpoint))
    if model.num_classes:  # image k gets the label of training image k: the shares of the classes are the data's
        known = load_dataset(dataset, "train", args.data_dir).labels
        labels = known[torch.arange(args.num_images) % len(known)]
    samplers, step_counts = [args.sampler], [args.steps]
    if args.sweep is not None:
        suitable = [name for name in SAMPLERS if (name == STUDENT_SAMPLER) == is_student(config)]
        samplers = [args.sampler] if args.sampler else suitable
        step_counts = args.sweep or sorted({min(steps, diffusion.num_timesteps) for steps in SWEEP_STEPS})
    options = []
    for sampler, scale, steps in product(samplers, args.guidance_scale, step_counts):
        interval = None if scale == 1 and len(args.guidance_scale) > 1 else args.guidance_interval
        flags = dict(sampler=sampler, guidance_scale=scale, steps=steps, guidance_interval=interval)
        options.append(sampling_options(config, Namespace(**vars(args) | flags), labels=labels))
    if args.sweep is None:
        for each in options:
            check_interval(each, diffusion)
    return LoadedCheckpoint(model, diffusion, config, dataset, code_of(config), config["data"]["shape"], labels,
                            options, int(training_flag(checkpoint, "train_images", 0)),
                            bool(training_flag(checkpoint, "hflip", False)))


def make_images(args: Namespace, loaded: LoadedCheckpoint, options: dict, count: int) -> GeneratedImages:
    """`count` images made by the checkpoint, a part of them by each process. UserError if they are not finite."""
    evaluations, device, mine = [], loaded.diffusion.device, range(count)[distributed.rank_slice(count)]
    counter = loaded.model.register_forward_hook(lambda _, inputs, __: evaluations.append(len(inputs[0])))
    start, total = time.perf_counter(), -(-len(mine) // args.batch_size) * options["steps"]
    with (Bar(f"{count:,} images by {options['sampler']}", total, "steps", hidden=distributed.rank() > 0) as bar,
          autocast(device, pick_precision(args.precision, device))):
        images = run_or_suggest_batch_size(partial(to_uint8_batches, loaded.code, bar), lambda batch_size: generate(
            loaded.model, loaded.diffusion, loaded.shape, mine, **options | dict(batch_size=batch_size)),
            args.batch_size, device)
    counter.remove()
    if not distributed.all_gather(torch.tensor([images is not None])).all():
        raise UserError(f"{args.checkpoint} makes images that are not finite numbers: train it again")
    images = distributed.all_gather(torch.cat([torch.empty(0, *loaded.shape, dtype=torch.uint8), *images]))
    evaluated = distributed.all_gather(torch.tensor([sum(evaluations)])).sum().item()
    return GeneratedImages(images, loaded.labels, evaluated / count, time.perf_counter() - start)


def to_uint8_batches(code: LevelCode, bar: Bar, batches: Iterator) -> list[Tensor] | None:
    """The final images of each batch as uint8, as in files; None as soon as one is not finite."""
    images, tuner = [], threads.ThreadTuner(threads.PATIENCE)
    for _, trajectory in batches:
        x = final_image(bar.track(tuner.steps(trajectory)))
        if not x.isfinite().all():
            return None
        images.append(code.decode(x).cpu())
    return images


def ready_images(args: Namespace, data: ImageData) -> GeneratedImages:
    """The images of --images, or the first --num_images of them."""
    images, labels = read_images(Path(args.images), data.images.shape[1:], len(data.class_names))
    if not len(images):
        raise UserError(f"{args.images} holds no images: make some with sample.py --output FILE.npz")
    if (count := args.given_images or len(images)) > len(images):
        raise UserError(f"{args.images} holds {len(images):,} images, fewer than --num_images {count}: give "
                        f"--num_images {len(images)}")
    return GeneratedImages(images[:count], None if labels is None else labels[:count], nfe=0, seconds=0)
