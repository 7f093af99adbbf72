"""Draw the forward process, the reverse process of a trained model, and the activations inside it.

    python visualize_diffusion.py
    python visualize_diffusion.py --what schedules --save_path outputs/schedules.png
    python visualize_diffusion.py --what denoising
    python visualize_diffusion.py --what attention --checkpoint mnist
    python visualize_diffusion.py --what field --dataset moons

    forward     images at increasing t               attention   attention weights of some positions
    schedules   the noise schedules                  features    activations of the U-Net's stages
    denoising   a trajectory from noise to image     embedding   time and bottleneck features in 2-D
    field       points in the plane: their density,  loss        the error of x_0_hat against t
                arrows and paths of a sampler

--what field with --dataset shows what the best possible network would do; with the checkpoint of points, this network.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import check_same_data, load_model
from data import code_of, load_dataset, to_model, to_uint8
from data_sources.cache import MIN_HELD_OUT
from data_sources.points import POINT_SETS
from diffusion import SCHEDULES, DiffusionProcess
from evaluation.network_plots import Frame, draw_attention, draw_embedding, draw_features, draw_loss
from evaluation.point_plots import draw_field
from runtime.checkpoints import with_checkpoint
from runtime.errors import UserError
from runtime.files import check_output
from runtime.parser import PICTURE_FLAGS, SHARED_FLAGS, Parser, add_shared_flags, number
from runtime.sampling import (
    check_guidance,
    chosen_dataset,
    dataset_of,
    given_pictures,
    named_classes,
    place_of_pictures,
    sampling_options,
)
from runtime.script import script
from samplers import DEFAULT_SAMPLER, expectations, generate, image_noise, noise_range, sampler_timesteps
from utils import (
    FIGURE_FORMATS,
    evenly_spaced,
    generator_for,
    get_device,
    plain_text,
    pyplot,
    save_figure,
    tile,
    time_titles,
)

COLUMNS = (0, 50, 100, 200, 400, 600, 800, 999)  # times t of --what forward, if T is 1,000
FRAME_COLUMNS = 10
WITHOUT_MODEL = ("forward", "schedules")
WITH_MODEL = ("denoising", "attention", "features", "embedding", "loss", "field")


TRAJECTORY_FLAGS = ("num_images", "columns", "seed", "sampler", "spacing", "steps", "label", "guidance_scale")
READ_FLAGS = {  # the flags that each picture reads, besides those of files and devices
    "forward": ("num_images", "columns", "seed", "schedule", "timesteps", "dataset", *PICTURE_FLAGS),
    "schedules": ("timesteps",),
    "denoising": TRAJECTORY_FLAGS, "attention": TRAJECTORY_FLAGS, "features": TRAJECTORY_FLAGS,
    "embedding": ("seed", "projection"), "loss": ("seed",),
    "field": ("dataset", "seed", "sampler", "spacing", "label", "guidance_scale"),
}


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("--what", choices=WITHOUT_MODEL + WITH_MODEL, default="forward",
                        help="the picture to draw")
    parser.add_argument("--num_images", type=number(int, 1, 64), default=8,
                        help="the number of images, one in each row; for --what features: the number that is averaged")
    parser.add_argument("--save_path", help="the .png, .pdf or .svg to write (default: outputs/forward_diffusion.png, "
                                            "or outputs/ and the value of --what)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear",
                        help="the noise schedule that --what forward uses")
    parser.add_argument("--timesteps", type=number(int, 1, 100_000), default=1000,
                        help="T, the number of noising steps, for --what forward and schedules")
    parser.add_argument("--dataset", **SHARED_FLAGS["dataset"] | dict(
                        default=None, help="the images that --what forward shows, or the points of --what field; a "
                                           "name, or the path of your own pictures (default: mnist; of a model: its "
                                           "own)"))
    add_shared_flags(parser, *PICTURE_FLAGS, "data_dir", "seed", "device")
    parser.add_argument("--columns", type=number(int, 2, 100),
                        help=f"the number of times t to show (default: {FRAME_COLUMNS}; for --what forward "
                             f"{len(COLUMNS)})")
    parser.add_argument("--dpi", type=number(int, 10, 2400), default=120, help="the resolution, in pixels per inch")
    group = parser.add_argument_group(f"--what {', '.join(WITH_MODEL)}")
    add_shared_flags(group, "checkpoint", "sampler", "spacing", "steps", "label")
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"] | dict(
        help=SHARED_FLAGS["guidance_scale"]["help"].replace("student: 1", "student, and for --what field: 1")))
    group.add_argument("--projection", choices=("tsne", "pca"), default="tsne",
                       help="the method by which --what embedding brings features into two dimensions")
    args = parser.parse_args(argv)
    if args.what in WITHOUT_MODEL and args.checkpoint:
        parser.error(f"--what {args.what} does not use a model: leave out --checkpoint, or choose --what "
                     f"{', '.join(WITH_MODEL)}")
    for name in sorted({flag for flags in READ_FLAGS.values() for flag in flags} & parser.typed):
        readers = [what for what, flags in READ_FLAGS.items() if name in flags]
        if args.what not in readers and not (name == "dataset" and args.what in WITH_MODEL):
            parser.error(f"--{name} changes nothing with --what {args.what}: leave it out (it is for --what "
                         f"{', '.join(readers)})")
    if args.save_path is not None and Path(args.save_path).suffix not in FIGURE_FORMATS:
        parser.error(f"--save_path must end in {', '.join(FIGURE_FORMATS)}, not {Path(args.save_path).name!r}")
    return args


def shown_times(num_timesteps: int, columns: int | None = None) -> list[int]:
    """COLUMNS scaled to T timesteps, or as many times as `columns`, evenly spaced: fewer for a small T."""
    if columns:
        return evenly_spaced(num_timesteps, columns)
    return sorted({round(t * (num_timesteps - 1) / 999) for t in COLUMNS})


def show_images(rows: Sequence[Tensor], titles: Sequence[str], labels: Sequence[str], caption: str):
    """A figure of rows of pictures (N, C, H, W), with a title above each column and a label left of each row."""
    height = 1.05 * len(rows) + 0.6
    figure, axes = pyplot().subplots(len(rows), len(titles), figsize=(1.05 * len(titles) + 0.6, height), squeeze=False,
                                     gridspec_kw=dict(wspace=0.04, hspace=0.04, top=1 - 0.6 / height, bottom=0))
    for row, (images, label) in enumerate(zip(rows, labels, strict=True)):
        pictures = to_uint8(images).permute(0, 2, 3, 1).numpy()                             # (N, H, W, C)
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(plain_text(label), rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle(caption, fontsize=11, y=1, va="top")
    return figure


def draw_forward(args: Namespace):
    """x_t at increasing t: one row for each image."""
    diffusion = DiffusionProcess(args.timesteps, args.schedule)
    data = load_dataset(chosen_dataset(Namespace(**vars(args) | dict(dataset=args.dataset or "mnist")),
                                       get_device(args.device).type == "cpu", quiet=True), "test", args.data_dir)
    data = data if len(data.images) else load_dataset(data.source, "train", args.data_dir)
    generator = generator_for(args.seed)
    chosen = torch.randperm(len(data.images), generator=generator)[:args.num_images]
    x_0 = to_model(data.images[chosen])
    noise = torch.randn(x_0.shape, generator=generator)
    times = shown_times(diffusion.num_timesteps, args.columns)
    frames = torch.stack([diffusion.q_sample(x_0, t, noise) for t in times], dim=1)         # (B, times, C, H, W)
    names = [data.class_names[label] if data.class_names else "" for label in data.labels[chosen]]
    return show_images(frames, [f"t = {t}" for t in times], names,
                       f"x_t = √ᾱ_t · x_0 + √(1 - ᾱ_t) · noise, {args.schedule} schedule, T = {args.timesteps}")


def draw_schedules(args: Namespace):
    """ᾱ_t, signal and noise rates, and log-SNR of all schedules."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 3.8))
    for i, name in enumerate(SCHEDULES):
        diffusion = DiffusionProcess(args.timesteps, name)
        t = torch.arange(args.timesteps)
        style = dict(color=f"C{i}", marker="o" if len(t) < 30 else None, markersize=3)
        axes[0].plot(t, diffusion.alphas_cumprod, label=name, **style)
        axes[1].plot(t, diffusion.alpha(t).flatten(), label=f"{name}: signal √ᾱ_t", **style)
        axes[1].plot(t, diffusion.sigma(t).flatten(), "--", label=f"{name}: noise √(1 - ᾱ_t)", **style)
        axes[2].plot(t, diffusion.log_snr(t).flatten(), label=name, **style)
    for axis, title in zip(axes, ("ᾱ_t", "signal and noise rates", "log-SNR = log(ᾱ_t / (1 - ᾱ_t))"), strict=True):
        axis.set(title=title, xlabel="t")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    return figure


