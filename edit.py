"""Change a picture, or walk between two.

    python edit.py inpaint --checkpoint outputs/model_final.pt --mask left
    python edit.py vary --checkpoint outputs/model_final.pt --image my_digit.png --strength 0.6
    python edit.py vary --checkpoint outputs/model_final.pt --label 7 --guidance_scale 2
    python edit.py interpolate --checkpoint outputs/model_final.pt --seeds 3 8 --frames 16
    python edit.py invert --checkpoint outputs/model_final.pt --index 5

Without --image the picture is image --index of the data set's test split; without --label no class is asked for. Every
command writes input and result side by side to --output.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from data import load_dataset, to_model, to_uint8
from data_sources.pictures import read_mask, read_picture
from editing import ddim_inversion, inpaint, slerp
from runtime.cli import SHARED_FLAGS, Parser, add_shared_flags, asked_labels, guidance, is_student, number, script
from runtime.errors import UserError
from runtime.files import check_writable
from samplers import (
    DEFAULT_GUIDANCE,
    DEFAULT_SPACING,
    SAMPLERS,
    guide,
    image_noise,
    spaced_timesteps,
    uniform_timesteps,
)
from utils import autocast, get_device, pick_precision, save_gif, save_images

FILM_FRAMES, FILM_IMAGES = 40, 8
STEPS = {"inpaint": 50, "vary": 20, "interpolate": 20, "invert": 100}  # by default, of checkpoints with as many
SIDES = ("left", "right", "top", "bottom", "center")


def command_parser(*, prog: str, description: str, **_) -> Parser:
    """The parser of one command, as argparse asks for it."""
    parser = Parser(description)
    parser.prog = prog
    return parser


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=command_parser)
    few = SHARED_FLAGS["num_images"] | dict(type=number(int, 1, 1000), default=8)  # which are made all at once

    def command(name: str, text: str, takes_image: bool = True):
        sub = commands.add_parser(name, description=text, help=text)
        sub.add_argument("--checkpoint", required=True, help="a file that train.py wrote")
        sub.add_argument("--output", default=f"outputs/{name}.png", help="a .png file")
        sub.add_argument("--gif", action="store_true", help="also write the way there as a film beside the output")
        sub.add_argument("--steps", **SHARED_FLAGS["steps"] | dict(
            help=f"of the sampler, at most the checkpoint's T (default: {STEPS[name]}, or T where that is less)"))
        add_shared_flags(sub, "label")
        sub.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"] | dict(
            help="how strongly --label is asked for: 1 as learnt, more for clearer and less varied images (default: "
                 f"{DEFAULT_GUIDANCE})"))
        if takes_image:
            which = sub.add_mutually_exclusive_group()
            which.add_argument("--image", help="a picture of the model's size (default: one of the test split)")
            which.add_argument("--index", type=number(int, 0), help="which image of the test split (default: 0)")
            add_shared_flags(sub, "data_dir")
        add_shared_flags(sub, "device", "precision")
        return sub

    sub = command("inpaint", "fill in a part of a picture; what is known is kept exactly")
    sub.add_argument("--mask", default="left", help=f"what to fill in: {', '.join(SIDES)}, or a picture that is white "
                                                    f"there and black elsewhere")
    sub.add_argument("--resample", type=number(int, 1, 100), default=10,
                     help="how often each step is taken anew, so that the new part fits the old (RePaint)")
    sub.add_argument("--num_images", **few)
    add_shared_flags(sub, "seed")
    sub = command("vary", "variations of a picture: noise it a little, and denoise it (SDEdit)")
    sub.add_argument("--strength", type=number(float, 0.0, 1.0), default=0.6,
                     help="how much may change: 0 nothing, 1 everything")
    sub.add_argument("--num_images", **few)
    add_shared_flags(sub, "seed")
    sub = command("interpolate", "images between those of two seeds", takes_image=False)
    sub.add_argument("--seeds", type=number(int, 0, 2**63 - 1), nargs=2, default=[3, 8], metavar=("A", "B"),
                     help="the ends")
    sub.add_argument("--frames", type=number(int, 2, 1000), default=16, help="images, both ends included")
    command("invert", "the noise that leads to a picture, and the picture that it leads to (DDIM inversion)")
    args = parser.parse_args(argv)
    if Path(args.output).suffix != ".png":
        parser.error(f"--output must end in .png, not {args.output!r}")
    return args


def chosen_image(args, config: dict) -> Tensor:
    """The picture to change (1, C, H, W) in [-1, 1]."""
    if args.image:
        return to_model(read_picture(Path(args.image), config["shape"])[None])
    images, index = load_dataset(config["dataset"], "test", args.data_dir).images, args.index or 0
    if index >= len(images):
        raise UserError(f"--index must be less than {len(images)}, the size of the test split, not {index}")
    return to_model(images[index][None])


def chosen_mask(args, shape: Sequence[int]) -> Tensor:
    """Where to fill in: (1, 1, H, W), 1 there and 0 where the picture is kept."""
    height, width = shape[1:]
    if args.mask not in SIDES:
        if not Path(args.mask).is_file():
            raise UserError(f"--mask must be one of {', '.join(SIDES)}, or a picture; there is no file {args.mask}")
        return read_mask(Path(args.mask), height, width)
    rows, columns = slice(None), slice(None)
    if args.mask in ("left", "right"):
        columns = slice(0, width // 2) if args.mask == "left" else slice(width // 2, None)
    elif args.mask in ("top", "bottom"):
        rows = slice(0, height // 2) if args.mask == "top" else slice(height // 2, None)
    else:
        rows, columns = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)
    mask = torch.zeros(1, 1, height, width)
    mask[..., rows, columns] = 1
    return mask


class Studio:
    """A model ready to edit with, what it is to edit, and the frames of the film that shows how."""

    def __init__(self, args):
        self.args, device = args, get_device(args.device)
        self.model, self.diffusion, checkpoint = load_model(args.checkpoint, device)
        if is_student(checkpoint):
            raise UserError(f"{args.checkpoint} is a student, which only jumps from noise to images: edit with its "
                             f"teacher")
        self.config, self.frames = checkpoint["config"]["data"], []
        self.picture = chosen_image(args, self.config) if hasattr(args, "image") else None
        self.mask = chosen_mask(args, self.config["shape"]) if hasattr(args, "mask") else None
        args.steps = args.steps or min(STEPS[args.command], self.diffusion.num_timesteps)
        self.times = uniform_timesteps(self.diffusion.num_timesteps, args.steps)
        count = getattr(args, "num_images", getattr(args, "frames", 1))
        self.labels = asked_labels(args, self.model.num_classes, self.config["class_names"], count)
        if self.labels is None and args.guidance_scale not in (None, 1):
            raise UserError("--guidance_scale needs --label, the class to ask for")
        args.guidance_scale = guidance(args.guidance_scale, self.labels)
        self.denoise = self.denoiser()

    def denoiser(self, clip: bool = True):
        """The network as a sampler sees it, with --label and --guidance_scale if a label is asked for."""
        if self.labels is None:
            return self.diffusion.denoiser(self.model, clip=clip)
        return guide(self.diffusion, self.model, self.labels.to(self.diffusion.device), self.args.guidance_scale,
                     clip=clip)

    def noise(self, indices, seed: int):
        return image_noise(indices, seed, self.config["shape"], self.diffusion.device)

    def follow(self, trajectory, steps: int) -> Tensor:
        """The end of a trajectory; what it passes through becomes the film."""
        device = self.diffusion.device
        with autocast(device, pick_precision(self.args.precision, device)):
            for _, x, x_0_hat in tqdm(trajectory, total=steps, unit="step", desc=self.args.command, leave=False):
                self.frames.append((x[:FILM_IMAGES].cpu(), x_0_hat[:FILM_IMAGES].cpu()))
        return x.cpu()

    def film(self) -> list[Tensor]:
        """At most FILM_FRAMES of the frames, evenly spaced up to the last: x_t of each image beside its x_0_hat."""
        count, shown = len(self.frames), min(len(self.frames), FILM_FRAMES)
        return [torch.stack(self.frames[-(-count * (i + 1) // shown) - 1], 1).flatten(0, 1) for i in range(shown)]


def do_inpaint(args, studio: Studio) -> Tensor:
    """Picture, mask, what was known, then the ways to fill it in."""
    picture, mask = studio.picture, studio.mask
    randn = studio.noise(range(args.num_images), args.seed)
    device = studio.diffusion.device
    filled = studio.follow(inpaint(studio.denoise, randn(), studio.times, studio.diffusion, known=picture.to(device),
                                   mask=mask.to(device), resample=args.resample, randn=randn),
                           args.steps)
    return torch.cat([picture, mask.expand_as(picture) * 2 - 1, torch.where(mask.bool(), -0.5, picture), filled])


def do_vary(args, studio: Studio) -> Tensor:
    """The picture, then its variations."""
    picture = studio.picture
    many = picture.to(studio.diffusion.device).expand(args.num_images, -1, -1, -1)
    way_back = round(args.strength * studio.diffusion.num_timesteps)  # how many of the process's T times
    if not way_back:
        studio.frames = [(picture.expand_as(many), picture.expand_as(many))]
        return picture.expand(args.num_images + 1, -1, -1, -1)
    times = uniform_timesteps(way_back, min(args.steps, way_back))
    x = studio.diffusion.q_sample(many, times[0], studio.noise(range(args.num_images), args.seed)())
    varied = studio.follow(SAMPLERS["dpmpp_2m"](studio.denoise, x, times, studio.diffusion), len(times))
    return torch.cat([picture, varied])


def do_interpolate(args, studio: Studio) -> Tensor:
    """Image 0 of seed A, those between, image 0 of seed B."""
    first, last = (studio.noise([0], seed)() for seed in args.seeds)
    times = spaced_timesteps(studio.diffusion, args.steps, DEFAULT_SPACING["dpmpp_2m"])
    x = torch.cat([slerp(first, last, i / (args.frames - 1)) for i in range(args.frames)])
    images = studio.follow(SAMPLERS["dpmpp_2m"](studio.denoise, x, times, studio.diffusion), args.steps)
    studio.frames = [(image[None],) for image in images]  # the film is the walk, not the denoising
    return images


def do_invert(args, studio: Studio) -> Tensor:
    """Picture, its noise, and the picture that the noise leads to.

    Where the data hold no variation, such as the black margin of a digit, the noise is nearly 0 too.
    """
    picture = studio.picture
    denoise = studio.denoiser(clip=False)
    up = ddim_inversion(denoise, picture.to(studio.diffusion.device), studio.times, studio.diffusion)
    noise = studio.follow(up, args.steps)
    down = SAMPLERS["ddim"](denoise, noise.to(studio.diffusion.device), studio.times, studio.diffusion)
    back = studio.follow(down, args.steps)
    error = (to_uint8(back).float() - to_uint8(picture).float()).abs()
    print(f"Noise: mean {noise.mean():.3f}, standard deviation {noise.std():.3f} (0 and 1 for pure noise). "
          f"Reconstruction: mean error {error.mean():.2f} of 255 levels, largest {error.max():.0f}")
    return torch.cat([picture, noise / 3, back])


@script
def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output)
    studio = Studio(args)
    check_writable(output.parent)
    print(f"Using device: {studio.diffusion.device}")
    with torch.no_grad():
        do = {"inpaint": do_inpaint, "vary": do_vary, "interpolate": do_interpolate, "invert": do_invert}[args.command]
        pictures = do(args, studio)
    save_images(pictures, output, columns=min(len(pictures), 16), scale=4)
    print(f"Saved {output}")
    if args.gif:
        save_gif(studio.film(), output.with_suffix(".gif"))
        print(f"Saved {output.with_suffix('.gif')}")


if __name__ == "__main__":
    sys.exit(main())
