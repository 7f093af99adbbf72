"""Find what is wrong with the machine, the data, the noise schedule, a checkpoint, and the images that it makes.

    python doctor.py
    python doctor.py --dataset cifar10
    python doctor.py --checkpoint outputs/model_final.pt --json
    python doctor.py --checkpoint mnist

Each line is OK, WARN or FAIL, with the likely cause and, below it, how to fix it. Exit status: 1 if a line is FAIL.
"""

import contextlib
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import SAFETENSORS, data_mismatch, load_model, training_flag
from data import ImageData, code_of, in_parts, load_dataset, refuse_points, to_model
from data_sources.cache import MIN_HELD_OUT
from diffusion import DiffusionProcess
from evaluation.classifier import load_feature_network
from evaluation.copies import ENOUGH, too_few
from evaluation.features import extract_features
from evaluation.gaussian import bound_images, gaussian_bound
from evaluation.health_checks import (
    Finding,
    check_copies,
    check_data,
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
)
from evaluation.machine_checks import examine_machine
from evaluation.metrics import closeness, nearest_version, versions
from models import create_model
from runtime.checkpoints import is_pretrained, pretrained_models, with_checkpoint
from runtime.errors import UserError
from runtime.parser import (
    PICTURE_FLAGS,
    PRETRAINED_NAMES,
    SHARED_FLAGS,
    Parser,
    add_shared_flags,
    refuse_picture_flags,
)
from runtime.sampling import chosen_dataset, dataset_of, is_student, sampling_options
from runtime.script import script
from samplers import all_images
from training import run_folder, run_record
from training.resume import more_epochs, resume_command
from utils import generator_for, get_device

SAMPLES, REAL = 64, 500  # generated images, and real images that they are compared with
ERROR_IMAGES, ERROR_VALUES = 256, 2**25  # for the error of x_0_hat: so many images, fewer of large ones
BOUND_IMAGES = 5000  # for the Gaussian bound: at least so many
LOG_SNRS = (4.0, 2.0, 0.0, -2.0, -4.0)  # where the error is measured, from little to much noise


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to examine")
    group.add_argument("--checkpoint", help="a file of train.py or distill.py, or a pretrained model by its name "
                                            f"({PRETRAINED_NAMES}): also examine its schedule, data and images "
                                            "(default: none)")
    group.add_argument("--dataset", **SHARED_FLAGS["dataset"] | dict(
                       default=None, help="the data set to examine, or the path of your own pictures (default: that "
                                          "of --checkpoint, else none)"))
    add_shared_flags(group, *PICTURE_FLAGS, "data_dir")
    group.add_argument("--output_dir", **SHARED_FLAGS["output_dir"] | dict(
        help="the folder that is examined for whether results can be written to it"))
    add_shared_flags(group, "device")
    group.add_argument("--json", action="store_true", help="print a JSON list of {check, status, message, fix} instead")
    args = parser.parse_args(argv)
    if args.checkpoint is not None:
        refuse_picture_flags(parser)
    elif args.dataset is None and (given := [name for name in PICTURE_FLAGS if name in parser.typed]):
        parser.error(f"--{given[0]} is for your own pictures: add --dataset PATH, or leave it out")
    return args


# -------------------------------------------------------------------------------------------------- the checkpoint


def initial_weights(checkpoint: dict) -> dict[str, Tensor]:
    """The network's tensors before the first step, drawn again from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checkpoint["seed"] % 2**63)
        return create_model(**checkpoint["config"]["model"]).state_dict()


def folder_of_run(checkpoint: str) -> Path:
    """The --output_dir of the run that wrote a checkpoint."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder


def command_to_resume(args, *more: str) -> str:
    """The command that resumes the run of --checkpoint; of a pretrained one, which cannot be resumed, its training."""
    if is_pretrained(args.checkpoint):
        return pretrained_models()[Path(args.checkpoint).stem]["command"]
    folder = folder_of_run(args.checkpoint)
    if not run_folder.has_run(folder):  # a copy, or what export.py wrote
        return " ".join(["python train.py --resume --output_dir FOLDER_OF_ITS_RUN", *more])
    return " ".join([resume_command(Namespace(**vars(args) | dict(output_dir=folder))), *more])


def remedy(args) -> str:
    """What to do if --checkpoint cannot be loaded."""
    if Path(args.checkpoint).name == SAFETENSORS:
        return "export the checkpoint that was exported again: python export.py --format safetensors"
    if of_student := run_record.sittings(folder_of_run(args.checkpoint), "distill.py"):
        return f"train the student again: {of_student[-1]['command']}"
    return f"{command_to_resume(args)}: resumes from the newest valid checkpoint"


