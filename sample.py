"""Make images with a trained model.

    python sample.py --show_intermediate
    python sample.py --checkpoint outputs/model_final.pt --sampler ddpm --steps 1000 --seed 7
    python sample.py --checkpoint mnist --label 0-9 --guidance_scale 2

No flag of the training has to be repeated: the checkpoint holds them. If --output ends in .npz, it gets the images as
arr_0, uint8 (N, H, W, C), and labels (N,) where there are any, instead of a picture. Without --label, a conditional
model makes all classes in turn. Points in the plane become dots in one picture, or float32 (N, 1, 1, 2).
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_model
from data import LevelCode, code_of
from data_sources.points import is_points, scatter
from runtime import distributed, threads
from runtime.checkpoints import with_checkpoint
from runtime.errors import UserError
from runtime.files import atomic_write, check_outputs, quoted
from runtime.memory import run_or_suggest_batch_size
from runtime.parser import SHARED_FLAGS, Parser, add_shared_flags
from runtime.progress import Bar
from runtime.sampling import check_interval, place_of_pictures, sampling_options
from runtime.script import script
from samplers import Trajectory, expectations, final_image, generate, image_noise
from utils import (
    GREY,
    autocast,
    check_grid,
    evenly_spaced,
    get_device,
    pick_precision,
    save_gif,
    save_images,
    save_picture,
    time_texts,
    time_titles,
)

DEFAULT_OUTPUT = "outputs/generated_samples.png"
MAX_COLUMNS = 16  # of a grid with a row for each class
FILM_FRAMES, FILM_IMAGES = 10, 8
GIF_FRAMES, GIF_IMAGES = 40, 16


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what")
    add_shared_flags(group, "checkpoint", "use_ema", "num_images", "label")
    group.add_argument("--output", default=DEFAULT_OUTPUT, help="the .png or .npz file to write")
    add_shared_flags(group, "columns", "scale")
    group.add_argument("--show_intermediate", action="store_true",
                       help="also write intermediate/step_XXXX.png beside the output, and film_strip.png; for "
                            "--output x.png they are x_intermediate/ and x_film_strip.png")
    group.add_argument("--gif", action="store_true", help="also write an animation of the steps: x_t beside x_0_hat")
    group = parser.add_argument_group("how")
    add_shared_flags(group, "sampler", "spacing")
    group.add_argument("--steps", "--timesteps", **SHARED_FLAGS["steps"])
    add_shared_flags(group, "eta", "guidance_scale", "guidance_interval", "batch_size", "seed", "device", "precision",
                     "threads")
    args = parser.parse_args(argv)
    if Path(args.output).suffix not in (".png", ".npz"):
        parser.error(f"--output must end in .png or .npz, not {args.output!r}")
    for name in {"columns", "scale"} & parser.typed:
        if Path(args.output).suffix == ".npz":
            parser.error(f"--{name} is for a picture, an --output that ends in .png")
    return args


def check_flags(args: Namespace, shape: Sequence[int]) -> None:
    """UserError for flags that make no sense with data of this shape (C, H, W): those of grids, with points."""
    given = [name for name in ("show_intermediate", "gif", "columns", "scale") if getattr(args, name)]
    if is_points(shape) and given:
        raise UserError(f"--{given[0]} is for images, and {args.checkpoint} makes points in the plane: leave it out "
                        f"(python visualize_diffusion.py --what field --checkpoint {quoted(args.checkpoint)} shows "
                        f"their paths)")


class Film:
    """What --show_intermediate and --gif keep: the images at some times of their trajectories."""

    def __init__(self, code: LevelCode, steps: int, frames: bool, pairs: bool):
        self.code = code
        self.frames: dict[float, list[torch.Tensor]] = {}  # by time t, x_t of each batch
        self.pairs: dict[float, list[torch.Tensor]] = {}  # by time t, x_t beside its x_0_hat of the first images
        self.kept_frames = evenly_spaced(steps + 1, FILM_FRAMES + 1) if frames else ()  # 0: the noise
        self.kept_pairs = evenly_spaced(steps + 1, GIF_FRAMES) if pairs else ()

    def watch(self, trajectory: Trajectory, start: tuple[float, torch.Tensor]) -> torch.Tensor:
        """The images at the end of a trajectory, of which the film keeps some frames. start: its time and its noise."""
        for step, (t, x, x_0_hat) in enumerate(expectations(trajectory, start)):
            if step in self.kept_frames:
                self.frames.setdefault(t, []).append(x.cpu())
            if step in self.kept_pairs:
                pairs = self.pairs.setdefault(t, [])
                missing = GIF_IMAGES - sum(map(len, pairs))
                pairs.append(torch.stack([x[:missing].cpu(), x_0_hat[:missing].cpu()], dim=1))
        return x

    def gather(self) -> None:
        """Put together what all processes kept."""
        for kept in (self.frames, self.pairs):
            kept |= {t: [distributed.all_gather(torch.cat(parts))] for t, parts in kept.items()}

    def save_gif(self, path: Path) -> Path:
        """Write the pairs as an animation."""
        titles = dict(zip(self.pairs, time_titles(list(self.pairs)), strict=True))
        captions = [title if t < 0 else f"{title}: x_t beside the image expected then" for t, title in titles.items()]
        pairs = [parts[0][:GIF_IMAGES].flatten(0, 1) for parts in self.pairs.values()]
        save_gif([self.code.decode(frame) for frame in pairs], path, captions=captions)
        return path

    @staticmethod
    def places(output: Path) -> list[Path]:
        """The folder and the film strip that `save` writes."""
        prefix = "" if output.stem == Path(DEFAULT_OUTPUT).stem else f"{output.stem}_"
        return [output.parent / f"{prefix}intermediate", output.parent / f"{prefix}film_strip.png"]

    def save(self, output: Path) -> list[Path]:
        """Write intermediate/step_XXXX.png, named by t, and film_strip.png, a row for each of the first images.

        For an output that has not the default name, x.png: x_intermediate/ and x_film_strip.png. Files of an earlier
        trajectory in the folder are deleted.
        """
        frames = {t: torch.cat(parts) for t, parts in sorted(self.frames.items(), reverse=True)}
        folder, strip = self.places(output)
        for old in (*folder.glob("step_[0-9]*.png"), folder / "final.png"):
            old.unlink(missing_ok=True)
        for name, images in zip(frame_names(list(frames)), frames.values(), strict=True):
            save_images(self.code.decode(images), folder / name)
        rows = torch.stack([images[:FILM_IMAGES] for images in frames.values()], dim=1).flatten(0, 1)
        save_images(self.code.decode(rows), strip, columns=len(frames), scale=3, captions=time_titles(list(frames)))
        return [folder, strip]


def frame_names(times: Sequence[float]) -> list[str]:
    """step_XXXX.png for each time t, with as many decimals as tell them apart; final.png for t < 0."""
    parts = [text.partition(".") for text in time_texts(times)]
    return ["final.png" if t < 0 else f"step_{whole:>04}{point}{decimals}.png"
            for t, (whole, point, decimals) in zip(times, parts, strict=True)]


def outputs_of(args: Namespace) -> list[Path]:
    """The files that the flags ask for; of --show_intermediate one in its folder and the film strip."""
    output = Path(args.output)
    folder, strip = Film.places(output)
    return [output, *([folder / "final.png", strip] if args.show_intermediate else []),
            *([output.with_suffix(".gif")] if args.gif else [])]


def make_images(args: Namespace, steps: int, film: Film | None, code: LevelCode, shape: Sequence[int],
                num_timesteps: int, count: int, batches: Iterator) -> torch.Tensor:
    """The decoded images (N, C, H, W) of all processes; `count` are this process's. The film gets its frames."""
    images, tuner = [], threads.ThreadTuner(threads.PATIENCE)
    total = -(-count // args.batch_size) * steps
    with Bar("sampling", total, "steps", hidden=distributed.rank() > 0) as bar:
        for batch, trajectory in batches:
            trajectory = bar.track(tuner.steps(trajectory))
            x = (film.watch(trajectory, (num_timesteps - 1, image_noise(batch, args.seed, shape)())) if film
                 else final_image(trajectory))
            images.append(code.decode(x).cpu())
    if film:
        film.gather()
    return distributed.all_gather(torch.cat(images))


def rows_by_class(images: torch.Tensor, counts: Sequence[int], columns: int) -> torch.Tensor:
    """uint8 images (N, C, H, W), counts[i] of class i, with grey ones that fill up the rows of each class."""
    rows = []
    for part in images.split(counts):
        rows += [part, torch.full_like(part[:1], GREY).expand(-len(part) % columns, -1, -1, -1)]
    return torch.cat(rows)


def save(images: torch.Tensor, labels: torch.Tensor | None, by_class: bool, output: Path, columns: int | None = None,
         scale: int | None = None) -> None:
    """Write uint8 images (N, C, H, W) as a grid or, to .npz, as uint8 arr_0 (N, H, W, C), with their labels.

    Points (N, 2, 1, 1) become dots in one picture, with a colour for each label.
    by_class: each class starts in a new row of the grid. columns, scale: of the grid; None: by the number of images.
    """
    if output.suffix == ".npz":
        arrays = {} if labels is None else dict(labels=labels.numpy())
        with atomic_write(output) as file:
            np.savez_compressed(file, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    elif is_points(images.shape[1:]):
        save_picture(scatter(images, labels), output)
    elif by_class and len(counts := labels.unique_consecutive(return_counts=True)[1].tolist()) > 1:
        columns = min(max(counts), columns or MAX_COLUMNS)
        save_images(rows_by_class(images, counts, columns), output, columns, scale)
    else:
        save_images(images, output, columns, scale)


@script
def main(argv=None):
    args = parse_args(argv)
    output, device = Path(args.output), get_device(distributed.local_device(args.device))
    distributed.init_process_group(device)
    threads.set_up(args.threads, device)
    if args.num_images < distributed.world_size():
        raise UserError(f"{args.num_images} images do not divide among {distributed.world_size()} processes: choose "
                        f"more")
    args = with_checkpoint(args, points=True)
    model, diffusion, checkpoint = load_model(args.checkpoint, device, args.use_ema, points=True)
    config, shape = checkpoint["config"], checkpoint["config"]["data"]["shape"]
    check_flags(args, shape)
    code = code_of(config)
    options = sampling_options(config, args, args.num_images)
    check_interval(options, diffusion)
    if output.suffix == ".png" and not is_points(shape):
        check_grid((args.num_images, *shape), args.columns, args.scale, " or give an --output that ends in .npz")
    if distributed.rank() == 0:
        check_outputs(outputs_of(args), [args.checkpoint, place_of_pictures(checkpoint)])
    print(f"Using device: {diffusion.device}")
    start, film = time.perf_counter(), None
    if args.show_intermediate or args.gif:
        film = Film(code, options["steps"], args.show_intermediate, args.gif)
    mine = range(args.num_images)[distributed.rank_slice(args.num_images)]
    make = partial(make_images, args, options["steps"], film, code, shape, diffusion.num_timesteps, len(mine))
    with autocast(device, pick_precision(args.precision, device)):
        images = run_or_suggest_batch_size(make, lambda batch_size: generate(
            model, diffusion, shape, mine, **options | dict(batch_size=batch_size)), args.batch_size, device)
    seconds = time.perf_counter() - start
    if distributed.rank():
        return distributed.destroy_process_group()
    save(images, options["labels"], args.label is not None, output, args.columns, args.scale)
    written = [output, *(film.save(output) if args.show_intermediate else [])]
    if args.gif:
        written.append(film.save_gif(output.with_suffix(".gif")))
    print(f"{len(images)} {code.holds} by {options['sampler']} in {options['steps']} steps: {seconds:.2f} s")
    for path in written:
        print(f"Saved {path}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
