"""The flags of train.py, the recipes that set their defaults, and the config of a checkpoint that follows from them."""

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import torch

from checkpoint import LIMITS, load_checkpoint
from data import DATASETS, LEVEL_CODES, ImageData, LevelCode, code_of, histogram_code, noise_level
from data_sources.cache import MIN_HELD_OUT, about
from data_sources.folder import find_pictures
from data_sources.points import POINT_SETS, is_points
from diffusion import LOSS_WEIGHTS, PREDICTIONS, SCHEDULES, TIMESTEP_SAMPLING
from models.layers import ACTIVATIONS
from runtime.checkpoints import find_checkpoint
from runtime.errors import UserError
from runtime.files import lies_in, one_line
from runtime.parser import PICTURE_FLAGS, Parser, add_shared_flags, duration, number
from samplers import highest_noise
from training.autotune import LAYOUTS
from training.learning_rate import LR_SCHEDULES
from training.sizing import network_stages

# A recipe is a set of defaults; flags override them. What each gives: benchmarks/RESULTS.md and RECORDS.md.
RECIPES = {
    "fast": dict(schedule="cosine", prediction="edm", timestep_sampling="lognormal",
                 base_channels=None, patch_size=None, middle_depth=3, batch_size=None, optimizer="muon", lr=2e-3,
                 lr_schedule="cosine", warmup=0.02, precision="auto", conditional=True, level_code="histogram"),
    # The textbook (Ho et al. 2020) as small toolkits implement it: full resolution, no tricks.
    "ddpm": dict(schedule="linear", prediction="eps", timestep_sampling="uniform", base_channels=64, patch_size=1,
                 middle_depth=1, batch_size=128, optimizer="adamw", lr=2e-4, lr_schedule="constant", warmup=0.0,
                 precision="fp32", conditional=False, level_code="linear"),
}
# Points in the plane have a small network of their own, which learns them in seconds.
POINT_DEFAULTS = dict(base_channels=128, depth=3, time_emb_dim=64, label_dropout=0.5, batch_size=256,
                      optimizer="adamw", precision="fp32", level_code="linear", sample_interval=5)

PICTURES_BUDGET = 600.0  # seconds, of your own pictures without --epochs and --budget


def defaults(args: Namespace, init: str | None, resumes: bool = False) -> dict:
    """The defaults that the recipe, the data set and the checkpoint `init`, if any, give to other flags.

    resumes: whether the run goes on from a checkpoint.
    """
    own_pictures = args.dataset not in DATASETS and not (args.epochs or args.budget or resumes)
    return (RECIPES[args.recipe] | (POINT_DEFAULTS if args.dataset in POINT_SETS else {})
            | (dict(budget=PICTURES_BUDGET) if own_pictures else {}) | init_defaults(args, init))


def init_defaults(args: Namespace, init: str | None) -> dict:
    """The network and the process of --init, whose weights fit nothing else: defaults for their flags."""
    if not init:
        return {}
    config = load_checkpoint(find_checkpoint(init))["config"]
    if args.dataset in POINT_SETS or is_points(config["data"]["shape"]):
        raise UserError("--init is for images, not for points in the plane: leave it out")
    return ({flag: config["model"][flag] for flag in MODEL_FLAGS["unet"] if flag in config["model"]}
            | {flag: config["diffusion"][name] for flag in INIT_PROCESS
               if (name := DIFFUSION_FLAGS[flag]) in config["diffusion"]})


SEEN_BEFORE = ("\nIf it learned from some of these pictures, the figures of held-out ones will be too good: which ones "
               "are held out changes with --image_size and --fit")