def examine_checkpoint(checkpoint: dict) -> Iterator[Finding]:
    """The tensors, and the history of the losses."""
    step, initial = checkpoint["step"], initial_weights(checkpoint)
    for part in ("model", "ema"):
        yield check_tensors(checkpoint[part], initial, step, part)
    rows = "label_embedding.weight"
    if rows in initial:
        yield check_label_rows(checkpoint["ema"][rows], initial[rows], checkpoint["config"]["data"]["class_names"])
    records = checkpoint["history"].get("records", [])
    losses = [math.nan if record["loss"] is None else record["loss"] for record in records]  # None: not finite
    yield from check_history(losses, [r["val_loss"] for r in records if r.get("val_loss") is not None])


@torch.no_grad()
def denoise_at(model, diffusion: DiffusionProcess, x_0: Tensor, labels: Tensor | None, t: int) -> Tensor:
    """x_0_hat (B, C, H, W), on the CPU, for clean images x_0 noised to t, always with the same noise."""
    denoised, parts, generator = [], in_parts(x_0, len(x_0)), generator_for(0)
    given = [None] * len(parts) if labels is None else labels.split(len(parts[0]))
    for part, own in zip(parts, given, strict=True):
        noise = torch.randn(part.shape, generator=generator).to(diffusion.device)
        x_t = diffusion.q_sample(part.to(diffusion.device), t, noise)
        denoised.append(diffusion.denoiser(model, own, clip=False)(x_t, t).cpu())
    return torch.cat(denoised)


