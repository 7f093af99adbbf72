"""Find out what is wrong: with the machine, the data, the schedule, a checkpoint, and the images that it makes.

    python doctor.py
    python doctor.py --dataset cifar10
    python doctor.py --checkpoint outputs/model_final.pt --json

Each line is OK, WARN or FAIL, with the likely cause and, below it, what mends it. Exit status: 1 if anything is FAIL.
"""

import contextlib
import json
import math
import numbers
import os
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import MAX_COUNT, data_mismatch, load_model
from data import ImageData, load_dataset, to_model, to_uint8
from diffusion import DiffusionProcess
from evaluation.features import load_feature_network, look
from evaluation.gaussian import gaussian_bound
from evaluation.health_checks import (
    Finding,
    check_copies,
    check_data,
    check_ema,
    check_error,
    check_history,
    check_label_rows,
    check_labels_used,
    check_mirrored,
    check_recognised,
    check_samples,
    check_schedule,
    check_steps,
    check_tensors,
    check_versions,
    judge,
)
from evaluation.metrics import closeness, nearest
from models import create_model
from runtime.cli import Parser, add_shared_flags, guidance, is_student, sampler_and_steps, script, trained_on
from runtime.errors import UserError
from samplers import final_image, generate
from training.flags import more_epochs, resume_command
from utils import generator_for, get_device, pick_precision

SAMPLES = 64  # images that a checkpoint is asked for
REAL, BOUND_IMAGES, ERROR_IMAGES = 500, 5000, 256  # real images beside them; for the Gaussian bound; for the error
LOG_SNRS = (4.0, 2.0, 0.0, -2.0, -4.0)  # where the error is measured, from little noise to much
GB = 1e9


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what is looked at")
    group.add_argument("--checkpoint", help="a file that train.py wrote: it, its schedule, its data and its images")
    add_shared_flags(group, "dataset")
    parser.set_defaults(dataset=None)
    add_shared_flags(group, "data_dir", "output_dir", "device")
    group.add_argument("--json", action="store_true", help="print a list of {check, status, message, fix} instead")
    args = parser.parse_args(argv)
    if args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f"there is no checkpoint {args.checkpoint}: train one with python train.py")
    return args


# ------------------------------------------------------------------------------------------------------- the machine


def look_at_machine(args) -> Iterator[Finding]:
    """Versions, device, precision, memory, and the disks that are written to."""
    yield look_at_versions()
    device = get_device(args.device)
    idle = device.type == "cpu" and args.device == "auto" and shutil.which("nvidia-smi") is not None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, " + (
        f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    yield judge("device", idle, 0, 1, f"{device.type} ({name})" + ", though there is an NVIDIA driver" * idle,
                "this torch does not use the GPU: install the CUDA build from pytorch.org, or update the driver")
    yield measure_precision(device)
    yield measure_memory(device)
    for where in ("output_dir", "data_dir"):
        yield measure_disk(where, Path(getattr(args, where)))