def start_from(model, args: Namespace, data: ImageData) -> str:
    """Give a new network the weights of --init, as far as their shapes fit; returns a line that says how far.

    And another one if those weights may have learned from pictures that `data` holds out.
    """
    checkpoint = load_checkpoint(path := find_checkpoint(args.init))
    weights, own = checkpoint["ema"], model.state_dict()
    fits = {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}
    left = ", ".join(sorted(own.keys() - fits.keys()))
    if not fits:
        raise UserError(f"no weight of {path} fits this network: leave out the flags that set another network")
    model.load_state_dict(own | fits)
    before, now = checkpoint["config"]["data"]["class_names"], list(data.class_names)
    if before != now or ("label_embedding.weight" in weights) != (model.label_embedding is not None):
        begin_labels(model, weights, before, now)
    seen = data.folder and _may_know_held_out(checkpoint["config"]["data"], data)
    return (f"Starting from {len(fits)} of the {len(own)} tensors of {path}"
            f"{f'; new, because no tensor of that name has their shape: {one_line(left, 300)}' if left else ''}"
            f"{SEEN_BEFORE if seen else ''}")


@torch.no_grad()
def begin_labels(model, weights: dict, before: Sequence[str], now: Sequence[str]) -> None:
    """Let `model`, which has got `weights` of a network with other classes, do what that one does without a label.

    The row of a class, or of "no label", is added to the embedding of the time. So the row of each new class begins as
    the old row of "no label", or as 0 if there was none; a class that was there before keeps its own. A model that has
    no labels gets the row of "no label" as a part of the time's bias.

    before, now: the names of the classes of both networks.
    """
    rows, bias = weights.get("label_embedding.weight"), model.time_embedding.mlp[-1].bias
    if rows is None or rows.shape[1:] != bias.shape:
        rows, before = torch.zeros_like(bias)[None], ()
    if model.label_embedding is None:
        bias += rows[-1]
    else:
        known = [before.index(name) if name in before else -1 for name in now]
        model.label_embedding.weight.copy_(rows[[*known, -1]])


def _may_know_held_out(before: dict, data: ImageData) -> bool:
    """Whether a network that learned from these pictures of one's own may have seen what `data` holds out.

    A picture stays in its split while all are read in the same way, unless none was held out before.
    """
    pictures, now = before.get("pictures"), about(data.folder)
    return bool(pictures) and pictures["digest"] != now["digest"] and (
        not pictures.get("held_out", pictures["count"] >= MIN_HELD_OUT) or before["shape"] != now["shape"]
        or any(pictures[name] != now[name] for name in ("fit", "channels", "background")))


def batch_size(text: str) -> int | str:
    """A type for add_argument: a whole number from 1 up, or "auto"."""
    return text if text == "auto" else number(int, 1)(text)


