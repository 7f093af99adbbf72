"""What a training run can be asked for: the recipes, the flags of train.py, and those of a run that goes on."""

import shlex
from argparse import BooleanOptionalAction
from pathlib import Path

import torch

from diffusion import LOSS_WEIGHTS, PREDICTIONS, SCHEDULES, TIMESTEP_SAMPLING
from models.layers import ACTIVATIONS
from runtime import distributed
from runtime.cli import SHARED_FLAGS, Parser, add_shared_flags, duration, number
from runtime.errors import UserError
from training.autotune import LAYOUTS
from training.trainer import LR_SCHEDULES

# A recipe is nothing but defaults, which flags override. What they give, and why: README.md and benchmarks/RECORDS.md.
RECIPES = {
    "fast": dict(schedule="cosine", prediction="edm", timestep_sampling="lognormal",
                 base_channels=None, patch_size=2, middle_depth=3, batch_size=128, optimizer="muon", lr=2e-3,
                 lr_schedule="cosine", warmup=0.02, precision="auto", conditional=True),
    # The textbook (Ho et al. 2020) as small toolkits have it: full resolution, no tricks.
    "ddpm": dict(schedule="linear", prediction="eps", timestep_sampling="uniform", base_channels=64, patch_size=1,
                 middle_depth=1, batch_size=128, optimizer="adamw", lr=2e-4, lr_schedule="constant", warmup=0.0,
                 precision="fp32", conditional=False),
}

# (noise_mean, noise_std) for each data set: that of digits is decided at higher noise than that of clothes. Measured:
# benchmarks/RECORDS.md; those of cifar10 are Karras et al. 2022, table 1.
NOISE_LEVELS = {"mnist": (0.7, 0.9), "glyphs": (0.7, 0.9), "fashion_mnist": (0.0, 1.2), "cifar10": (-0.5, 1.2)}


def batch_size(text: str) -> int | str:
    """A parser of flags' values: a whole number from 1 up, or auto."""
    return text if text == "auto" else number(int, 1)(text)


def make_parser(description: str) -> Parser:
    """The flags of train.py, with the fast recipe's defaults."""
    parser = Parser(description)
    group = parser.add_argument_group("run")
    group.add_argument("--recipe", choices=tuple(RECIPES), default="fast",
                       help="defaults of other flags: fast, the best that we know; ddpm, the textbook")
    add_shared_flags(group, "dataset", "data_dir", "output_dir", "device", "precision", "seed")
    group.add_argument("--layout", choices=("auto", *LAYOUTS),
                       help="of images in memory; auto takes what is faster on this machine (default: auto where "
                            "--precision is, else nchw)")
    group.add_argument("--compile", action=BooleanOptionalAction,
                       help="compile the network, for about a minute; on CUDA a step is one CUDA graph anyway, unless "
                            "--no-compile (default: on CUDA, for a --budget of ten minutes or more)")
    group.add_argument("--epochs", type=number(int, 1),
                       help="passes over the training images (default: 20, or what --budget allows)")
    group.add_argument("--budget", type=duration, metavar="TIME",
                       help="wall-clock time for everything, start-up, saving and (with --resume) earlier sittings "
                            "included: 90s, 10m, 1.5h")
    group.add_argument("--train_images", type=number(int, 1), help="learn from the first N training images only")
    group.add_argument("--sample_interval", type=number(int, 0), default=1,
                       help="epochs between two grids of samples; 0: none")
    group.add_argument("--save_interval", type=number(int, 0), default=5,
                       help="epochs between two checkpoints; 0: only model_final.pt")
    group.add_argument("--checkpoint_minutes", type=number(float, 0), default=5.0,
                       help="minutes between two checkpoints within the epochs; 0: none")
    group.add_argument("--keep_checkpoints", type=number(int, 1), default=5,
                       help="how many files checkpoints/ holds; those of --checkpoint_minutes go first, then the "
                            "oldest")
    group.add_argument("--resume", action="store_true",
                       help="go on from the newest valid checkpoint in --output_dir, with the flags of its run but for "
                            "--output_dir, --data_dir and --device; flags given anew override them, and --epochs and "
                            "--budget count from the beginning of the run")
    group = parser.add_argument_group("diffusion process")
    group.add_argument("--timesteps", type=number(int, 1, 100_000), default=1000, help="T, the number of noising steps")
    group.add_argument("--schedule", choices=SCHEDULES, help="how the noise grows")
    group.add_argument("--prediction", choices=tuple(PREDICTIONS), help="what the network predicts")
    group.add_argument("--timestep_sampling", choices=TIMESTEP_SAMPLING,
                       help="which t are trained on")
    group.add_argument("--noise_mean", type=number(float, -10, 10),
                       help="mean of log(sigma / alpha / std of the data) under --timestep_sampling lognormal "
                            "(default: the data set's own, in training/flags.py)")
    group.add_argument("--noise_std", type=number(float, 0.01, 10),
                       help="and its standard deviation (default: the data set's own)")
    group.add_argument("--loss_weight", choices=LOSS_WEIGHTS, default="target",
                       help="min_snr: the error of x_0 counts min(SNR, snr_gamma)")
    group.add_argument("--snr_gamma", type=number(float, 1e-6), default=5.0, help="of --loss_weight min_snr")
    group.add_argument("--zero_terminal_snr", action=BooleanOptionalAction, default=False,
                       help="stretch the schedule until its end is pure noise; not with --prediction eps")
    group.add_argument("--learn_variance", action=BooleanOptionalAction, default=False,
                       help="learn the variance of the steps of --sampler ddpm too, by the hybrid loss")
    group = parser.add_argument_group("network")
    group.add_argument("--base_channels", type=number(int, 1, 4096),
                       help="channels at the highest resolution (default: on a CPU 24, or 32 to 64 by the --budget; "
                            "64 on others)")
    group.add_argument("--patch_size", type=int, choices=(1, 2, 4),
                       help="pixels unshuffled into channels; 1: convolutions at full resolution")
    group.add_argument("--channel_mults", type=number(int, 1, 64), nargs="+", metavar="N",
                       help="channels at each resolution / base_channels (default: by patch_size)")
    group.add_argument("--depth", type=number(int, 1, 64), default=1, help="residual blocks in each stage")
    group.add_argument("--middle_depth", type=number(int, 1, 64),
                       help="residual blocks in the middle, at the lowest resolution")
    group.add_argument("--attention", type=number(int, 0, 64), nargs="+", metavar="N",
                       help="self-attention at 1/N of the image's size for each N; 0: none (default: at the lowest)")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default="silu", help="between the layers")
    group.add_argument("--time_emb_dim", type=number(int, 2, 65536), default=256, help="size of the time embedding")
    group.add_argument("--checkpointing", action=BooleanOptionalAction, default=False,
                       help="less memory for more time, for large networks")
    group.add_argument("--conditional", action=BooleanOptionalAction, help="learn the classes too, so that one can ask "
                                                                          "for them; the images come out better")
    group.add_argument("--label_dropout", type=number(float, 0, 1), default=0.1,
                       help="share of the images that --conditional shows without their label")
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch_size", type=batch_size, metavar="N",
                       help="images in a step, of all processes; auto: the recipe's, or the half, quarter ... of it "
                            "that fits in memory")
    group.add_argument("--optimizer", choices=("muon", "adamw"),
                       help="adamw for all weights, or muon for the matrices and adamw for the rest")
    group.add_argument("--lr", type=number(float, 0), help="peak learning rate of adamw")
    group.add_argument("--muon_lr", type=number(float, 0), default=0.02, help="peak learning rate of muon")
    group.add_argument("--warmup", type=number(float, 0, 1), help="share of the run in which lr rises")
    group.add_argument("--lr_schedule", choices=LR_SCHEDULES, help="after the warm-up")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="of AdamW")
    group.add_argument("--max_grad_norm", type=number(float, 1e-6), default=1.0,
                       help="gradients are clipped to this norm")
    group.add_argument("--ema_decay", type=number(float, 0, 1), default=0.999, help="of the average of the weights")
    parser.set_defaults(**RECIPES["fast"])
    return parser


