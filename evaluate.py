"""Measure how good generated images are.

    python evaluate.py --checkpoint outputs/model_final.pt
    python evaluate.py --images samples.npz --dataset mnist
    python evaluate.py --checkpoint outputs/model_final.pt --sweep 5 10 20 50 --num_images 1000
    torchrun --nproc_per_node=2 evaluate.py --checkpoint outputs/model_final.pt

    lower is better       frechet_distance, kernel_distance, class_distance, bits_per_dim
    higher is better      precision, recall, coverage, asked_class, cas
    as for real images    density, confident

Every figure is printed with its 95 % interval and its floor: the same figure for as many real images that are not in
the reference. Fréchet distances of different n cannot be compared. asked_class and cas need labels: a conditional
checkpoint, or an array `labels` in the .npz.
"""

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_model
from data import DATASETS, SPLITS, load_dataset, to_uint8
from data_sources.pictures import read_images
from diffusion import DiffusionProcess
from evaluation.classifier_training import train_feature_network
from evaluation.features import extract_features
from evaluation.metrics import class_shares, torchmetrics_image
from evaluation.reference import (
    LIKELIHOOD_IMAGES,
    Reference,
    bits_per_dim,
    classification_accuracy_score,
    compare,
    make_reference,
    memorisation,
    open_networks,
    progress_bar,
)
from evaluation.report import conditions, print_classes, print_figures, print_heading, print_memorisation
from evaluation.sweep import GeneratedImages, plot_cells, plot_sweep, print_table_header, print_table_row, sweep
from runtime import distributed
from runtime.cli import (
    SHARED_FLAGS,
    Parser,
    add_shared_flags,
    check_useful,
    guidance,
    is_student,
    number,
    sampler_and_steps,
    script,
    trained_on,
)
from runtime.errors import UserError
from runtime.files import check_writable, write_json
from runtime.memory import within_memory
from samplers import SAMPLERS, STUDENT_SAMPLER, final_image, generate, uniform_timesteps
from utils import autocast, get_device, pick_precision

SAMPLING_FLAGS = ("num_images", "use_ema", "sampler", "spacing", "steps", "eta", "guidance_interval", "batch_size")
SWEEP_STEPS = (5, 10, 20, 50)


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to measure (one of the three)").add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", help="a file that train.py wrote: it makes the images")
    group.add_argument("--images", help="existing images: a .npz with arr_0, uint8 (N, H, W, C), or a folder of PNGs")
    group.add_argument("--train_features", choices=tuple(DATASETS), metavar="DATASET",
                       help="train this data set's feature network again: evaluation/weights/DATASET.pt")
    group = parser.add_argument_group("how a checkpoint makes images")
    add_shared_flags(group, *SAMPLING_FLAGS)
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"], nargs="+", metavar="SCALE")
    group.add_argument("--sweep", type=number(int, 1), nargs="*", metavar="STEPS",
                       help=f"compare all samplers, or only --sampler, at these step counts (default: "
                            f"{' '.join(map(str, SWEEP_STEPS))}), with each --guidance_scale")
    group = parser.add_argument_group("how images are measured")
    group.add_argument("--dataset", choices=tuple(DATASETS),
                       help="the data set of --images (of --checkpoint: its own)")
    parser.set_defaults(num_images=5000, guidance_scale=[None], batch_size=250)
    group.add_argument("--reference", choices=SPLITS,
                       help="the real images: test for results, validation for choices (default: test; with --sweep: "
                            "validation)")
    group.add_argument("--features", choices=("own", "inception"), default="own",
                       help="the data set's own feature network, or Inception v3 (needs torch-fidelity; slow)")
    group.add_argument("--cas", action="store_true",
                       help="also the classification accuracy score, higher is better: train a classifier on the "
                            "generated images and test it on real images")
    group.add_argument("--likelihood", action="store_true",
                       help=f"also bits_per_dim, lower is better: the variational bound of -log2 p per dimension of "
                            f"{LIKELIHOOD_IMAGES} real images; T network evaluations for each image")
    group = parser.add_argument_group("run")
    add_shared_flags(group, "data_dir")
    group.add_argument("--output_dir", help="where results are written (default: the folder of --checkpoint; "
                                            "with --images: outputs)")
    add_shared_flags(group, "device", "precision", "seed")
    args = parser.parse_args(argv)
    check_flags(args, parser)
    args.reference = args.reference or ("test" if args.sweep is None else "validation")
    args.output_dir = args.output_dir or (Path(args.checkpoint).parent if args.checkpoint else "outputs")
    return args