def make_parser(description: str) -> Parser:
    """The flags of train.py, with the defaults of the fast recipe."""
    parser = Parser(description)
    of_points = ", ".join(f"{flag} {value}" for flag, value in POINT_DEFAULTS.items())
    group = parser.add_argument_group("run", fill(f"Points in the plane have other defaults: {of_points}.", 100))
    group.add_argument("--recipe", choices=tuple(RECIPES), default="fast",
                       help="a set of defaults for other flags: fast, the best that we know; ddpm, the textbook")
    add_shared_flags(group, "dataset", "data_dir", "output_dir", "device", "precision", "threads", "seed")
    group.add_argument("--layout", choices=("auto", *LAYOUTS),
                       help="the memory layout of images; auto: the faster one on this machine (default: auto if "
                            "--precision is auto, else nchw)")
    group.add_argument("--compile", action=BooleanOptionalAction,
                       help="compile the network, which takes about a minute; on CUDA, in one process, each step is a "
                            "CUDA graph anyway, unless --no-compile or --dropout with --checkpointing (default: on "
                            "CUDA, for a --budget of ten minutes or more)")
    group.add_argument("--epochs", type=number(int, 1),
                       help="the number of passes over the training images (default: 20, or as many as --budget "
                            "allows; of few pictures of your own an epoch is several passes)")
    group.add_argument("--budget", type=duration, metavar="TIME",
                       help="the wall-clock time for everything, including start-up, saving and (with --resume) the "
                            "time used before, but not the reading of your own pictures: 90s, 10m, 1.5h (default: "
                            "10m for your own pictures without --epochs, else none). Epochs that take less than a "
                            "hundredth of it are not reported each: losses, samples and checkpoints come less often")
    group.add_argument("--train_images", type=number(int, 1),
                       help="learn from the first N training images only; with --budget and few of them losses, "
                            "samples and checkpoints come at most once in 8,000 images")
    group.add_argument("--sample_interval", type=number(int, 0), default=1,
                       help="write a grid of samples every N epochs; 0: never")
    group.add_argument("--save_interval", type=number(int, 0), default=5,
                       help="write a checkpoint every N epochs, besides model_final.pt at the end; 0: never")
    group.add_argument("--checkpoint_minutes", type=number(float, 0), default=5.0,
                       help="also write a checkpoint every N minutes; 0: never")
    group.add_argument("--keep_checkpoints", type=number(int, 1), default=5,
                       help="keep N files in checkpoints/; those of --checkpoint_minutes are deleted first, then the "
                            "oldest")
    group.add_argument("--tensorboard", action=BooleanOptionalAction, default=False,
                       help="also write losses, learning rate, speed and samples to tensorboard/ in --output_dir, for "
                            "tensorboard --logdir; needs pip install tensorboard")
    group.add_argument("--resume", action="store_true",
                       help="continue from the newest valid checkpoint in --output_dir with the flags of its run, "
                            "except --output_dir, --data_dir, --device, --init and --look; a run that was stopped "
                            "before its first checkpoint begins again. Flags given now override them, but network, "
                            "process, data, --train_images, --batch_size and --optimizer cannot change; --epochs and "
                            "--budget count from the beginning of the run. On a CPU a run by --epochs then ends with "
                            "the bits of one that was not interrupted, given the same number of threads; on CUDA it "
                            "differs by rounding, because cuDNN chooses its algorithms by timing them")
    group.add_argument("--init", metavar="FILE",
                       help="start from the weights of this checkpoint, or of a pretrained model by its name (cifar10 "
                            "for colour), and take its network (patch size and width, too) and process as defaults; "
                            "weights that do not fit are named. With few pictures this gives fewer copies")
    group = parser.add_argument_group("your own pictures (--dataset PATH)")
    add_shared_flags(group, *PICTURE_FLAGS)
    group.add_argument("--hflip", action=BooleanOptionalAction, default=False,
                       help="show half of the pictures mirrored, for photographs and the like: not for what has a left "
                            "and a right, as letters do")
    group.add_argument("--look", action="store_true",
                       help="say what was read, write look.png with 64 of the pictures as the network will see them, "
                            "and stop")
    group = parser.add_argument_group("diffusion process")
    group.add_argument("--level_code", choices=LEVEL_CODES,
                       help="the numbers that the network sees for the 256 levels of a pixel; histogram: common levels "
                            "lie away from their neighbours, which prevents a grey haze; linear: evenly spaced")
    group.add_argument("--timesteps", type=number(int, 1, 100_000), default=1000, help="T, the number of noising steps")
    group.add_argument("--schedule", choices=tuple(SCHEDULES), help="the noise schedule")
    group.add_argument("--prediction", choices=tuple(PREDICTIONS), help="what the network predicts")
    group.add_argument("--timestep_sampling", choices=TIMESTEP_SAMPLING,
                       help="the distribution of the times t in training")
    group.add_argument("--noise_mean", type=number(float, -10, 10),
                       help="for --timestep_sampling lognormal: the mean of log(sigma / alpha / data_std) (default: by "
                            "the data set)")
    group.add_argument("--noise_std", type=number(float, 0.01, 10),
                       help="for --timestep_sampling lognormal: the standard deviation of log(sigma / alpha / "
                            "data_std) (default: by the data set)")
    group.add_argument("--loss_weight", choices=LOSS_WEIGHTS, default="target",
                       help="target: the error of what the network predicts counts the same at all t; min_snr: the "
                            "error of x_0 counts min(SNR, snr_gamma)")
    group.add_argument("--snr_gamma", type=number(float, 1e-6), default=5.0,
                       help="for --loss_weight min_snr: the largest weight")
    group.add_argument("--zero_terminal_snr", action=BooleanOptionalAction, default=False,
                       help="stretch the schedule until its last time is pure noise; not with --prediction eps")
    group.add_argument("--learn_variance", action=BooleanOptionalAction, default=False,
                       help="also learn the variance of the steps of --sampler ddpm, by the hybrid loss")
    group = parser.add_argument_group("network")
    group.add_argument("--base_channels", type=number(int, 1, 4096),
                       help="the number of channels where --channel_mults has a 1 (default: on a CPU 24, or 16 "
                            "where patches are one pixel; with a --budget 16 to 64 by how many images it will see; on "
                            "other devices 64; of fewer than 2,000 images at most 32; never fewer than a patch has "
                            "values; with --init that of the checkpoint)")
    group.add_argument("--patch_size", type=int, choices=(1, 2, 4),
                       help="the side of the squares of pixels that become channels; 1: convolutions at full "
                            "resolution (default: 1 for colour up to 32 × 32, 4 above 64 × 64, else 2; with --init "
                            "that of the checkpoint)")
    group.add_argument("--channel_mults", type=number(int, 1, 64), nargs="+", metavar="N",
                       help="the numbers of channels at each resolution, in multiples of --base_channels (default: 1, "
                            "then 2 at each half of the resolution, down to about 8 × 8 positions)")
    group.add_argument("--depth", type=number(int, 1, 64), default=1, help="the number of residual blocks in each "
                                                                           "stage")
    group.add_argument("--middle_depth", type=number(int, 1, 64),
                       help="the number of residual blocks in the middle, at the lowest resolution")
    group.add_argument("--attention", type=number(int, 0, 64), nargs="+", metavar="N",
                       help="use self-attention where the resolution is 1/N of the image's; 0: nowhere (default: at "
                            "the lowest resolution)")
    group.add_argument("--activation", choices=tuple(ACTIVATIONS), default="silu", help="the activation function")
    group.add_argument("--time_emb_dim", type=number(int, 2, 65536), default=256, help="the size of the time embedding")
    group.add_argument("--checkpointing", action=BooleanOptionalAction, default=False,
                       help="recompute activations in the backward pass: less memory, more time; for large networks")
    group.add_argument("--conditional", action=BooleanOptionalAction,
                       help="learn the classes too, so that you can ask for one; the images are better")
    group.add_argument("--label_dropout", type=number(float, 0, 1), default=0.1,
                       help="for --conditional: the share of images that are shown without their label")
    group = parser.add_argument_group("optimiser")
    group.add_argument("--batch_size", type=batch_size, metavar="N",
                       help="the number of images in a step, of all processes together; auto: 128, or its half, "
                            "quarter ... that fits in memory (default: 128, or on a CPU 64 if a --budget will see few "
                            "images)")
    group.add_argument("--optimizer", choices=("muon", "adamw"),
                       help="muon: Muon for the matrices and AdamW for the rest; adamw: AdamW for all weights")
    group.add_argument("--lr", type=number(float, 0), help="the peak learning rate of AdamW")
    group.add_argument("--muon_lr", type=number(float, 0), default=0.02, help="the peak learning rate of Muon")
    group.add_argument("--warmup", type=number(float, 0, 1), help="the share of the run in which the learning rate "
                                                                  "rises")
    group.add_argument("--lr_schedule", choices=LR_SCHEDULES, help="the learning rate after the warm-up")
    group.add_argument("--dropout", type=number(float, 0, 0.9), default=0.0,
                       help="in training, set this share of the numbers in each residual block to 0: with few pictures "
                            "the network then makes fewer copies of them (measured with 0.1)")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="the weight decay of AdamW")
    group.add_argument("--max_grad_norm", type=number(float, 1e-6), default=1.0,
                       help="gradients are clipped to this norm")
    group.add_argument("--ema_decay", type=number(float, 0, 1), default=0.999,
                       help="the decay of the moving average of the weights")
    parser.set_defaults(**RECIPES["fast"])
    return parser