def examine_error(model, diffusion: DiffusionProcess, train: ImageData, unseen: ImageData,
                  longer: str) -> Iterator[Finding]:
    """The error of x_0_hat at several noise levels, compared with the Gaussian bound, and the effect of labels.

    longer: the command that trains longer.
    """
    unseen = unseen.first(max(1, min(ERROR_IMAGES, ERROR_VALUES // unseen.images[0].numel())))
    x_0, labels = unseen.x_0(), unseen.labels.to(diffusion.device) if model.num_classes else None
    times = sorted({round(diffusion.time_of(log_snr)) for log_snr in LOG_SNRS})
    some = train.first(bound_images(BOUND_IMAGES, train.images[0].numel()))
    bound = gaussian_bound(some.x_0(), diffusion, times)
    errors = [F.mse_loss(denoise_at(model, diffusion, x_0, labels, t), x_0) for t in times]
    yield check_error(torch.stack(errors).double(), bound,
                      [diffusion.log_snr(t).item() for t in times], longer)
    if labels is not None:
        right, wrong = (denoise_at(model, diffusion, x_0, given, round(diffusion.time_of(-3.0)))
                        for given in (labels, (labels + 1) % model.num_classes))
        yield check_labels_used(right, wrong, x_0)


# ------------------------------------------------------------------------------------------------------ the samples


def examine_samples(model, diffusion: DiffusionProcess, train: ImageData, unseen: ImageData,
                    checkpoint: dict) -> Iterator[Finding]:
    """Generated images compared with real ones and with those of twice as many steps, and classified."""
    unseen, shape = unseen.first(REAL), train.images.shape[1:]
    real = unseen.images
    options = sampling_options(checkpoint["config"], count=SAMPLES)
    images = all_images(model, diffusion, shape, range(SAMPLES), **options).cpu()
    generated = train.code.decode(images)
    finite = bool(images.isfinite().all())
    findings = check_samples(to_model(generated) if finite else images, to_model(real), diffusion.num_timesteps)
    yield from findings
    if any(finding.status == "FAIL" for finding in findings):
        return  # the other checks would fail for the same reason
    if not is_student(checkpoint["config"]):  # more steps of a student make different images
        twice = options | dict(steps=min(2 * options["steps"], diffusion.num_timesteps))
        more = train.code.decode(all_images(model, diffusion, shape, range(16), **twice).cpu())
        yield check_steps(to_model(generated[:16]), to_model(more), options["steps"], diffusion.num_timesteps)
    device = diffusion.device
    mirrored = bool(training_flag(checkpoint, "hflip", False))
    distances = nearest_version(versions(torch.cat([generated, real]).to(device), mirrored), train.images)[0]
    yield check_copies(closeness(distances[:SAMPLES], distances[SAMPLES:]))
    if train.class_names and too_few(train):
        yield Finding("classifier", "WARN", f"of {train.name} too few pictures are held out for a classifier",
                      f"{ENOUGH:,} different pictures are enough")
    elif train.class_names:
        yield from examine_by_classifier(generated, unseen, options["labels"], device, mirrored)


def examine_by_classifier(images: Tensor, unseen: ImageData, labels: Tensor | None, device,
                          mirrored: bool) -> Iterator[Finding]:
    """How the data set's classifier classifies generated images, real ones, and the mirror images of both; uint8.

    labels: those that the generated images were asked for, or None. mirrored: whether the training was asked to mirror
    images, so that mirrored ones are no defect.
    """
    try:
        classifier = load_feature_network(unseen.source, device)
    except UserError as error:
        own = isinstance(unseen.source, Path)  # the message says what to do
        fix = "" if own else "git checkout evaluation/weights"
        yield Finding("classifier", "WARN", str(error), fix)
        return
    real = unseen.images
    probabilities = [extract_features(x, classifier).probabilities
                     for x in (images, images.flip(-1), real, real.flip(-1))]
    yield from check_recognised(probabilities[0], probabilities[2], labels, unseen.labels)
    if not mirrored:
        yield from check_mirrored(*(p.amax(1) for p in probabilities))


# -------------------------------------------------------------------------------------------------------- everything


def open_data(args, name: str | Path) -> tuple[ImageData, ImageData] | Finding:
    """The training and validation images of a data set, or a finding if they cannot be loaded."""
    try:
        return tuple(load_dataset(name, split, args.data_dir) for split in ("train", "validation"))
    except UserError as error:
        return Finding("data set", "FAIL", str(error), "see the message; --dataset glyphs needs no download")


def data_of_training(args, checkpoint: dict) -> str | Path | Finding:
    """The data set of a checkpoint, or a finding if its pictures are gone. UserError if --dataset asks for another."""
    try:
        return dataset_of(checkpoint, args.data_dir, args.dataset)
    except UserError as error:
        if args.dataset:
            raise
        return Finding("data set", "FAIL", str(error), "see the message")


def examine(args) -> Iterator[Finding]:
    """All findings: first those that the others depend on."""
    yield from examine_machine(args.device, {name: Path(getattr(args, name)) for name in ("output_dir", "data_dir")})
    model, diffusion, checkpoint, name = None, DiffusionProcess(), None, args.dataset
    if args.checkpoint:
        try:
            model, diffusion, checkpoint = load_model(args.checkpoint, get_device(args.device), points=True)
        except UserError as error:
            yield Finding("checkpoint", "FAIL", str(error), remedy(args))
            return
        name = data_of_training(args, checkpoint)
        yield from check_schedule(diffusion)
        yield from examine_checkpoint(checkpoint)
        if isinstance(name, Finding):
            yield name
            return
    elif name:
        name = chosen_dataset(args, get_device(args.device).type == "cpu", quiet=True)
    if name:
        yield from examine_data(args, name, model, diffusion, checkpoint)


def examine_data(args, name: str | Path, model, diffusion: DiffusionProcess,
                 checkpoint: dict | None) -> Iterator[Finding]:
    """The data set and, if there is a checkpoint, its errors and samples."""
    refuse_points(name, args.checkpoint or "")
    opened = open_data(args, name)
    if isinstance(opened, Finding):
        yield opened
        return
    train, unseen = opened if not checkpoint else (split.coded(code_of(checkpoint["config"])) for split in opened)
    findings = check_data(train.images, train.labels, train.class_names)
    yield from findings
    if model and not len(unseen.images):
        yield Finding("errors and images", "WARN", f"of {train.name} no pictures are held out to compare with",
                      f"{MIN_HELD_OUT} pictures or more are enough for that")
        return
    if not model or any(finding.status == "FAIL" for finding in findings):
        return
    if problem := data_mismatch(checkpoint["config"], train):
        yield Finding("data set", "FAIL", problem, "give the --data_dir of the training")
        return
    if not is_student(checkpoint["config"]):  # the x_0_hat of a student is an image, not a mean of many
        epochs = max(checkpoint["epoch"], int(training_flag(checkpoint, "epochs", 0)))
        longer = command_to_resume(args, f"--epochs {more_epochs(epochs)}")
        yield from examine_error(model, diffusion, train, unseen, longer)
    train = train.first(int(training_flag(checkpoint, "train_images", 0)) or None)
    yield from examine_samples(model, diffusion, train, unseen, checkpoint)


@script
def main(argv=None):
    args, findings = parse_args(argv), []
    args = with_checkpoint(args) if args.checkpoint is not None else args
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):  # messages of downloads do not belong in the JSON
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