def check_flags(args, parser: Parser) -> None:
    """UserError for flags that cannot be combined."""
    if args.images and not args.dataset:
        parser.error(f"--images needs --dataset, the real images to compare with: {', '.join(DATASETS)}")
    for name in (*SAMPLING_FLAGS, "guidance_scale", "sweep"):
        if name in parser.typed and not args.checkpoint:
            parser.error(f"--{name} needs --checkpoint: it sets how a checkpoint makes images")
    if args.likelihood and not args.checkpoint:
        parser.error("--likelihood needs --checkpoint: it is the likelihood of the checkpoint's diffusion process")
    for name in ("cas", "likelihood"):
        if args.sweep is not None and getattr(args, name):
            parser.error(f"--{name} and --sweep cannot be combined: run --{name} with the sampler that you choose")
    if args.sweep is not None and args.steps:
        parser.error("--steps and --sweep cannot be combined: give the step counts after --sweep")
    if len(args.guidance_scale) > 1 and args.sweep is None:
        parser.error("several values of --guidance_scale need --sweep")


# ------------------------------------------------------------------------------------------------- making images


class LoadedCheckpoint(NamedTuple):
    """A network that makes images, the labels (N,) to request or None, and the samplers to compare."""

    model: nn.Module
    diffusion: DiffusionProcess
    shape: Sequence[int]
    labels: Tensor | None
    samplers: Sequence[str]


def open_checkpoint(args) -> LoadedCheckpoint:
    """Load --checkpoint and set --dataset by it. UserError if it cannot do what the flags ask for."""
    model, diffusion, checkpoint = load_model(args.checkpoint, get_device(args.device), args.use_ema)
    data, student = checkpoint["config"]["data"], is_student(checkpoint)
    args.dataset = trained_on(args, checkpoint)
    if args.sweep is None:
        args.sampler, args.steps = sampler_and_steps(args, checkpoint)
    elif not args.sweep:
        args.sweep = sorted({min(steps, diffusion.num_timesteps) for steps in SWEEP_STEPS})
    for steps in args.sweep or [args.steps]:
        uniform_timesteps(diffusion.num_timesteps, steps)
    labels = None
    if model.num_classes:  # image k gets the label of training image k: the shares of the classes are the data's
        known = load_dataset(args.dataset, "train", args.data_dir).labels
        labels = known[torch.arange(args.num_images) % len(known)]
    elif args.guidance_scale not in ([None], [1.0]):
        raise UserError(f"{args.checkpoint} was trained without --conditional: leave out --guidance_scale")
    args.guidance_scale = [guidance(scale, labels, student) for scale in args.guidance_scale]
    samplers = [args.sampler] if args.sampler else [name for name in SAMPLERS if (name == STUDENT_SAMPLER) == student]
    check_useful(args, samplers, guided=set(args.guidance_scale) != {1})
    args.eta = args.eta or 0.0
    return LoadedCheckpoint(model, diffusion, data["shape"], labels, samplers)


def make_images(args, loaded: LoadedCheckpoint, sampler: str, steps: int, scale: float,
                count: int | None = None) -> GeneratedImages:
    """Images made by the checkpoint; each process makes a part of them. UserError if they are not finite."""
    evaluations, count, device = [], count or args.num_images, loaded.diffusion.device
    mine = range(count)[distributed.share(count)]
    batches = partial(generate, loaded.model, loaded.diffusion, loaded.shape, mine, seed=args.seed, sampler=sampler,
                      steps=steps, spacing=args.spacing, eta=args.eta, labels=loaded.labels, guidance_scale=scale,
                      guidance_interval=args.guidance_interval)
    counter = loaded.model.register_forward_hook(lambda _, inputs, __: evaluations.append(len(inputs[0])))
    start = time.perf_counter()
    with (tqdm(total=len(mine), unit="image", desc=f"{sampler}, {steps} steps", leave=False,
               disable=distributed.rank() > 0) as bar,
          autocast(device, pick_precision(args.precision, device))):
        images = within_memory(partial(to_uint8_batches, bar), lambda n: batches(batch_size=n), args.batch_size, device)
    counter.remove()
    if not distributed.gather(torch.tensor([images is not None])).all():
        raise UserError(f"{args.checkpoint} makes images that are not finite numbers: train it again")
    images = distributed.gather(torch.cat([torch.empty(0, *loaded.shape, dtype=torch.uint8), *images]))
    evaluated = distributed.gather(torch.tensor([sum(evaluations)])).sum().item()
    return GeneratedImages(images, loaded.labels, evaluated / count, time.perf_counter() - start)


def to_uint8_batches(bar: tqdm, batches: Iterator) -> list[Tensor] | None:
    """The final images of each batch as uint8, as in files; None as soon as one is not finite."""
    images = []
    for batch, trajectory in batches:
        x = final_image(trajectory)
        if not x.isfinite().all():
            return None
        images.append(to_uint8(x).cpu())
        bar.update(len(batch))
    return images