# ------------------------------------------------------------------------------- from flags to a checkpoint's config

IMAGE_FLAGS = ("channel_mults", "middle_depth", "attention", "patch_size", "checkpointing", "learn_variance")
MLP_FLAGS = ("base_channels", "time_emb_dim", "depth", "activation")
MODEL_FLAGS = {"unet": MLP_FLAGS + IMAGE_FLAGS, "mlp": MLP_FLAGS}
INIT_PROCESS = ("timesteps", "schedule", "prediction", "timestep_sampling", "zero_terminal_snr")
DIFFUSION_FLAGS = {"timesteps": "num_timesteps"} | {name: name for name in (
    "schedule", "prediction", "timestep_sampling", "noise_mean", "noise_std", "loss_weight", "snr_gamma",
    "zero_terminal_snr")}
TRAINER_FLAGS = ("batch_size", "optimizer", "lr", "muon_lr", "lr_schedule", "warmup", "weight_decay", "max_grad_norm",
                 "ema_decay", "conditional", "label_dropout", "precision", "seed", "hflip")
# What a process has without flags, in checkpoints that do not know it; the shares are for lognormal times.
KEPT = dict(last_share=0.0, low_share=0.0, lowest_noise=None, highest_noise=None)
LAST_SHARE, POINTS_LOW_SHARE = 0.01, 0.05  # nearly clean times help points, and make images worse: RECORDS.md
# Besides network and data, what --resume cannot change:
FIXED_FLAGS = ("train_images", "batch_size", "optimizer", "level_code")