def trajectory_frames(args: Namespace, model, diffusion: DiffusionProcess, config: dict,
                      image: bool = False) -> tuple[list[Frame], dict]:
    """The (t, x_t, x_0_hat) of the steps to show of those to the images that sample.py makes.

    image: also the image, at t = -1. Returns also the options of samplers.generate.
    """
    indices, shape = range(args.num_images), config["data"]["shape"]
    options = sampling_options(config, args, args.num_images) | dict(batch_size=args.num_images)
    [(_, trajectory)] = generate(model, diffusion, shape, indices, **options)
    start = diffusion.num_timesteps - 1, image_noise(indices, args.seed, shape)()
    times = sampler_timesteps(diffusion, options["sampler"], options["steps"], options["spacing"])
    times += [-1] if image else []
    shown = shown_steps(times, diffusion, args.columns)
    return [(t, x.cpu(), x_0_hat.cpu()) for step, (t, x, x_0_hat) in enumerate(expectations(trajectory, start))
            if step in shown], options


def shown_steps(times: Sequence[float], diffusion: DiffusionProcess, columns: int | None = None) -> list[int]:
    """At most `columns` indices of the times, the first and the last among them, spread evenly over the log-SNR.

    The image appears in a small part of the time; over the log-SNR that part is large. What lies beyond the
    `noise_range` counts as its ends.
    """
    ends = [-2 * math.log(level) for level in reversed(noise_range(diffusion))]
    places = torch.tensor([diffusion.log_snr(t).item() for t in times]).clamp(*ends)
    count = min(len(times), columns or FRAME_COLUMNS)
    even = torch.linspace(places[0], places[-1], count)[1:-1]
    chosen = [0, len(times) - 1, *(places[:, None] - even).abs().argmin(0).tolist()]
    while len(set(chosen)) < count:  # steps are longer than the even gaps: add the frame farthest from those chosen
        distance = (places[:, None] - places[chosen]).abs().amin(1)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(set(chosen))