# -------------------------------------------------------------------------------------------------------- measuring


def evaluate(args, argv, reference: Reference, generated: GeneratedImages, loaded: LoadedCheckpoint | None,
             output: Path) -> None:
    """Measure one set of images: prints the tables, writes evaluation.json and nearest.png."""
    device, (images, labels, *_) = get_device(args.device), generated
    features = reference.extract(images, "images")
    result = compare(reference, features, labels)
    if args.cas:
        bf16 = pick_precision(args.precision, device) == "bf16"
        result["cas"] = classification_accuracy_score(reference, images, labels, device, args.seed, bf16)
    if args.likelihood:
        result["bits_per_dim"] = bits_per_dim(loaded.model, loaded.diffusion, reference.data, args.seed,
                                              args.batch_size)
    about = conditions(args, argv, reference.data, reference.floor_data, len(images))
    memorised = memorisation(reference, images, features, args.data_dir, device, output / "nearest.png")
    shares = {name: dict(zip(reference.data.class_names, class_shares(probabilities).tolist(), strict=True))
              for name, (_, probabilities) in (("images", features), ("reference", reference.features))}
    print_heading(about)
    print_figures(result)
    print_classes(shares["images"])
    print_memorisation(memorised)
    write_json(dict(figures=result, classes=shares, memorisation=memorised, **about,
                    images_sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest()), output / "evaluation.json")
    print(f"Saved {output / 'evaluation.json'} and {output / 'nearest.png'}")


def run_sweep(args, argv, reference: Reference | None, loaded: LoadedCheckpoint, output: Path) -> None:
    """Measure the samplers at all step counts: prints a table, writes sweep.json, sweep.png and sweep_images.png.

    Without a reference: only make this process's part of the images, which another process measures.
    """
    def measure(generated: GeneratedImages) -> dict[str, dict]:
        features = extract_features(generated.images, reference.classifier, reference.inception)
        return compare(reference, features, generated.labels)

    make = partial(make_images, args, loaded)
    # A warm-up, so that the seconds of the first row are comparable:
    make(loaded.samplers[0], 1, args.guidance_scale[0], min(args.batch_size, args.num_images))
    run = partial(sweep, loaded.samplers, args.sweep, args.guidance_scale, make)
    if not reference:
        run(measure=lambda _: {}, show=lambda _: None)
        return
    about = conditions(args, argv, reference.data, reference.floor_data, args.num_images)
    print_heading(about)
    print_table_header()
    rows, pictures = run(measure, print_table_row)
    print(f"{'real images':51} {reference.floor['frechet_distance']['value']:9.4f}")
    plot_sweep(rows, output / "sweep.png")
    plot_cells(rows, pictures, output / "sweep_images.png")
    write_json(dict(rows=rows, **about), output / "sweep.json")
    print(f"Saved {output / 'sweep.json'}, {output / 'sweep.png'} and {output / 'sweep_images.png'}")


@script
def main(argv=None):
    args = parse_args(argv)
    args.device = distributed.local_device(args.device)
    device = get_device(args.device)
    distributed.start(device)
    if distributed.size() > 1 and not args.checkpoint:
        raise UserError("several processes only help to make images: without --checkpoint leave torchrun out")
    if args.train_features:
        bf16 = pick_precision(args.precision, device) == "bf16"
        print(train_feature_network(args.train_features, args.data_dir, device, args.seed, bf16,
                                    progress_bar("training")))
        return
    torchmetrics_image()  # an error now, not after the images are made
    with distributed.first_alone():  # a download happens once; an error is raised by all
        loaded = open_checkpoint(args) if args.checkpoint else None
        output = Path(args.output_dir) if distributed.rank() else check_writable(args.output_dir)
        data = load_dataset(args.dataset, args.reference, args.data_dir)
        shape, classes = data.images.shape[1:], len(data.class_names)
        generated = None if loaded else GeneratedImages(*read_images(Path(args.images), shape, classes), 0, 0)
        if args.cas and (loaded or generated).labels is None:
            raise UserError("--cas needs labels: a checkpoint trained with --conditional, or `labels` in the .npz")
        count = args.num_images if loaded else len(generated.images)
        networks = open_networks(data.name, args.features, count, device)
    reference = None if distributed.rank() else make_reference(data, count, *networks, args.data_dir)
    if args.sweep:
        run_sweep(args, argv, reference, loaded, output)
    else:
        generated = generated or make_images(args, loaded, args.sampler, args.steps, *args.guidance_scale)
        if reference:
            evaluate(args, argv, reference, generated, loaded, output)
    distributed.finish()


if __name__ == "__main__":
    sys.exit(main())