def check_flags_of_data(parser: Parser, args: Namespace) -> None:
    """UserError for classes that the user's own pictures have not got, and for an --output_dir among them."""
    own = args.dataset not in DATASETS
    of_classes = [name for name in ("conditional", "label_dropout") if name in parser.typed and args.conditional]
    if own and of_classes:
        args.needs_classes = of_classes[0]  # which is known when the pictures have been read
        if not find_pictures(Path(args.dataset)).class_names:
            parser.error(no_classes_message(args))
    if own and lies_in(args.output_dir, args.dataset):
        parser.error(f"--output_dir {args.output_dir} lies among the pictures in {args.dataset}, which the run would "
                     f"add its own pictures to: choose another one")


def no_classes_message(args: Namespace) -> str:
    """Why the flag args.needs_classes cannot be kept."""
    return (f"--{args.needs_classes} needs two classes or more, and {args.dataset} has none: put the pictures of each "
            f"class into a sub-folder of its name, or leave it out")


NEEDED = dict(muon_lr=("optimizer", "muon"), snr_gamma=("loss_weight", "min_snr"),
              noise_mean=("timestep_sampling", "lognormal"), noise_std=("timestep_sampling", "lognormal"),
              label_dropout=("conditional", True))


def check_effect(parser: Parser, args: Namespace, typed: set[str]) -> None:
    """UserError for a flag that the user typed, and that changes nothing, or does harm, with another flag's value."""
    unread = sorted({*IMAGE_FLAGS, "dropout", "level_code", "hflip", "look"} & typed)
    if unread and args.dataset in POINT_SETS:
        parser.error(f"--{unread[0]} is for images, and {args.dataset} holds points in the plane: leave it out")
    if args.zero_terminal_snr and args.loss_weight == "min_snr" and {"zero_terminal_snr", "loss_weight"} & typed:
        parser.error("--zero_terminal_snr goes with --loss_weight target: min_snr has weight 0 at the last time, where "
                     "sampling starts")
    for name in ("channel_mults", "attention"):
        if len(getattr(args, name) or ()) > (most := LIMITS["model"][name][1]):
            parser.error(f"--{name} has {len(getattr(args, name))} numbers, more than the {most} that a checkpoint may "
                         f"have: give fewer")
    for name, (other, value) in NEEDED.items():
        if name in typed and getattr(args, other) != value:
            needed = f"--{other}" if value is True else f"--{other} {value}"
            parser.error(f"--{name} changes nothing without {needed}: leave it out, or add {needed}")


