"""Change a picture with a trained model, or make the images between two pictures or two seeds.

    python edit.py inpaint --mask left
    python edit.py vary --checkpoint mnist --image my_digit.png --strength 0.6
    python edit.py vary --checkpoint mnist --label 7 --guidance_scale 2
    python edit.py interpolate --checkpoint outputs/model_final.pt --image two.png seven.png --gif
    python edit.py invert --checkpoint outputs/model_final.pt --index 5

inpaint, vary and invert take --image, or picture number --index of the test split (of the training split, where none
is held out), and write it beside the results. interpolate takes two pictures, or the images of two --seeds, and writes
the images between them. A picture may have any size. Without --label, no class is asked for.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import check_same_data, load_model
from data import code_of, load_dataset, to_uint8
from data_sources.pictures import read_mask, read_picture
from diffusion import Denoise
from editing import ddim_inversion, inpaint, slerp
from runtime.checkpoints import with_checkpoint
from runtime.errors import UserError
from runtime.files import check_inputs_stay, check_outputs
from runtime.parser import GUIDANCE_DEFAULTS, PRETRAINED_NAMES, SHARED_FLAGS, Parser, add_shared_flags, number
from runtime.progress import Bar
from runtime.sampling import can_be_guided, dataset_of, is_student, place_of_pictures, sampling_options
from runtime.script import script
from samplers import ddim, dpmpp_2m, expectations, guide, image_noise, sampler_timesteps, uniform_timesteps
from utils import autocast, check_grid, evenly_spaced, get_device, pick_precision, save_gif, save_images, time_titles

FILM_FRAMES, FILM_IMAGES = 40, 8
MEAN_IMAGES = 32  # x_0_hat of as many noises gives the mean of the model's images
DEFAULT_SEEDS = [14, 17]  # of interpolate: with a network of ten minutes on MNIST a 7 that becomes a 9 and then a 4
READ_AS_IN_TRAINING = ("fit", "background")  # flags that say how a picture is read
DEFAULT_STEPS = {"inpaint": 50, "vary": 20, "interpolate": 20, "invert": 100}
SIDES = ("left", "right", "top", "bottom", "center")


def command_parser(*, prog: str, description: str, **_) -> Parser:
    """The parser of one command, as argparse asks for it."""
    parser = Parser(description)
    parser.prog = prog
    return parser


def parse_args(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=command_parser)
    few = SHARED_FLAGS["num_images"] | dict(type=number(int, 1, 1000), default=8)  # all are made at the same time
    sub = add_command(commands, "inpaint", "fill in a part of a picture; the rest is kept exactly")
    sub.add_argument("--mask", default="left", help=f"the part to fill in: {', '.join(SIDES)}, or a picture that is "
                                                    f"white there and black elsewhere")
    sub.add_argument("--resample", type=number(int, 1, 100), default=10,
                     help="take each step N times, so that the new part fits the rest (RePaint)")
    sub.add_argument("--num_images", **few)
    add_shared_flags(sub, "seed")
    sub = add_command(commands, "vary", "variations of a picture: add some noise and denoise it (SDEdit)")
    sub.add_argument("--strength", type=number(float, 0.0, 1.0), default=0.6,
                     help="how much of the picture may change, from 0 (nothing) to 1 (everything)")
    sub.add_argument("--num_images", **few)
    add_shared_flags(sub, "seed")
    sub = add_command(commands, "interpolate", "the images between two pictures, or between those of two seeds",
                      pictures=2)
    sub.add_argument("--frames", type=number(int, 2, 1000), default=16, help="the number of images, both ends included")
    add_command(commands, "invert", "the noise that leads to a picture, and the picture that it leads to (DDIM "
                                    "inversion)")
    args = parser.parse_args(argv)
    if Path(args.output).suffix != ".png":
        parser.error(f"--output must end in .png, not {args.output!r}")
    read = [args.image and "--image", getattr(args, "mask", SIDES[0]) not in SIDES and "--mask"]
    for name in {"fit", "background", "invert_colors"} & commands.choices[args.command].typed:
        if not any(read if name == "fit" else read[:1]):
            parser.error(f"--{name} needs --image{', or a --mask from a file' if name == 'fit' else ''}: it sets how a "
                         f"picture is read")
    return args


def add_command(commands, name: str, text: str, pictures: int = 1) -> Parser:
    """The parser of a command, with the flags that all commands share."""
    sub = commands.add_parser(name, description=text, help=text)
    sub.add_argument("--checkpoint", help="a file of train.py, or a pretrained model by its name: "
                                          f"{PRETRAINED_NAMES} (default: the newest model_final.pt of train.py below "
                                          "outputs/, else mnist)")
    sub.add_argument("--output", default=f"outputs/{name}.png", help="the .png file to write")
    sub.add_argument("--gif", action="store_true", help="also write an animation of the steps beside the output")
    sub.add_argument("--columns", **SHARED_FLAGS["columns"] | dict(help="pictures in a row (default: 16)"))
    sub.add_argument("--scale", **SHARED_FLAGS["scale"] | dict(help="each pixel of a picture is drawn N×N large "
                                                                    "(default: 4)"))
    sub.add_argument("--steps", **SHARED_FLAGS["steps"] | dict(
        help=f"the number of steps of the sampler, at most the checkpoint's T (default: {DEFAULT_STEPS[name]}"
             f"{', with --image ' + str(DEFAULT_STEPS['invert']) if pictures == 2 else ''}, or T if that is less)"))
    add_shared_flags(sub, "label")
    sub.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"] | dict(
        help="the strength of the guidance by --label: 1 is none, more gives clearer and less varied images (default: "
             f"{GUIDANCE_DEFAULTS})"))
    which = sub.add_mutually_exclusive_group()
    if pictures == 2:
        which.add_argument("--image", nargs=2, metavar=("A", "B"),
                           help="the first and the last picture, files of any size; between the noises that lead to "
                                "them (DDIM inversion) lies the noise of the other images")
        which.add_argument("--seeds", type=number(int, 0, 2**63 - 1), nargs=2, default=DEFAULT_SEEDS,
                           metavar=("A", "B"), help="the seeds of the first and the last image (default: "
                                                   f"{' '.join(map(str, DEFAULT_SEEDS))})")
    else:
        which.add_argument("--image", help="a picture, a file of any size (default: one of the test split, or of the "
                                          "training split where no picture is held out)")
        which.add_argument("--index", type=number(int, 0), help="take the image of that split with this number "
                                                                "(default: 0)")
        add_shared_flags(sub, "data_dir")
    for flag in READ_AS_IN_TRAINING:
        shared = SHARED_FLAGS[flag]
        sub.add_argument(f"--{flag}", **shared | dict(default=None, help=(
            f"{shared['help']} (default: as in the training, else {shared['default']})")))
    sub.add_argument("--invert_colors", action="store_true",
                     help="turn dark into light in --image: for a dark drawing on light paper and a model of light "
                          "digits on a dark ground")
    add_shared_flags(sub, "device", "precision")
    return sub


def read_image(args, path: str, shape: Sequence[int]) -> Tensor:
    """The picture at `path` as the flags say (1, C, H, W) uint8."""
    picture = read_picture(Path(path), shape, args.fit, args.background)[None]
    return 255 - picture if args.invert_colors else picture


def chosen_images(args, checkpoint: dict) -> Tensor:
    """The pictures to change (1 or 2, C, H, W) uint8."""
    if args.image:
        paths = [args.image] if isinstance(args.image, str) else args.image
        return torch.cat([read_image(args, path, checkpoint["config"]["data"]["shape"]) for path in paths])
    source, index = dataset_of(checkpoint, args.data_dir), args.index or 0
    split = next(split for split in ("test", "train") if len(load_dataset(source, split, args.data_dir).images))
    data = load_dataset(source, split, args.data_dir)
    check_same_data(checkpoint["config"], data)
    if index >= len(data.images):
        raise UserError(f"--index must be less than {len(data.images)}, the size of the {split} split, not {index}")
    return data.images[index][None]


def chosen_mask(args, shape: Sequence[int]) -> Tensor:
    """The mask (1, 1, H, W): 1 where the picture is filled in, 0 where it is kept."""
    height, width = shape[1:]
    if args.mask not in SIDES:
        if not Path(args.mask).is_file():
            raise UserError(f"--mask must be one of {', '.join(SIDES)}, or a picture; there is no file {args.mask}")
        return read_mask(Path(args.mask), height, width, args.fit)
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


class Editor:
    """A model with the picture, the mask, the labels and the times of one command, and the frames of its animation."""

    def __init__(self, args: Namespace):
        device = get_device(args.device)
        self.model, self.diffusion, checkpoint = load_model(args.checkpoint, device)
        config, num_timesteps = checkpoint["config"], self.diffusion.num_timesteps
        trained = config["data"].get("pictures", {})
        args = self.args = Namespace(**vars(args) | {
            name: getattr(args, name) or trained.get(name, SHARED_FLAGS[name]["default"])
            for name in READ_AS_IN_TRAINING})
        if is_student(config):
            raise UserError(f"{args.checkpoint} is a student, which only makes images from pure noise: edit with its "
                            f"teacher")
        self.place_of_pictures = place_of_pictures(checkpoint)
        self.shape, self.frames, self.titles = config["data"]["shape"], [], []  # a title for each frame
        self.code, self.knows_all = code_of(config), not self.model.num_classes or can_be_guided(config)
        self.mask = chosen_mask(args, self.shape) if hasattr(args, "mask") else None
        self.picture = chosen_images(args, checkpoint) if args.image or hasattr(args, "index") else None  # uint8
        command = "invert" if args.command == "interpolate" and args.image else args.command
        steps = args.steps or min(DEFAULT_STEPS[command], num_timesteps)
        if command == "invert" and num_timesteps < 2:
            raise UserError(f"{args.checkpoint} has only one timestep, and a picture is not turned into noise in a "
                            f"single step: train one with python train.py --timesteps 1000")
        if command == "invert" and steps < 2:
            raise UserError("a picture is not turned into noise in a single step: give --steps 2 or more")
        options = sampling_options(config, Namespace(**vars(args) | dict(steps=steps)), self.count, label_all=False)
        self.steps, self.labels, self.guidance_scale = steps, options["labels"], options["guidance_scale"]
        self.times = uniform_timesteps(num_timesteps, steps)

    @property
    def count(self) -> int:
        """The number of images that are made at the same time."""
        return getattr(self.args, "num_images", getattr(self.args, "frames", 1))

    @property
    def x_0(self) -> Tensor:
        """The picture as the model learns it (1 or 2, C, H, W) in [-1, 1], on its device."""
        return self.code.encode(self.picture).to(self.diffusion.device)

    def denoiser(self, clip: bool = True, ends: bool = False) -> Denoise:
        """denoise(x_t, t) -> x_0_hat of the network for all images or the two `ends`; guided if --label is given."""
        if self.labels is None:
            return self.diffusion.denoiser(self.model, clip=clip)
        labels = (self.labels[[0, -1]] if ends else self.labels).to(self.diffusion.device)
        return guide(self.diffusion, self.model, labels, self.guidance_scale, clip=clip)

    @torch.no_grad()
    def looks_negative(self) -> list[bool]:
        """Whether the negative of each picture is clearly closer to the mean of the model's images than the picture.

        Not asked of a network that knows no images without labels.
        """
        if not self.knows_all:
            return [False] * len(self.picture)
        noise = self.noise(range(MEAN_IMAGES), 0)()
        x_0_hat = self.diffusion.denoiser(self.model)(noise, self.diffusion.num_timesteps - 1)
        mean = self.code.decode(x_0_hat).float().mean(0).cpu()
        as_it_is, negative = ((picture - mean).square().flatten(1).mean(1)
                              for picture in (self.picture, 255 - self.picture))
        return (as_it_is > 2 * negative).tolist()

    def noise(self, indices, seed: int):
        return image_noise(indices, seed, self.shape, self.diffusion.device)

    def follow(self, trajectory: Iterator, steps: int) -> Tensor:
        """The last images of a trajectory, on the CPU; for --gif all its steps become frames."""
        device, times = self.diffusion.device, []
        with (autocast(device, pick_precision(self.args.precision, device)),
              Bar(self.args.command, steps, "steps") as bar):
            for t, x, x_0_hat in expectations(bar.track(trajectory)):
                if self.args.gif:  # copies: a view would keep all images of each step
                    self.frames.append(tuple(part[:FILM_IMAGES].cpu().clone() for part in (x, x_0_hat)))
                    times.append(t)
        self.titles += time_titles(times)
        return x.cpu()

    def film(self) -> tuple[list[Tensor], list[str]]:
        """At most FILM_FRAMES frames, uint8, evenly spaced from the first to the last, and their captions.

        A frame is x_t of each image beside its x_0_hat.
        """
        shown = evenly_spaced(len(self.frames), FILM_FRAMES)
        return [self.code.decode(torch.stack(self.frames[i], 1).flatten(0, 1)) for i in shown], [
            self.titles[i] for i in shown]


def numbered(*names: str, count: int) -> list[str]:
    """The captions `names`, and then the numbers of `count` results."""
    return [*names, *(str(i + 1) for i in range(count))]


def chequered(height: int, width: int) -> Tensor:
    """The usual sign for "nothing is here": squares of two greys, neither of which is that of the grid (H, W) uint8."""
    rows, columns = torch.arange(height)[:, None] // 2, torch.arange(width) // 2
    return (191 - 63 * ((rows + columns) % 2)).to(torch.uint8)


def do_inpaint(args: Namespace, editor: Editor) -> tuple[Tensor, list[str]]:
    """The picture, the mask, what is kept, and then the filled-in pictures; and their captions."""
    picture, mask = editor.picture, editor.mask
    randn = editor.noise(range(args.num_images), args.seed)
    filled = editor.follow(inpaint(editor.denoiser(), randn(), editor.times, editor.diffusion,
                                   known=editor.x_0, mask=mask.to(editor.x_0.device), resample=args.resample,
                                   randn=randn), editor.steps)
    kept = torch.where(mask.bool(), chequered(*picture.shape[2:]), picture)
    return (torch.cat([picture, (mask.expand_as(picture) * 255).to(torch.uint8), kept, editor.code.decode(filled)]),
            numbered("picture", "mask", "kept", count=args.num_images))


def do_vary(args: Namespace, editor: Editor) -> tuple[Tensor, list[str]]:
    """The picture, then its variations; and their captions."""
    picture = editor.picture
    many = editor.x_0.expand(args.num_images, -1, -1, -1)
    captions = numbered("picture", count=args.num_images)
    noised_steps = round(args.strength * editor.diffusion.num_timesteps)
    if not noised_steps:
        editor.frames, editor.titles = [(many.cpu(), many.cpu())], ["image"]
        return picture.expand(args.num_images + 1, -1, -1, -1), captions
    times = uniform_timesteps(noised_steps, min(editor.steps, noised_steps))
    x = editor.diffusion.q_sample(many, times[0], editor.noise(range(args.num_images), args.seed)())
    varied = editor.follow(dpmpp_2m(editor.denoiser(), x, times, editor.diffusion), len(times))
    return torch.cat([picture, editor.code.decode(varied)]), captions


def do_interpolate(args: Namespace, editor: Editor) -> tuple[Tensor, list[str]]:
    """The images whose noise lies between that of two ends: the pictures A and B, or image 0 of the seeds A and B.

    Noise is found and followed by ddim for pictures, whose ends come back only so; for seeds by sample.py's sampler.
    """
    if editor.picture is not None:
        up = ddim_inversion(editor.denoiser(clip=False, ends=True), editor.x_0, editor.times, editor.diffusion)
        ends, times, sampler = editor.follow(up, editor.steps).to(editor.diffusion.device), editor.times, ddim
    else:
        ends = torch.cat([editor.noise([0], seed)() for seed in args.seeds])
        times, sampler = sampler_timesteps(editor.diffusion, "dpmpp_2m", editor.steps), dpmpp_2m
    x = torch.cat([slerp(ends[:1], ends[1:], i / (args.frames - 1)) for i in range(args.frames)])
    images = editor.follow(sampler(editor.denoiser(clip=sampler is dpmpp_2m), x, times, editor.diffusion), editor.steps)
    first, last = ("A", "B") if args.image else (f"seed {seed}" for seed in args.seeds)
    captions = [first, *(f"{i / (args.frames - 1):.2f}" for i in range(1, args.frames - 1)), last]
    editor.frames, editor.titles = [(image[None],) for image in images], captions  # the animation goes from A to B
    return editor.code.decode(images), captions


def do_invert(args: Namespace, editor: Editor) -> tuple[Tensor, list[str]]:
    """The picture, its noise, and the picture that the noise leads to; and their captions.

    Where the data do not vary, such as the black margin of a digit, the noise is near 0 too.
    """
    denoise = editor.denoiser(clip=False)
    noise = editor.follow(ddim_inversion(denoise, editor.x_0, editor.times, editor.diffusion), editor.steps)
    down = ddim(denoise, noise.to(editor.x_0.device), editor.times, editor.diffusion)
    back = editor.code.decode(editor.follow(down, editor.steps))
    error = (back.float() - editor.picture.float()).abs()
    print(f"Noise: mean {noise.mean():.3f}, standard deviation {noise.std():.3f} (0 and 1 for pure noise). "
          f"Reconstruction: mean error {error.mean():.2f} of 255 levels, largest {error.max():.0f}")
    return torch.cat([editor.picture, to_uint8(noise / 3), back]), ["picture", "its noise / 3", "from the noise"]


def tell_of_pictures(args: Namespace, paths: Sequence[str], editor: Editor) -> None:
    """Print a line for each picture that has one colour, or that is light where the model's images are dark."""
    for path, picture, negative in zip(paths, editor.picture, editor.looks_negative(), strict=True):
        if picture.min() == picture.max():
            print(f"Note: {path} has one colour everywhere; transparent parts are shown on --background "
                  f"{args.background}")
        elif negative:
            what = "leave out" if args.invert_colors else "add"
            print(f"Note: {path} looks like a negative of what this model makes (dark where that is light): if so, "
                  f"{what} --invert_colors")


