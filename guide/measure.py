"""The measurements of GUIDE.md: each writes its figures to guide/measured/.

    python -m guide.measure order
    python -m guide.measure targets errors costs spoiled forward guidance

    forward    the digits that the pictures of the first chapters show
    targets    points learned with each prediction and each choice of times
    errors     the error of x_0_hat of the pretrained network at each time
    guidance   points of one moon at several guidance scales
    order      the error of each sampler against the exact path
    spoiled    what each figure says of real images that were spoiled
    costs      the work and the memory of a training step
    edits      the pictures of edited digits
    symptoms   samples of runs that fail on purpose

On two cores `targets` takes about four minutes; each of the others takes less than one.
"""

import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import edit
import sample
import train
from checkpoint import load_model
from data import code_of, load_dataset
from data_sources.points import CENTRE_STD, CENTRES, POINT_SHAPE
from diffusion import PREDICTIONS, DiffusionProcess
from evaluation.classifier import load_feature_network
from evaluation.copies import FEW
from evaluation.features import extract_features
from evaluation.metrics import figures
from evaluation.mixture import Mixture
from guide import results
from guide.experiments import check
from guide.quality import POINTS, energy_distance, point_figures
from models import create_model
from runtime.errors import UserError
from runtime.files import quoted
from runtime.parser import Parser, add_shared_flags, number
from runtime.script import script
from samplers import SAMPLERS, final_image, generate, image_noise, spaced_timesteps
from training.sizing import network_stages
from utils import save_images

SEEDS = (0, 1, 2)
GUIDANCE_SCALES, NEAR, SHOWN_POINTS = (0, 1, 2, 4), 0.03, 300
WIDTHS = (24, 32, 48, 64)
NOISE_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # sigma/alpha
DIGITS = (0, 1, 2, 4)  # of MNIST's test split: 7, 2, 1, 4


def forward(args) -> list[int]:
    """Four test digits, which guide/figures.py makes noisy."""
    data = load_dataset("mnist", "test", args.data_dir)
    save_images(data.images[list(DIGITS)], Path(args.folder) / "digits.png", columns=len(DIGITS), scale=1)
    return data.labels[list(DIGITS)].tolist()


# ---------------------------------------------------------------------------------------------------------- training


def learn_points(folder: Path, *flags: str, seed: int, epochs: int, dataset: str = "spirals") -> tuple[float, float]:
    """(validation loss, quality) of points learned with some flags."""
    common = ["--threads", "1", "--output_dir", str(folder)]
    check(train.main(["--dataset", dataset, "--epochs", str(epochs), "--sample_interval", "0", "--save_interval", "0",
                      "--seed", str(seed), *flags, *common]), f"the training {folder}")
    model, checkpoint = folder / "model_final.pt", load_model(folder / "model_final.pt", points=True)[2]
    points = folder / "points.npz"
    check(sample.main(["--checkpoint", str(model), "--num_images", str(POINTS), "--steps", "20", "--guidance_scale",
                       "1", "--batch_size", str(POINTS), "--output", str(points), "--threads", "1"]),
          f"the sampling of {model}")
    losses = [each["val_loss"] for each in checkpoint["history"]["records"] if each.get("val_loss") is not None]
    return losses[-1], point_figures(points, dataset)["distance"]


def targets(args) -> list[dict]:
    """The loss and the quality of spirals learned with each prediction and, for edm, with uniform times."""
    rows = []
    for prediction in PREDICTIONS:
        for times in ("lognormal", "uniform") if prediction == "edm" else ("lognormal",):
            flags, folder = ("--prediction", prediction, "--timestep_sampling", times), Path("outputs/guide/targets")
            runs = [learn_points(folder, *flags, seed=seed, epochs=args.epochs) for seed in SEEDS]
            losses, distances = zip(*runs, strict=True)
            rows.append(dict(prediction=prediction, times=times, val_loss=statistics.mean(losses),
                             distance=statistics.mean(distances), spread=statistics.stdev(distances)))
    return rows


def errors(args) -> list[dict]:
    """The root mean squared error of three guesses of x_0 at each noise level, on validation images of MNIST."""
    model, diffusion, checkpoint = load_model("models/pretrained/mnist.pt")
    data = load_dataset("mnist", "validation", args.data_dir).first(args.images)
    data = data.coded(code_of(checkpoint["config"]))
    x_0, rows = data.x_0(), []
    denoise = torch.no_grad()(diffusion.denoiser(model, data.labels))
    noise = image_noise(range(len(x_0)), 0, x_0.shape[1:])()
    for level in NOISE_LEVELS:
        t = diffusion.time_of(-2 * torch.tensor(level).log().item())
        x_t = diffusion.q_sample(x_0, t, noise)
        guesses = dict(network=denoise(x_t, t), as_it_is=(x_t / diffusion.alpha(t)).float(),
                       mean_image=x_0.mean(0, keepdim=True).expand_as(x_0))
        rows.append(dict(noise=level, t=t, **{name: F.mse_loss(guess, x_0).sqrt().item()
                                              for name, guess in guesses.items()}))
    return rows