def make_settings(args: Namespace, data: ImageData) -> Namespace:
    """A copy of the flags in which those that depend on the data have their values; the width and the batch may not."""
    if getattr(args, "needs_classes", None) and not data.class_names:  # no picture of the others could be read
        raise UserError(no_classes_message(args))
    given = args.noise_mean, args.noise_std
    mean, std = noise_level(args.dataset, data) if None in given else given  # which looks at one's own pictures
    stages = network_stages(data.images.shape[1:], args.patch_size)
    open_flags = {name: getattr(args, name) or value for name, value in stages.items()} | dict(
        epochs=20 if args.epochs is None and args.budget is None else args.epochs,
        conditional=args.conditional and bool(data.class_names),
        image_size=data.images.shape[2] if data.folder else None,  # the choice, for a resumed run on another device
        noise_mean=mean if args.noise_mean is None else args.noise_mean, noise_std=args.noise_std or std)
    return Namespace(**{name: value for name, value in vars(args).items() if name != "needs_classes"} | open_flags)


def make_code(settings: Namespace, data: ImageData, saved: dict | None = None) -> LevelCode:
    """The code that --level_code asks for; saved: the config of the checkpoint that is resumed, whose code is kept."""
    if settings.level_code == "linear":
        return data.code
    return code_of(saved) if saved else histogram_code(data.images)


def make_config(settings: Namespace, data: ImageData, saved: dict | None = None) -> dict:
    """The config of a checkpoint but for its part "training": {"model", "diffusion", "data"}.

    data     the training images, with their code
    saved    the config of the checkpoint that is resumed: its data_std, else measured, and what is KEPT
    """
    attention = settings.attention and [factor for factor in settings.attention if factor]
    points, row = is_points(data.images.shape[1:]), DATASETS.get(data.name)
    kept = {name: saved["diffusion"].get(name, before) for name, before in KEPT.items()} if saved else dict(
        last_share=LAST_SHARE, low_share=POINTS_LOW_SHARE if points else 0.0,
        lowest_noise=row.lowest_noise if row and not data.code.is_linear else None,
        highest_noise=round(highest_noise(data.images.shape[1:]), 1))
    some = data.first(min(10_000, 2**25 // data.images[0].numel()))  # large images would need much memory as floats
    data_std = saved["diffusion"]["data_std"] if saved else round(some.x_0().std().item(), 3)
    if not data_std and not points:
        raise UserError(f"the images of {data.name} have one colour everywhere, so that there is nothing to learn: "
                        f"look at them with --look; transparent pictures may need another --background")
    network, flags = "mlp" if points else "unet", vars(settings) | dict(attention=attention)
    code = {} if data.code.is_linear else dict(level_code=data.code.points.tolist())
    guidance = saved["data"].get("guidance_scale") if saved else row and row.guidance
    return dict(
        model=dict({name: flags[name] for name in MODEL_FLAGS[network]}, network=network,
                   image_channels=data.images.shape[1],
                   num_classes=len(data.class_names) if settings.conditional else None),
        diffusion=dict({ours: getattr(settings, flag) for flag, ours in DIFFUSION_FLAGS.items()}, data_std=data_std,
                       **kept),
        data=dict(dataset=data.name, shape=list(data.images.shape[1:]), class_names=list(data.class_names), **code,
                  **(dict(guidance_scale=guidance) if guidance else {}), **_pictures(data, settings.dataset)))


PICTURES = ("fit", "channels", "background", "key", "digest", "count")  # of about.json, in a config


def _pictures(data: ImageData, path: str) -> dict:
    """What a checkpoint says of your own pictures, so that its scripts find them again and know them; else nothing.

    path: where they are now. They may have been read at another place.
    """
    if data.folder is None:
        return {}
    content = about(data.folder)
    held_out = content["splits"]["test"] + content["splits"]["validation"]
    return dict(pictures=dict(path=str(Path(path).absolute()), held_out=held_out,
                              **{name: content[name] for name in PICTURES}))