def draw_denoising(args: Namespace, model, diffusion: DiffusionProcess, config: dict):
    """A trajectory from noise to image: for each image a pair of rows, x_t above x_0_hat."""
    shown, options = trajectory_frames(args, model, diffusion, config, image=True)
    pairs = [code_of(config).decode(torch.stack([frame[part][i] for part in (1, 2) for frame in shown]))
             for i in range(args.num_images)]
    caption = f"{options['sampler']}, {options['steps']} steps: x_t and, below, the clean image expected from it"
    return show_pairs(pairs, time_titles([t for t, _, _ in shown]), caption)


def show_pairs(pairs: Sequence[Tensor], titles: Sequence[str], caption: str):
    """A figure of pairs of rows (2 · columns, C, H, W) uint8: x_t and x_0_hat. More than four pairs: two blocks."""
    blocks, columns = 1 if len(pairs) <= 4 else 2, len(titles)
    lines, (height, width) = -(-len(pairs) // blocks), pairs[0].shape[2:]
    cell = 0.9 if blocks == 1 else 0.65  # inches
    figure, axes = pyplot().subplots(lines, blocks, squeeze=False, layout="constrained",
                                     figsize=(blocks * (cell * columns + 0.6), lines * 2.25 * cell + 0.7))
    for axis in axes.flat:
        axis.axis("off")
    for axis, pair in zip(axes.T.flat, pairs, strict=False):  # down the first block, then down the second
        axis.axis("on")
        axis.imshow(tile(pair, columns), interpolation="nearest")
        axis.set_yticks([height / 2 + row * (height + 1) for row in (0, 1)], ["x_t", "x̂_0"])
        axis.set_xticks([width / 2 + i * (width + 1) for i in range(columns)], titles if axis in axes[0] else [])
        axis.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8 if blocks == 1 else 7)
        axis.spines[:].set_visible(False)
    figure.suptitle(caption, fontsize=11)
    return figure