# ---------------------------------------------------------------------------------------------------------- sampling


def guidance(args) -> list[dict]:
    """Points of the upper moon at several guidance scales, beside the real ones.

    distance: 1,000 times the energy distance; near: the share that lies within NEAR of a real point of this moon;
    covered: the share of real points of this moon that have a generated one so near.
    """
    folder = Path("outputs/guide/guidance")
    learn_points(folder, seed=0, epochs=4 * args.epochs, dataset="moons")
    data = load_dataset("moons", "test", args.data_dir, points=True)
    real, rows = data.images[data.labels == 0].flatten(1)[:args.images], []
    model, diffusion, _ = load_model(folder / "model_final.pt", points=True)
    labels = torch.zeros(len(real), dtype=torch.long)
    for scale in GUIDANCE_SCALES:
        [(_, trajectory)] = generate(model, diffusion, POINT_SHAPE, range(len(real)), steps=30, labels=labels,
                                     guidance_scale=scale, batch_size=len(real))
        made = final_image(trajectory).flatten(1)
        gaps = torch.cdist(made, real)
        rows.append(dict(scale=scale, distance=1000 * energy_distance(made, real),
                         near=(gaps.amin(1) < NEAR).float().mean().item(),
                         covered=(gaps.amin(0) < NEAR).float().mean().item(),
                         points=[[round(x, 3) for x in point] for point in made[:SHOWN_POINTS].tolist()]))
    return rows


def order(args) -> list[dict]:
    """The mean distance of points to where the exact path from the same noise ends, for eight Gaussians."""
    mixture = Mixture(torch.from_numpy(CENTRES)[:, :, None, None], CENTRE_STD)
    diffusion = DiffusionProcess(schedule="cosine", data_std=0.5)
    denoise, x_T = mixture.denoiser(diffusion), image_noise(range(args.images), 0, POINT_SHAPE)().double()

    def ends(sampler: str, steps: int) -> Tensor:
        times = spaced_timesteps(diffusion, steps, "log_snr")
        return final_image(SAMPLERS[sampler].function(denoise, x_T, times, diffusion)).flatten(1)

    exact, rows = ends("heun", 1000), []
    for sampler in ("ddim", "dpmpp_2m", "ipndm", "heun"):
        for steps in (5, 10, 20, 40, 80, 160):
            evaluations = 2 * steps - 1 if sampler == "heun" else steps
            distance = (ends(sampler, steps) - exact).norm(dim=1).mean().item()
            rows.append(dict(sampler=sampler, steps=steps, evaluations=evaluations, distance=distance))
    return rows


# ----------------------------------------------------------------------------------------------------------- judging

SPOILS: dict[str, Callable[[Tensor], Tensor]] = {  # uint8 images (N, C, H, W) -> spoiled ones
    "real images": lambda x: x,
    "a haze of 0 to 3 levels": lambda x: (x.int() + torch.randint(0, 4, x.shape)).clamp(max=255).to(torch.uint8),
    "blurred": lambda x: F.avg_pool2d(F.pad(x.float(), (1, 1, 1, 1)), 3, 1).to(torch.uint8),
    "shifted by two pixels": lambda x: x.roll(2, dims=-1),
    "half of them noise": lambda x: torch.where(torch.arange(len(x))[:, None, None, None] % 2 == 0, x,
                                                torch.randint(0, 256, x.shape, dtype=torch.uint8)),
    "ten images, again and again": lambda x: x[:10].repeat(len(x) // 10 + 1, 1, 1, 1)[:len(x)],
}
SHOWN = ("frechet_distance", "precision", "recall", "levels")


def spoiled(args) -> list[dict]:
    """The figures of real images that were spoiled, compared with other real images; the last row: training images."""
    torch.manual_seed(0)
    if args.images < FEW:
        raise UserError(f"spoiled needs --images {FEW} or more, not {args.images}")
    reference = load_dataset("mnist", "test", args.data_dir).images[:5 * args.images]
    images = load_dataset("mnist", "validation", args.data_dir).images[:args.images]
    copies = load_dataset("mnist", "train", args.data_dir).images[:args.images]
    classifier = load_feature_network("mnist", torch.device("cpu"))
    real, rows = extract_features(reference, classifier), []
    for name, made in {**{name: spoil(images) for name, spoil in SPOILS.items()}, "training images": copies}.items():
        found = figures(extract_features(made, classifier), real, images=(made, reference))
        rows.append(dict(name=name, images=len(made), **{figure: found[figure]["value"] for figure in SHOWN}))
    return rows


# ------------------------------------------------------------------------------------------------------------- costs


def costs(args) -> list[dict]:
    """Parameters, multiplications of a training step, and bytes kept for the backward pass, for one image.

    The networks are those that train.py makes for images of this size.
    """
    rows = []
    for size, channels, patch in ((28, 1, 2), (32, 3, 1), (32, 3, 2), (64, 3, 2), (64, 3, 4), (128, 3, 4)):
        stages = network_stages((channels, size, size), patch)["channel_mults"]
        for width in WIDTHS:
            model = create_model(image_channels=channels, base_channels=width, middle_depth=3, patch_size=patch,
                                 channel_mults=stages, num_classes=10)
            x, kept = torch.randn(1, channels, size, size), {}

            def keep(tensor: Tensor, kept=kept) -> Tensor:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor
            with FlopCounterMode(display=False) as counter:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    loss = model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long)).square().mean()
                loss.backward()
            weights = {parameter.data_ptr() for parameter in model.parameters()}
            rows.append(dict(size=size, channels=channels, patch_size=patch, width=width,
                             parameters=sum(p.numel() for p in model.parameters()),
                             multiplications=counter.get_total_flops() // 2,
                             kept=sum(count for place, count in kept.items() if place not in weights)))
    return rows