@script
def main(argv=None):
    args = with_checkpoint(parse_args(argv), students=False)
    output = Path(args.output)
    paths = [args.image] if isinstance(args.image, str) else args.image or []
    outputs = [output, output.with_suffix(".gif")] if args.gif else [output]
    mask = None if getattr(args, "mask", SIDES[0]) in SIDES else args.mask
    check_inputs_stay(outputs, [args.checkpoint, *paths, mask])
    editor = Editor(args)
    check_outputs(outputs, [editor.place_of_pictures])
    check_grid((editor.count + 3, *editor.shape), args.columns or 16, args.scale or 4)
    print(f"Using device: {editor.diffusion.device}")
    if args.image:
        tell_of_pictures(editor.args, paths, editor)
    with torch.no_grad():
        do = {"inpaint": do_inpaint, "vary": do_vary, "interpolate": do_interpolate, "invert": do_invert}[args.command]
        pictures, captions = do(args, editor)
    save_images(pictures, output, args.columns or min(len(pictures), 16), args.scale or 4, captions)
    print(f"Saved {output}")
    if args.gif:
        frames, captions = editor.film()
        save_gif(frames, output.with_suffix(".gif"), captions=captions)
        print(f"Saved {output.with_suffix('.gif')}")


if __name__ == "__main__":
    sys.exit(main())
