"""Measure how good generated images are.

    python evaluate.py --checkpoint outputs/model_final.pt
    python evaluate.py --images samples.npz --dataset mnist
    python evaluate.py --checkpoint outputs/model_final.pt --sweep 5 10 20 50 --num_images 1000
    torchrun --nproc_per_node=2 evaluate.py --checkpoint outputs/model_final.pt

Every figure stands beside its 95 % interval and its floor: the same figure for as many real images that are not in the
reference. Fréchet distances of different n cannot be compared. Class figures need labels: those of a conditional
checkpoint, or an array `labels` in the .npz.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_model
from data import DATASETS, SPLITS, ImageData, load_dataset, to_uint8
from data_sources.pictures import read_images
from diffusion import DiffusionProcess
from evaluation.classifier import CLASSIFIERS, Classifier
from evaluation.features import (
    INCEPTION_FEATURES,
    Seen,
    load_feature_network,
    load_inception,
    look,
    new_classifier,
    torchmetrics_image,
    train_features,
    weights_digest,
)
from evaluation.metrics import (
    check_count,
    class_shares,
    closeness,
    estimate,
    figures,
    mean_without,
    nearest,
    random_groups,
)
from evaluation.sweep import Made, plot_cells, plot_sweep, print_row, print_title, sweep
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
from runtime.files import atomic_write, check_writable
from runtime.memory import within_memory
from samplers import SAMPLERS, STUDENT_SAMPLER, final_image, generate, uniform_timesteps
from utils import autocast, get_device, pick_precision, save_images

MAKING_FLAGS = ("num_images", "use_ema", "sampler", "spacing", "steps", "eta", "guidance_interval", "batch_size")
SWEEP_STEPS = (5, 10, 20, 50)
PAIRS = 16  # in nearest.png: so many of the closest, and so many others


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what (one of the three)").add_mutually_exclusive_group(required=True)
    group.add_argument("--checkpoint", help="a file that train.py wrote: images are made with it")
    group.add_argument("--images", help="ready images: a .npz with arr_0, uint8 (N, H, W, C), or a folder of PNGs")
    group.add_argument("--train_features", choices=tuple(CLASSIFIERS), metavar="DATASET",
                       help="train this data set's feature network anew: models/weights/DATASET.pt")
    group = parser.add_argument_group("how images are made from a checkpoint")
    add_shared_flags(group, *MAKING_FLAGS)
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"], nargs="+", metavar="SCALE")
    group.add_argument("--sweep", type=number(int, 1), nargs="*", metavar="STEPS",
                       help=f"instead: compare all samplers, or --sampler alone, at these step counts "
                            f"({' '.join(map(str, SWEEP_STEPS))}), with each --guidance_scale")
    group = parser.add_argument_group("how they are measured")
    group.add_argument("--dataset", choices=tuple(DATASETS),
                       help="the data set of --images; a --checkpoint names its own")
    parser.set_defaults(num_images=5000, guidance_scale=[None], batch_size=250)
    group.add_argument("--reference", choices=SPLITS,
                       help="the real images: test for what is reported, validation for every choice (default: test; "
                            "with --sweep validation)")
    group.add_argument("--features", choices=("own", "inception"), default="own",
                       help="the data set's own feature network, or Inception v3 (needs torch-fidelity; slow)")
    group.add_argument("--cas", action="store_true",
                       help="also train a classifier on the images alone and test it on real ones")
    group = parser.add_argument_group("run")
    add_shared_flags(group, "data_dir")
    group.add_argument("--output_dir", help="where results are written (default: the folder of --checkpoint; of "
                                            "--images: outputs)")
    add_shared_flags(group, "device", "precision", "seed")
    args = parser.parse_args(argv)
    check_together(args, parser)
    args.reference = args.reference or ("test" if args.sweep is None else "validation")
    args.output_dir = args.output_dir or (Path(args.checkpoint).parent if args.checkpoint else "outputs")
    return args


def check_together(args, parser: Parser) -> None:
    """UserError for flags that do not go together."""
    if args.images and not args.dataset:
        parser.error(f"--images needs --dataset, the real images to compare with: {', '.join(DATASETS)}")
    for name in (*MAKING_FLAGS, "guidance_scale", "sweep"):
        if name in parser.typed and not args.checkpoint:
            parser.error(f"--{name} needs --checkpoint: it says how images are made")
    if args.sweep is not None and args.cas:
        parser.error("--cas and --sweep do not go together: run --cas with the sampler that you choose")
    if args.sweep is not None and args.steps:
        parser.error("--steps and --sweep do not go together: name the step counts after --sweep")
    if len(args.guidance_scale) > 1 and args.sweep is None:
        parser.error("several values of --guidance_scale need --sweep")


# ------------------------------------------------------------------------------------------------- images to measure


class Source(NamedTuple):
    """A checkpoint to make images with, the labels (N,) they are asked for, or None, and the samplers to compare."""

    model: nn.Module
    diffusion: DiffusionProcess
    shape: Sequence[int]
    labels: Tensor | None
    samplers: Sequence[str]


def open_checkpoint(args) -> Source:
    """Load --checkpoint and set --dataset by it. UserError if the flags ask for what it cannot do."""
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
    if model.num_classes:  # image k is asked for the class of training image k: the shares are the data's
        known = load_dataset(args.dataset, "train", args.data_dir).labels
        labels = known[torch.arange(args.num_images) % len(known)]
    elif args.guidance_scale not in ([None], [1.0]):
        raise UserError(f"{args.checkpoint} was trained without --conditional: leave out --guidance_scale")
    args.guidance_scale = [guidance(scale, labels, student) for scale in args.guidance_scale]
    samplers = [args.sampler] if args.sampler else [name for name in SAMPLERS if (name == STUDENT_SAMPLER) == student]
    check_useful(args, samplers, guided=set(args.guidance_scale) != {1})
    args.eta = args.eta or 0.0
    return Source(model, diffusion, data["shape"], labels, samplers)


def make_images(args, source: Source, sampler: str, steps: int, scale: float, count: int | None = None) -> Made:
    """Images by the checkpoint's network; each process makes its share of them. UserError if they are not finite."""
    evaluations, count, device = [], count or args.num_images, source.diffusion.device
    mine = range(count)[distributed.share(count)]
    batches = partial(generate, source.model, source.diffusion, source.shape, mine, seed=args.seed, sampler=sampler,
                      steps=steps, spacing=args.spacing, eta=args.eta, labels=source.labels, guidance_scale=scale,
                      guidance_interval=args.guidance_interval)
    counter = source.model.register_forward_hook(lambda _, inputs, __: evaluations.append(len(inputs[0])))
    start = time.perf_counter()
    with (tqdm(total=len(mine), unit="image", desc=f"{sampler}, {steps} steps", leave=False,
               disable=distributed.rank() > 0) as bar,
          autocast(device, pick_precision(args.precision, device))):
        images = within_memory(partial(quantised, bar), lambda n: batches(batch_size=n), args.batch_size, device)
    counter.remove()
    if not distributed.gather(torch.tensor([images is not None])).all():
        raise UserError(f"{args.checkpoint} makes images that are not finite numbers: train it again")
    images = distributed.gather(torch.cat([torch.empty(0, *source.shape, dtype=torch.uint8), *images]))
    evaluated = distributed.gather(torch.tensor([sum(evaluations)])).sum().item()
    return Made(images, source.labels, evaluated / count, time.perf_counter() - start)