# ---------------------------------------------------------------------------------------------------------- pictures

EDITS = {"inpaint": "--index 3 --mask left --num_images 6", "vary": "--index 1 --strength 0.6 --num_images 6",
         "interpolate": "--seeds 3 4"}
SHORT_RUN = "--dataset glyphs --base_channels 16 --patch_size 4 --train_images 1280 --epochs 1"
FAILURES = {"untrained": "--lr 0 --muon_lr 0", "grey": "--lr 0 --muon_lr 0 --prediction x0",
            "diverged": "--optimizer adamw --lr 1000 --max_grad_norm 1e9", "noise": ""}
MISUSES = {"blobs": "--steps 1", "guided": "--guidance_scale 20"}


def picture(module, argv: str, path: Path) -> str:
    """Make a picture with a script; returns the command. RunFailed if it fails."""
    command = f"{Path(module.__file__).name} {argv}"
    check(module.main([*shlex.split(argv), "--output", str(path)]), command)
    return f"python {command}"


def edits(args) -> list[str]:
    """The pictures of chapter 8; returns the commands."""
    place = f" --data_dir {quoted(args.data_dir)}"  # of the pictures that --index counts
    return [picture(edit, f"{name} --checkpoint mnist {flags} --scale 2{place if '--index' in flags else ''}",
                    Path(args.folder) / f"{name}.png") for name, flags in EDITS.items()]


def symptoms(args) -> list[str]:
    """The pictures of chapter 10, sixteen samples each; returns the commands."""
    commands, row = [], "--num_images 16 --columns 16 --scale 1"
    for name, flags in FAILURES.items():
        folder = Path("outputs/guide") / name
        place = ["--output_dir", str(folder), "--data_dir", args.data_dir]
        check(train.main([*SHORT_RUN.split(), *flags.split(), *place]), f"the training {folder}")
        commands += [f"python train.py {SHORT_RUN} {flags}",
                     picture(sample, f"--checkpoint {folder}/model_final.pt {row}", Path(args.folder) / f"{name}.png")]
    return commands + [picture(sample, f"--checkpoint mnist {flags} {row}", Path(args.folder) / f"{name}.png")
                       for name, flags in MISUSES.items()]


MEASUREMENTS: dict[str, Callable] = dict(forward=forward, targets=targets, errors=errors, guidance=guidance,
                                         order=order, spoiled=spoiled, costs=costs, edits=edits, symptoms=symptoms)


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="+", choices=tuple(MEASUREMENTS), help="what to measure")
    parser.add_argument("--epochs", type=number(int, 1), default=5,
                        help="the passes of a training, for targets; guidance takes four times as many")
    parser.add_argument("--images", type=number(int, 4), default=500,
                        help="for errors, guidance, order and spoiled: how many")
    parser.add_argument("--folder", default=str(results.MEASURED), help="the folder to write to")
    add_shared_flags(parser, "data_dir")
    return parser.parse_args(argv)


@script
def main(argv=None):
    args = parse_args(argv)
    typed = [word for word in (sys.argv[1:] if argv is None else argv) if word not in args.names]
    for name in args.names:
        command = shlex.join(["python", "-m", "guide.measure", name, *typed])
        path = results.write(name, command, MEASUREMENTS[name](args), Path(args.folder))
        print(f"Saved {path}")


if __name__ == "__main__":
    sys.exit(main())
