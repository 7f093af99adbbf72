"""From flags to a trainer: the size, the network, and what makes its steps fast on this machine."""

import math
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch

from data import ImageData
from data_sources.cache import about
from diffusion import DiffusionProcess
from learned_variance import create_process
from models import SimpleUNet, create_model
from runtime import distributed
from runtime.errors import UserError, checking_user_input
from training import autotune, sizing
from training.flags import TRAINER_FLAGS
from training.trainer import Trainer, fitting_batch, rehearse_steps, repeats_of
from utils import pick_precision


def build(config: dict, data: ImageData, dropout: float) -> tuple[SimpleUNet, DiffusionProcess]:
    """The network and the process of `make_config`; UserError for flags that go with no network or process."""
    with checking_user_input():
        model = create_model(**config["model"], **(dict(dropout=dropout) if dropout else {}))
        diffusion = create_process(model.learn_variance, data.code.edges, **config["diffusion"])
        model(torch.zeros(1, *config["data"]["shape"]), torch.zeros(1))  # an unsuitable image size is an error here
    return model, diffusion


def time_reading(read: Callable[[], ImageData]) -> tuple[ImageData, float]:
    """What read() returns, on local rank 0 first, and how many seconds of that do not count in --budget.

    Those are all of them for your own pictures: reading many for the first time may take longer than the budget, and is
    done once. Else none. Of several processes it is the time of the slowest, for which the others wait.
    """
    start = time.perf_counter()
    with distributed.local_rank_0_first():
        data = read()
    return data, -distributed.all_reduce_min(start - time.perf_counter()) if data.folder else 0.0


IMAGES_SHARE = 0.8  # of the free memory of a GPU, at most: the steps need the rest


def check_gpu_memory(data: ImageData, device: torch.device) -> None:
    """UserError if the images, all of which lie in the memory of the GPU, leave too little of it for the training."""
    if device.type != "cuda":
        return
    size = data.images.nbytes
    room = distributed.all_reduce_min(int(IMAGES_SHARE * torch.cuda.mem_get_info(device)[0]))  # of the fullest GPU
    if size > room:
        raise UserError(f"the images take {size:,} bytes in the memory of the GPU, and there is room for {room:,}: "
                        f"train on fewer with train.py --train_images {int(room / size * len(data.images))}, or on a "
                        f"smaller --image_size of your own pictures")


def check_same_pictures(data: ImageData) -> None:
    """UserError, in all processes, if those of several machines have read different pictures of one's own."""
    digest = about(data.folder)["digest"] if data.folder else ""
    if not distributed.all_reduce_min(int(digest == distributed.broadcast(digest))):
        raise UserError("the machines hold different pictures: copy the folder of one to the others, and install the "
                        "same versions of packages on all")


def choose_size(settings: Namespace, config: dict, data: ImageData, device: torch.device) -> Namespace:
    """The flags with the width and the batch size of `sizing.choose` where they are left open."""
    if settings.base_channels and settings.batch_size:
        return settings
    precision = pick_precision(settings.precision, device)

    def speed(width: int) -> float:
        model, diffusion = build(config | dict(model=config["model"] | dict(base_channels=width)), data,
                                 settings.dropout)
        return distributed.world_size() * max(autotune.images_per_second(
            model, diffusion, data, settings.conditional, precision, sizing.TRIAL_IMAGES) for _ in range(2))

    size = distributed.from_rank_0(partial(
        sizing.choose, len(data.images), settings.budget, device, speed, settings.base_channels,
        data.images.shape[1], config["model"].get("patch_size", 1)))
    if size.images:
        print(f"Measured: with {size.base_channels} channels the budget is enough for about {size.images:,.0f} images",
              flush=True)
    return Namespace(**vars(settings) | dict(base_channels=size.base_channels,
                                             batch_size=settings.batch_size or size.batch_size))


def uses_cuda_graph(settings: Namespace, device: torch.device) -> bool:
    """Whether each step is to be one CUDA graph.

    UserError for --dropout with --checkpointing on MPS, where the second pass would drop other numbers than the first.
    """
    keeps_random_state = settings.dropout and settings.checkpointing  # which older versions of torch cannot record
    if keeps_random_state and device.type == "mps":
        raise UserError("--dropout with --checkpointing cannot be computed on mps: leave one of them out")
    return (device.type == "cuda" and distributed.world_size() == 1 and settings.compile is not False
            and not keeps_random_state)


def make_trainer(settings: Namespace, data: ImageData, model, diffusion) -> tuple[Trainer, Namespace]:
    """The trainer, and the settings with the precision, the layout and the batch size that were measured."""
    measure, device, images = settings.batch_size == "auto", data.images.device, repeats_of(data) * len(data.images)
    largest = min(sizing.BATCH_SIZE, images)

    def fitting(precision: str) -> int:
        rehearse = partial(rehearse_steps, model, diffusion, data, settings.conditional, precision)
        return fitting_batch(rehearse, largest, device)

    # Measured first, because the race below takes half the memory of a step. fp32 takes the most.
    batch_size = fitting("bf16" if settings.precision == "bf16" else "fp32") if measure else settings.batch_size
    size = min(batch_size, images)
    steps = settings.epochs * images // size if settings.epochs else math.inf
    precision, layout = autotune.fastest_arithmetic(
        settings.precision, settings.layout, model, diffusion, data, settings.conditional,
        -(-size // distributed.world_size()), autotune.seconds_for_race(steps, settings.budget))
    if measure:
        batch_size = batch_size if batch_size == largest or precision == "fp32" else fitting(precision)
        print(f"A batch of {batch_size} images fits in memory")
    settings = Namespace(**vars(settings) | dict(precision=precision, layout=layout, batch_size=batch_size))
    cuda_graph = uses_cuda_graph(settings, device)
    trainer = Trainer(data, model.to(memory_format=autotune.LAYOUTS[layout]), diffusion, cuda_graph=cuda_graph,
                      **{name: getattr(settings, name) for name in TRAINER_FLAGS})
    if settings.compile or (settings.compile is None and autotune.worth_compiling(settings.budget, device)):
        trainer.compile(required=bool(settings.compile))
    return trainer, settings