def quantised(bar: tqdm, batches: Iterator) -> list[Tensor] | None:
    """The images of each batch as uint8, as those in files are; None as soon as they are not finite."""
    images = []
    for batch, trajectory in batches:
        x = final_image(trajectory)
        if not x.isfinite().all():
            return None
        images.append(to_uint8(x).cpu())
        bar.update(len(batch))
    return images


# -------------------------------------------------------------------------------------------------------- measuring


class Yardstick(NamedTuple):
    """What images are measured with: the networks, the reference as they see it, and the floor's images and figures."""

    classifier: Classifier
    inception: nn.Module | None
    data: ImageData
    reference: Seen
    floor_data: ImageData
    floor: dict[str, dict]


def some(data: ImageData, count: int) -> ImageData:
    """`count` images of a split (or all), always the same, from anywhere in it: its order may mean something."""
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:count]
    return ImageData(data.name, data.split, data.images[chosen], data.labels[chosen], data.class_names)


def progress(title: str):
    """A bar for what metrics.py loops over."""
    return partial(tqdm, desc=title, leave=False)


def open_networks(args, dataset: str, count: int) -> tuple[Classifier, nn.Module | None]:
    """The classifier and Inception, if it is asked for, to look at `count` images. UserError if these are too few."""
    device = get_device(args.device)
    classifier = load_feature_network(dataset, device)
    inception = load_inception().to(device) if args.features == "inception" else None
    check_count(count, INCEPTION_FEATURES if inception else classifier.head.in_features)
    return classifier, inception