def good_width(budget: float | None, device: torch.device) -> int:
    """Base channels for a run: what measured best on a CPU in so many seconds (benchmarks/RECORDS.md).

    A wider network learns more from an image and sees fewer. Without a budget: twenty epochs in about ten minutes.
    """
    if device.type != "cpu":
        return 64
    return 24 if budget is None else 32 if budget < 90 else 48 if budget < 1200 else 64


def fill_in(args, device: torch.device) -> None:
    """Give the flags that depend on the data set, the budget and the device the values that are good there."""
    args.base_channels = args.base_channels or good_width(args.budget, device)
    mean, std = NOISE_LEVELS[args.dataset]
    args.noise_mean = mean if args.noise_mean is None else args.noise_mean
    args.noise_std = args.noise_std or std


OWN_FLAGS = ("output_dir", "data_dir", "device", "resume")  # what a resumed run does not take from its checkpoint


def resume_command(args) -> str:
    """What to type to go on with the run in args.output_dir: it names the OWN_FLAGS that are not the defaults."""
    start = "python" if distributed.size() == 1 else f"torchrun --nproc_per_node={distributed.size()}"
    own = [f"--{name} {shlex.quote(str(getattr(args, name)))}" for name in OWN_FLAGS[:3]
           if name == "output_dir" or getattr(args, name) != SHARED_FLAGS[name]["default"]]
    return " ".join([start, "train.py --resume", *own])


def more_epochs(epochs: int) -> int:
    """A number of --epochs to go on to for a run that has had so many."""
    return max(20, 2 * epochs)


def saved_flags(parser: Parser, args, path: Path, saved: dict) -> list[str]:
    """The flags of a checkpoint's run as a user would type them, who may give --epochs and --budget anew in `args`.

    UserError if they are not such that a run can have had.
    """
    argv, new = [], {*OWN_FLAGS, *(("epochs", "budget") if args.epochs or args.budget else ())}
    kept = {name: saved["config"]["training"].get(name) for name in vars(args) if name not in new}
    try:
        for name, value in kept.items():
            if type(value) is list and all(type(part) is int for part in value):
                argv += [f"--{name}", *map(str, value)]
            elif type(value) in (int, float, str):
                argv.append(f"--{name}={value}")
            elif type(value) is bool:
                argv.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                raise UserError(f"--{name} is of type {type(value).__name__}")
        parser.parse_args(argv)
    except UserError as error:
        raise UserError(f"{path} holds flags that no run can have had: {error}") from error
    return argv