def look_at_versions() -> Finding:
    try:
        import torchvision
    except Exception as error:  # of many kinds, where its binaries were built for another torch
        return Finding("versions", "FAIL", f"torchvision does not load: {str(error)[:120]}",
                       "pip install --upgrade torch torchvision (both in one command)")
    try:
        wanted = [text.partition(";")[0] for text in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError:
        wanted = []
    return check_versions(sys.version_info[:2], str(torch.__version__), str(torchvision.__version__), wanted)


def convolution_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The shortest of five runs of a 3×3 convolution as the network's are; infinite where the device has no such."""
    count, best = 32 if device.type == "cpu" else 1024, math.inf
    x, weight = torch.randn(count, 64, 14, 14, device=device), torch.randn(64, 64, 3, 3, device=device)
    try:
        for _ in range(6):  # the first warms up
            start = time.perf_counter()
            F.conv2d(x.to(dtype), weight.to(dtype), padding=1).sum().item()
            best = min(best, time.perf_counter() - start)
    except RuntimeError:
        return math.inf
    return best


def measure_precision(device: torch.device) -> Finding:
    took = dict(fp32=convolution_seconds(device, torch.float32), bf16=convolution_seconds(device, torch.bfloat16))
    chosen, fast = pick_precision("auto", device), min(took, key=took.get)
    return judge("precision", took[chosen] / took[fast], 1.5, math.inf, f"a convolution takes "
                 f"{took['fp32'] * 1e3:.2f} ms in fp32, {took['bf16'] * 1e3:.2f} in bf16; --precision auto is {chosen}",
                 f"python train.py --precision {fast}")


def measure_memory(device: torch.device) -> Finding:
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else main_memory()
    return judge("memory", -free / GB, -2, -0.5, f"{free / GB:.1f} of {total / GB:.1f} GB are free",
                 "close other programs, or python train.py --batch_size 32")


def main_memory() -> tuple[float, float]:
    """(available, all) bytes of main memory; infinite where the system does not say."""
    table = Path("/proc/meminfo")
    if table.exists():
        lines = dict(line.split(":") for line in table.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        total = math.inf
    return total, total


def measure_disk(where: str, folder: Path) -> Finding:
    """Free space where `folder` is or will be, and whether it can be written to."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Finding(f"disk of {where}", "FAIL", f"{place} is no folder that can be written to",
                       f"choose another --{where}")
    return judge(f"disk of {where}", -free / GB, -2, -0.2, f"{free / GB:.1f} GB are free at {place}",
                 f"delete old runs, choose another --{where}, or python train.py --keep_checkpoints 1")


# -------------------------------------------------------------------------------------------------- the checkpoint


def initial_weights(checkpoint: dict) -> dict[str, Tensor]:
    """The network's tensors before the first step: its seed draws them again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checkpoint["seed"] % 2**63)
        return create_model(**checkpoint["config"]["model"]).state_dict()


def flag(checkpoint: dict, name: str, default):
    """A number among the flags of the training; the default if it is not there or no number."""
    value = checkpoint["config"]["training"].get(name)
    return value if isinstance(value, numbers.Real) and 0 <= value <= MAX_COUNT else default


def go_on(args, *more: str) -> str:
    """The command that goes on with the run in whose folder --checkpoint lies."""
    folder = Path(args.checkpoint).parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return " ".join([resume_command(Namespace(**vars(args) | dict(output_dir=folder))), *more])


def look_at_checkpoint(checkpoint: dict) -> Iterator[Finding]:
    """The age of its average, its tensors, and the history of its losses."""
    step, initial = checkpoint["step"], initial_weights(checkpoint)
    yield check_ema(step, flag(checkpoint, "ema_decay", 0.999))
    for part in ("model", "ema"):
        yield check_tensors(checkpoint[part], initial, step, part)
    rows = "label_embedding.weight"
    if rows in initial:
        yield check_label_rows(checkpoint["ema"][rows], initial[rows])
    records = checkpoint["history"].get("records", [])
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]  # None: none was finite
    yield from check_history(losses, [r["val_loss"] for r in records if r.get("val_loss") is not None])


def time_near(diffusion: DiffusionProcess, log_snr: float) -> int:
    """The whole time whose log-SNR is nearest."""
    return int((diffusion.log_snr(torch.arange(diffusion.num_timesteps)) - log_snr).abs().argmin())


@torch.no_grad()
def denoise_at(model, diffusion: DiffusionProcess, x_0: Tensor, labels: Tensor | None, t: int) -> Tensor:
    """x_0_hat (B, C, H, W), on the CPU, of clean images x_0 that were noised to t, always with the same noise."""
    noise = torch.randn(x_0.shape, generator=generator_for(0)).to(diffusion.device)
    x_t = diffusion.q_sample(x_0.to(diffusion.device), t, noise)
    return diffusion.denoiser(model, labels, clip=False)(x_t, t).cpu()


def look_at_error(model, diffusion: DiffusionProcess, train: ImageData, unseen: ImageData,
                  longer: str) -> Iterator[Finding]:
    """The error at several noise levels beside the Gaussian bound, and what labels change.

    longer: the command that trains longer.
    """
    some = unseen.first(ERROR_IMAGES)
    x_0, labels = to_model(some.images), some.labels.to(diffusion.device) if model.num_classes else None
    times = sorted({time_near(diffusion, log_snr) for log_snr in LOG_SNRS})
    bound = gaussian_bound(to_model(train.images[:BOUND_IMAGES]), diffusion, times)
    found = [denoise_at(model, diffusion, x_0, labels, t) for t in times]
    yield check_error(torch.stack([(x - x_0).double().square().mean() for x in found]), bound,
                      [diffusion.log_snr(t).item() for t in times], longer)
    if labels is not None:
        right, wrong = (denoise_at(model, diffusion, x_0, given, time_near(diffusion, -3.0))
                        for given in (labels, (labels + 1) % model.num_classes))
        yield check_labels_used(right, wrong, x_0)


# ------------------------------------------------------------------------------------------------------ the samples


def as_sample_does(checkpoint: dict, labels: Tensor | None) -> dict:
    """What sample.py without flags asks samplers.generate for."""
    sampler, steps = sampler_and_steps(Namespace(sampler=None, steps=None), checkpoint)
    return dict(sampler=sampler, steps=steps, labels=labels,
                guidance_scale=guidance(None, labels, is_student(checkpoint)))


def make_images(model, diffusion: DiffusionProcess, shape, count: int, **how) -> Tensor:
    """Images (N, C, H, W) on the CPU, made as `how` asks samplers.generate for."""
    batches = generate(model, diffusion, shape, range(count), **how)
    return torch.cat([final_image(trajectory).cpu() for _, trajectory in batches])


def look_at_samples(model, diffusion: DiffusionProcess, train: ImageData, unseen: ImageData,
                    checkpoint: dict) -> Iterator[Finding]:
    """The images that it makes, beside real ones, beside twice as many steps, and as the classifier sees them."""
    shape, real = train.images.shape[1:], unseen.first(REAL).images
    labels = torch.arange(SAMPLES) % model.num_classes if model.num_classes else None
    how = as_sample_does(checkpoint, labels)
    images = make_images(model, diffusion, shape, SAMPLES, **how)
    findings = check_samples(images, to_model(real))
    yield from findings
    if any(finding.status == "FAIL" for finding in findings):
        return  # what follows would only repeat it
    if not is_student(checkpoint):  # whose further jumps make other images
        twice = how | dict(steps=min(2 * how["steps"], diffusion.num_timesteps))
        yield check_steps(images[:16], make_images(model, diffusion, shape, 16, **twice), how["steps"])
    device, made = diffusion.device, to_uint8(images)
    distances = nearest(torch.cat([made, real]).to(device), train.images)[0]
    yield check_copies(closeness(distances[:SAMPLES], distances[SAMPLES:]))
    yield from look_as_classifier(made, real, labels, train.name, device)


def look_as_classifier(images: Tensor, real: Tensor, labels: Tensor | None, dataset: str, device) -> Iterator[Finding]:
    """What the data set's classifier sees in images, in real ones, and in the mirror images of both; all uint8."""
    try:
        classifier = load_feature_network(dataset, device)
    except UserError as error:
        yield Finding("classifier", "WARN", str(error), "git checkout models/weights")
        return
    sees = [look(x, classifier).probabilities for x in (images, images.flip(-1), real, real.flip(-1))]
    yield from check_recognised(sees[0], sees[2], labels)
    yield from check_mirrored(*(probabilities.amax(1) for probabilities in sees))


# -------------------------------------------------------------------------------------------------------- all of it


def open_data(args, name: str) -> tuple[ImageData, ImageData] | Finding:
    """The training and validation images of a data set, or what is wrong with its files."""
    try:
        return tuple(load_dataset(name, split, args.data_dir) for split in ("train", "validation"))
    except UserError as error:
        return Finding("data set", "FAIL", str(error), "as it says; --dataset glyphs is drawn here, without a download")


def examine(args) -> Iterator[Finding]:
    """All findings, in the order in which one thing depends on another."""
    yield from look_at_machine(args)
    model, diffusion, checkpoint, name = None, DiffusionProcess(), None, args.dataset
    if args.checkpoint:
        try:
            model, diffusion, checkpoint = load_model(args.checkpoint, get_device(args.device))
        except UserError as error:
            yield Finding("checkpoint", "FAIL", str(error), f"{go_on(args)}: from the newest valid one")
            return
        name = trained_on(args, checkpoint)
        yield from check_schedule(diffusion)
        yield from look_at_checkpoint(checkpoint)
    if name:
        yield from look_at_data(args, name, model, diffusion, checkpoint)


def look_at_data(args, name: str, model, diffusion: DiffusionProcess, checkpoint: dict | None) -> Iterator[Finding]:
    """The data set and, beside it, what the checkpoint makes of it."""
    opened = open_data(args, name)
    if isinstance(opened, Finding):
        yield opened
        return
    train, unseen = opened
    findings = check_data(train.images, train.labels, train.class_names)
    yield from findings
    if not model or any(finding.status == "FAIL" for finding in findings):
        return
    if wrong := data_mismatch(checkpoint["config"], train):
        yield Finding("data set", "FAIL", wrong, "give the --data_dir that it was trained on")
        return
    if not is_student(checkpoint):  # whose x_0_hat is an image, not the mean near to all
        epochs = max(checkpoint["epoch"], int(flag(checkpoint, "epochs", 0)))
        longer = go_on(args, f"--epochs {more_epochs(epochs)}")
        yield from look_at_error(model, diffusion, train, unseen, longer)
    learnt = train.first(int(flag(checkpoint, "train_images", 0)) or len(train.images))
    yield from look_at_samples(model, diffusion, learnt, unseen, checkpoint)


@script
def main(argv=None):
    args, findings = parse_args(argv), []
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):  # what a download or the drawing of glyphs says
            findings = list(examine(args))
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in examine(args):
            findings.append(finding)
            print(f"{finding.status:4}  {finding.check}: {finding.message}", flush=True)
            if finding.fix:
                print(f"      -> {finding.fix}", flush=True)
    return int(any(finding.status == "FAIL" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