def make_yardstick(args, data: ImageData, count: int, classifier: Classifier, inception: nn.Module | None) -> Yardstick:
    """For `count` images against `data`; the floor is of another split, on which no network was trained."""
    other = load_dataset(data.name, "test" if data.split == "validation" else "validation", args.data_dir)
    floor_data = some(other, count)
    reference = look(data.images, classifier, inception, progress(data.split))
    floor = figures(look(floor_data.images, classifier, inception, progress("floor")), reference, floor_data.labels)
    return Yardstick(classifier, inception, data, reference, floor_data, floor)


def measure(yardstick: Yardstick, seen: Seen, labels: Tensor | None) -> dict[str, dict]:
    """The figures of what the networks see in generated images, each with its floor."""
    result = figures(seen, yardstick.reference, labels)
    return {name: dict(figure, floor=yardstick.floor[name]["value"]) for name, figure in result.items()}


def classification_accuracy(args, yardstick: Yardstick, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The classification accuracy score: how well a classifier that knows only these images does on the real reference.

    Ravuri and Vinyals 2019. The recipe is that of the feature network; the floor is the same for as many real images.
    The interval is over the reference images: it does not contain the chance of the training.
    """
    data, device = yardstick.data, get_device(args.device)
    bf16 = pick_precision(args.precision, device) == "bf16"

    def correct(images: Tensor, labels: Tensor, title: str) -> Tensor:
        model = new_classifier(data.name, images, labels, device, args.seed, bf16, progress(title))
        return look(data.images, model).probabilities.argmax(1) == data.labels
    right = correct(images, labels, "learning from the images")
    floor = correct(yardstick.floor_data.images, yardstick.floor_data.labels, "learning from real images")
    result = estimate(mean_without(right, random_groups(len(right))), 0.0, 1.0)
    return dict(result, n=len(images), floor=floor.double().mean().item())


def memorisation(args, yardstick: Yardstick, images: Tensor, seen: Seen, path: Path) -> dict:
    """How close images are to training images, compared with unseen real test images; draws pairs to `path`.

    `path` shows image | nearest in pixels | nearest in features: first the closest ones, then others.
    """
    name, device = yardstick.data.name, get_device(args.device)
    train = load_dataset(name, "train", args.data_dir).images
    real = some(load_dataset(name, "test", args.data_dir), len(images)).images
    sight = partial(look, classifier=yardstick.classifier, inception=yardstick.inception)
    queries = torch.cat([images, real]).to(device)
    pixels, same_pixels = nearest(queries, train, progress("nearest in pixels"))
    features = torch.cat([seen.features, sight(real, progress=progress("test")).features])
    known = sight(train, progress=progress("train")).features
    feature, same_feature = nearest(features.to(device), known, progress("nearest in features"))
    closest = pixels[:len(images)].argsort()[:PAIRS]
    shown = torch.cat([closest, torch.arange(min(PAIRS, len(images)))])
    columns = [images[shown], train[same_pixels[shown]], train[same_feature[shown]], torch.full_like(images[shown], 64)]
    save_images(torch.stack(columns, 1).flatten(0, 1), path, columns=16, quantise=False)
    return dict(pixels=closeness(pixels[:len(images)], pixels[len(images):]),
                features=closeness(feature[:len(images)], feature[len(images):]),
                training_images=len(train), real_images=len(real))


# -------------------------------------------------------------------------------------------------------- reporting


def circumstances(args, argv, yardstick: Yardstick, count: int) -> dict:
    """All that is needed to repeat a measurement, apart from the machine."""
    import torchmetrics
    import torchvision

    made = dict(images=args.images)
    if args.checkpoint:
        made = dict(checkpoint=args.checkpoint, use_ema=args.use_ema, seed=args.seed, sampler=args.sampler,
                    steps=args.steps, spacing=args.spacing, eta=args.eta, guidance_scale=args.guidance_scale,
                    guidance_interval=args.guidance_interval, batch_size=args.batch_size, processes=distributed.size(),
                    checkpoint_sha256=hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest())
    device = get_device(args.device)
    return dict(command=["evaluate.py", *(sys.argv[1:] if argv is None else argv)], **made,
                dataset=yardstick.data.name, num_images=count,
                reference=dict(split=yardstick.data.split, n=len(yardstick.data.images)),
                floor=dict(split=yardstick.floor_data.split, n=len(yardstick.floor_data.images)),
                features=args.features, feature_network_sha256=weights_digest(yardstick.data.name),
                device=device.type, precision=pick_precision(args.precision, device),
                versions=dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__,
                              torchvision=torchvision.__version__, torchmetrics=torchmetrics.__version__))


def write_json(content, path: Path) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def print_figures(result: dict[str, dict], about: dict) -> None:
    """The table: a line for each figure."""
    print_heading(about)
    print(f"{'':17} {'value':>9}   {'95 % interval':^19}   {'floor':>9} {'n':>7}")
    for name, f in result.items():
        print(f"{name:17} {f['value']:9.4f}   {f['low']:9.4f}{f['high']:10.4f}   {f['floor']:9.4f} {f['n']:7,}")


def print_heading(about: dict) -> None:
    print(f"{about['dataset']}: {about['num_images']:,} images against the {about['reference']['n']:,} of "
          f"{about['reference']['split']}; floor: {about['floor']['n']:,} real images of {about['floor']['split']}; "
          f"features: {about['features']}")


def print_memorisation(report: dict) -> None:
    print(f"Nearest of {report['training_images']:,} training images, compared with {report['real_images']:,} real "
          f"test images:")
    for space in ("pixels", "features"):
        r = report[space]
        print(f"  in {space:8}  closer than 99 % of them: {r['closer_than_99_percent']:.2%} (1 % is expected), "
              f"than any of them: {r['closer_than_any_real']:.2%}, copies: {r['copies']:.2%}; "
              f"median distance {r['median']:.3f}, theirs {r['real_median']:.3f}")


def evaluate(args, argv, yardstick: Yardstick, made: Made, output: Path) -> None:
    """Measure one set of images: table, evaluation.json, nearest.png."""
    seen = look(made.images, yardstick.classifier, yardstick.inception, progress("images"))
    result = measure(yardstick, seen, made.labels)
    if args.cas:
        result["cas"] = classification_accuracy(args, yardstick, made.images, made.labels)
    about = circumstances(args, argv, yardstick, len(made.images))
    report = memorisation(args, yardstick, made.images, seen, output / "nearest.png")
    shares = {who: dict(zip(yardstick.data.class_names, class_shares(s.probabilities).tolist(), strict=True))
              for who, s in (("images", seen), ("reference", yardstick.reference))}
    print_figures(result, about)
    print("Classes: " + ", ".join(f"{name} {share:.1%}" for name, share in shares["images"].items()))
    print_memorisation(report)
    pixels = hashlib.sha256(made.images.numpy().tobytes()).hexdigest()
    write_json(dict(figures=result, classes=shares, memorisation=report, **about, images_sha256=pixels),
               output / "evaluation.json")
    print(f"Saved {output / 'evaluation.json'} and {output / 'nearest.png'}")


def run_sweep(args, argv, yardstick: Yardstick | None, source: Source, output: Path) -> None:
    """Measure the samplers at all step counts: table, sweep.json, sweep.png, sweep_images.png.

    Without a yardstick: only make the images, which another process measures.
    """
    def measured(made: Made) -> dict[str, dict]:
        return measure(yardstick, look(made.images, yardstick.classifier, yardstick.inception), made.labels)

    make = partial(make_images, args, source)
    # So that no row pays for the start:
    make(source.samplers[0], 1, args.guidance_scale[0], min(args.batch_size, args.num_images))
    run = partial(sweep, source.samplers, args.sweep, args.guidance_scale, make)
    if not yardstick:
        run(measure=lambda _: {}, show=lambda _: None)
        return
    about = circumstances(args, argv, yardstick, args.num_images)
    print_heading(about)
    print_title()
    rows, pictures = run(measured, print_row)
    print(f"{'real images':51} {yardstick.floor['frechet_distance']['value']:9.4f}")
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
        raise UserError("several processes share the making of images: without --checkpoint leave torchrun out")
    if args.train_features:
        bf16 = pick_precision(args.precision, device) == "bf16"
        print(train_features(args.train_features, args.data_dir, device, args.seed, bf16, progress("training")))
        return
    torchmetrics_image()
    with distributed.first_alone():  # a download; and what is refused is refused by all
        source = open_checkpoint(args) if args.checkpoint else None
        output = Path(args.output_dir) if distributed.rank() else check_writable(args.output_dir)
        data = load_dataset(args.dataset, args.reference, args.data_dir)
        shape, classes = data.images.shape[1:], len(data.class_names)
        made = None if source else Made(*read_images(Path(args.images), shape, classes), nfe=0, seconds=0)
        if args.cas and (source or made).labels is None:
            raise UserError("--cas needs labels: a checkpoint trained with --conditional, or `labels` in the .npz")
        count = args.num_images if source else len(made.images)
        networks = open_networks(args, data.name, count)
    yardstick = None if distributed.rank() else make_yardstick(args, data, count, *networks)
    if args.sweep:
        run_sweep(args, argv, yardstick, source, output)
    else:
        made = made or make_images(args, source, args.sampler, args.steps, *args.guidance_scale)
        if yardstick:
            evaluate(args, argv, yardstick, made, output)
    distributed.finish()


if __name__ == "__main__":
    sys.exit(main())