def draw_points(args: Namespace):
    """Points in the plane as the best possible network sees them and, with a checkpoint, as its network does."""
    model, name = None, args.dataset
    if args.checkpoint:
        model, process, checkpoint = load_model(args.checkpoint, points=True)
        name = dataset_of(checkpoint, args.data_dir, args.dataset)
    if name not in POINT_SETS:
        raise UserError(f"--what field shows points in the plane, and {name} holds images: choose --dataset "
                        f"{', '.join(POINT_SETS)}, or train on one of them and give its --checkpoint")
    data = load_dataset(name, "train", args.data_dir, points=True)
    if model is None:
        process = DiffusionProcess(schedule="cosine", data_std=data.images.std().item())
    names = data.class_names if model is None or model.num_classes else ()
    classes = None if args.label is None else named_classes(args.label, names)
    if classes and len(classes) > 1:
        raise UserError("--what field shows one class at a time: name one with --label")
    if model:
        check_guidance(checkpoint["config"], bool(classes), args.guidance_scale)
    if args.guidance_scale is not None and not (model and classes):
        raise UserError("--guidance_scale needs --checkpoint, of a model with labels, and --label")
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale  # as the exact denoiser beside it
    return draw_field(data, classes and classes[0], process, model, scale, args.sampler or DEFAULT_SAMPLER,
                      args.spacing, args.seed)


DRAWN_FROM_FLAGS = {"forward": draw_forward, "schedules": draw_schedules, "field": draw_points}


def draw_with_model(args: Namespace, model, diffusion: DiffusionProcess, config: dict):
    """A picture that needs a trained model."""
    if args.what == "denoising":
        return draw_denoising(args, model, diffusion, config)
    if args.what in ("attention", "features"):
        frames, options = trajectory_frames(args, model, diffusion, config)
        if args.what == "attention":
            return draw_attention(model, diffusion, frames, options["labels"], args.num_images, code_of(config))
        return draw_features(model, diffusion, frames, options["labels"])
    source = dataset_of(dict(config=config), args.data_dir, args.dataset)
    train, validation = (load_dataset(source, split, args.data_dir).coded(code_of(config))
                         for split in ("train", "validation"))
    check_same_data(config, train)
    if not len(validation.images):
        raise UserError(f"--what {args.what} shows validation images, and of {train.name} none is held out: it needs "
                        f"{MIN_HELD_OUT} pictures")
    if args.what == "embedding":
        return draw_embedding(model, diffusion, validation, args.projection, args.seed)
    return draw_loss(model, diffusion, validation, train, args.seed)


@script
def main(argv=None):
    args, place = parse_args(argv), None
    name = "forward_diffusion" if args.what == "forward" else args.what
    path = Path(args.save_path or f"outputs/{name}.png")
    if args.what == "field" and not (args.dataset and args.checkpoint is None):
        args = with_checkpoint(args, points=True)
    if args.what in DRAWN_FROM_FLAGS:
        draw = partial(DRAWN_FROM_FLAGS[args.what], args)
    else:
        args = with_checkpoint(args)
        model, diffusion, checkpoint = load_model(args.checkpoint, get_device(args.device))
        if args.dataset:
            dataset_of(checkpoint, args.data_dir, args.dataset)  # an error if it is another
        draw = partial(draw_with_model, args, model, diffusion, checkpoint["config"])
        place = place_of_pictures(checkpoint)
    check_output(path, args.checkpoint, given_pictures(args), place)
    save_figure(draw(), path, args.dpi)
    print(f"Saved {path}")


if __name__ == "__main__":
    sys.exit(main())
