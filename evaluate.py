"""Measure how good generated images are.

    python evaluate.py
    python evaluate.py --images samples.npz --dataset mnist
    python evaluate.py --checkpoint mnist --sweep 5 10 20 50 --num_images 1000
    torchrun --nproc_per_node=2 evaluate.py --checkpoint outputs/model_final.pt
    python evaluate.py --compare outputs/old/model_final.pt outputs/new/model_final.pt
    python evaluate.py --runs outputs

    lower is better       frechet_distance, kernel_distance, class_distance, class_frechet, levels,
                          autoencoder_distance, two_sample_pixels, two_sample_shapes, bits_per_dim, mark_distance
    higher is better      precision, recall, coverage, autoencoder_precision, autoencoder_recall, asked_class, cas,
                          scene_right
    as for real images    density, confident

Every figure is printed with its 95 % interval and its floor: the same figure for as many real images that are not in
the reference, at most 5,000 of validation or, with --reference validation, 10,000 of test. Fréchet distances of
different n cannot be compared. asked_class and cas need labels: a conditional checkpoint, or an array `labels` in the
.npz. two_sample_pixels is how often a network, trained for it, tells the images from real ones, two_sample_shapes the
same in black and white. Of scenes, scene_right is the share with the asked number of objects, in clear colours, and
mark_distance how much the shares of the colours and kinds of objects differ. A line at the end says what gives the
images away.

Written beside the checkpoint, or to --output_dir: evaluation.json, and nearest.png with the training images that are
nearest to the images; --sweep writes sweep.json and two pictures, --compare compare.json. The floors of a reference,
and the features of real images, are kept in the folder floors of --data_dir.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from checkpoint import check_same_data, load_checkpoint
from data import DATASETS, SPLITS, load_dataset
from evaluation.autoencoder_training import train_second_network
from evaluation.classifier_training import train_feature_network
from evaluation.compare import check_comparable, comparison, is_ready, print_comparison
from evaluation.copies import FEW, refuse_few, report_copies, too_few
from evaluation.features import extract_features
from evaluation.inputs import (
    SWEEP_STEPS,
    GeneratedImages,
    LoadedCheckpoint,
    make_images,
    open_checkpoint,
    ready_images,
)
from evaluation.metrics import figure_values, named_shares, torchmetrics_image
from evaluation.reference import (
    LIKELIHOOD_IMAGES,
    Reference,
    choose_floor_data,
    classification_accuracy_score,
    compare,
    likelihood,
    make_reference,
    memorisation,
    open_networks,
    reference_images,
    two_sample_bars,
    two_sample_floor,
    two_sample_test,
)
from evaluation.report import conditions, print_classes, print_figures, print_heading, print_memorisation
from evaluation.runs import list_runs
from evaluation.sweep import plot_cells, plot_sweep, print_table_header, print_table_row, sweep
from evaluation.two_sample import two_sample_values
from evaluation.verdict import verdict
from runtime import distributed, threads
from runtime.checkpoints import folder_of_results, with_checkpoint
from runtime.errors import UserError
from runtime.files import check_outputs, write_json
from runtime.parser import PICTURE_FLAGS, SHARED_FLAGS, Parser, add_shared_flags, number, refuse_picture_flags
from runtime.progress import Bar, progress
from runtime.sampling import chosen_dataset, dataset_of, given_pictures
from runtime.script import script
from training.run_folder import JUDGED
from utils import get_device, pick_precision

SAMPLING_FLAGS = ("use_ema", "sampler", "spacing", "steps", "eta", "guidance_interval", "batch_size")


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to measure (one of these)").add_mutually_exclusive_group()
    add_shared_flags(group, "checkpoint")
    group.add_argument("--images", help="existing images: a .npz with arr_0 (or images), uint8 (N, H, W, C), or a "
                                        "folder of PNGs")
    group.add_argument("--train_features", choices=tuple(DATASETS), metavar="DATASET",
                       help="train this data set's feature networks again: DATASET.pt and DATASET_autoencoder.pt in "
                            "evaluation/weights")
    group.add_argument("--compare", nargs=2, metavar=("A", "B"),
                       help="each figure of A, of B and their difference: two checkpoints, which start from the same "
                            "noise, or ready images as for --images")
    group.add_argument("--runs", metavar="FOLDER",
                       help="list the runs below a folder with their flags, times and figures; writes FOLDER/runs.csv")
    group = parser.add_argument_group("how a checkpoint makes images")
    group.add_argument("--num_images", **SHARED_FLAGS["num_images"] | dict(
        default=5000, help="the number of images to make; of ready images, how many of the first are measured "
                           "(default: 5000; of a checkpoint of your own pictures at most as "
                           "many as are held out; all ready images)"))
    add_shared_flags(group, *SAMPLING_FLAGS)
    group.add_argument("--guidance_scale", **SHARED_FLAGS["guidance_scale"], nargs="+", metavar="SCALE")
    group.add_argument("--sweep", type=number(int, 1), nargs="*", metavar="STEPS",
                       help=f"compare all samplers, or only --sampler, at these step counts (default: "
                            f"{' '.join(map(str, SWEEP_STEPS))}), with each --guidance_scale")
    group = parser.add_argument_group("how images are measured")
    group.add_argument("--dataset", **SHARED_FLAGS["dataset"] | dict(
                       default=None, help="the data set of --images, or the path of your own pictures (of "
                                          "--checkpoint: its own)"))
    add_shared_flags(group, *PICTURE_FLAGS)
    parser.set_defaults(guidance_scale=[None], batch_size=250)
    group.add_argument("--reference", choices=SPLITS,
                       help="the real images to compare with: test for results, validation for choices (default: "
                            "test; with --sweep: validation); of more than 10,000 pictures of your own, 10,000 random "
                            "ones")
    group.add_argument("--features", choices=("own", "inception"), default="own",
                       help="the network whose features are compared: own, the data set's classifier; inception, "
                            "Inception v3, which is slow and needs torch-fidelity")
    group.add_argument("--cas", action="store_true",
                       help="also the classification accuracy score, higher is better: train a classifier on the "
                            "generated images and test it on real images")
    group.add_argument("--likelihood", action="store_true",
                       help=f"also bits_per_dim, lower is better: the variational bound of -log2 p per dimension, "
                            f"over {LIKELIHOOD_IMAGES:,} real images")
    group = parser.add_argument_group("run")
    add_shared_flags(group, "data_dir")
    group.add_argument("--output_dir", help="the folder for the results (default: the folder of --checkpoint, of a "
                                            "pretrained one outputs/pretrained/NAME; with --images: outputs)")
    add_shared_flags(group, "device", "precision", "threads", "seed")
    args = parser.parse_args(argv)
    check_flags(args, parser)
    args.given_images = args.num_images if "num_images" in parser.typed else None
    return args


def measures_checkpoint(args: Namespace) -> bool:
    """Whether a checkpoint makes the images that are measured; without --checkpoint it is the default one."""
    return all(other is None for other in (args.images, args.train_features, args.compare, args.runs))


def check_flags(args, parser: Parser) -> None:
    """UserError for flags that cannot be combined."""
    if args.runs and (others := sorted(parser.typed - {"runs"})):
        parser.error(f"--runs only reads files, so that --{others[0]} changes nothing: leave it out")
    ready = [is_ready(path) for path in args.compare] if args.compare else [args.images is not None]
    if any(ready) and not args.dataset:
        parser.error(f"{'ready images need' if args.compare else '--images needs'} --dataset, the real images to "
                     f"compare with: {', '.join(DATASETS)}")
    if args.train_features and "num_images" in parser.typed:
        parser.error("--num_images changes nothing with --train_features: leave it out")
    if args.images == "":
        parser.error("--images must name a file or a folder of images, not nothing: give its path")
    for name in (*SAMPLING_FLAGS, "guidance_scale", "sweep"):
        if name in parser.typed and (all(ready) or not (measures_checkpoint(args) or args.compare)):
            parser.error(f"--{name} needs --checkpoint: it sets how a checkpoint makes images")
    for name in ("cas", "likelihood", "sweep"):
        if args.compare and name in parser.typed:
            parser.error(f"--{name} and --compare cannot be combined: run --{name} with each checkpoint")
    if measures_checkpoint(args) or (args.compare and not any(ready)):
        refuse_picture_flags(parser)
    if args.likelihood and not measures_checkpoint(args):
        parser.error("--likelihood needs --checkpoint: it is the likelihood of the checkpoint's diffusion process")
    for name in ("cas", "likelihood"):
        if args.sweep is not None and getattr(args, name):
            parser.error(f"--{name} and --sweep cannot be combined: run --{name} with the sampler that you choose")
    if args.sweep is not None and args.steps:
        parser.error("--steps and --sweep cannot be combined: give the step counts after --sweep")
    if len(args.guidance_scale) > 1 and args.sweep is None:
        parser.error("several values of --guidance_scale need --sweep")


# -------------------------------------------------------------------------------------------------------- measuring


def evaluate(args: Namespace, command: Sequence[str], reference: Reference, generated: GeneratedImages,
             loaded: LoadedCheckpoint | None, output: Path) -> None:
    """Measure one set of images: prints the tables, writes evaluation.json and nearest.png."""
    device, (images, labels, *_) = get_device(distributed.local_device(args.device)), generated
    features = reference.extract(images, "images")
    result = compare(reference, images, features, labels) | two_sample_test(reference, images, device)
    if args.cas:
        bf16 = pick_precision(args.precision, device) == "bf16"
        result["cas"] = classification_accuracy_score(reference, images, labels, device, args.seed, bf16)
    if args.likelihood:
        result["bits_per_dim"] = likelihood(loaded.model, loaded.diffusion, reference.data, loaded.code, args.seed)
    about = conditions(args, command, device, reference, len(images), loaded.options[0] if loaded else None)
    memorised = memorisation(reference, images, features, args.data_dir, device, output / "nearest.png",
                             bool(loaded and loaded.mirrored), loaded.train_images if loaded else 0)
    shares = {name: named_shares(reference.data.class_names, each.probabilities)
              for name, each in (("images", features), ("reference", reference.features))}
    print_heading(about)
    print_figures(result)
    print_classes(shares["images"])
    print_memorisation(memorised)
    print(said := verdict(result, memorised))
    write_json(dict(figures=result, classes=shares, memorisation=memorised, verdict=said, **about,
                    images_sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest()), output / "evaluation.json")
    print(f"Saved {output / 'evaluation.json'} and {output / 'nearest.png'}")


def run_sweep(args: Namespace, command: Sequence[str], reference: Reference | None, loaded: LoadedCheckpoint,
              output: Path) -> None:
    """Measure the samplers at all step counts: prints a table, writes sweep.json, sweep.png and sweep_images.png.

    Without a reference: only make this process's part of the images, which another process measures.
    """
    def measure(generated: GeneratedImages) -> dict[str, dict]:
        features = extract_features(generated.images, reference.classifier, reference.inception,
                                    autoencoder=reference.autoencoder)
        return compare(reference, generated.images, features, generated.labels)

    make = partial(make_images, args, loaded)
    # A warm-up, so that the seconds of the first row are comparable:
    make(loaded.options[0] | dict(steps=1), min(args.batch_size, args.num_images))
    run = partial(sweep, loaded.options, lambda options: make(options, args.num_images))
    if not reference:
        run(measure=lambda _: {}, show=lambda _: None)
        return
    device = get_device(distributed.local_device(args.device))
    about = conditions(args, command, device, reference, args.num_images, None)
    print_heading(about)
    print_table_header()
    rows, pictures = run(measure, print_table_row)
    print(f"{'real images':51} {reference.floor['frechet_distance']['value']:9.4f}")
    plot_sweep(rows, output / "sweep.png")
    plot_cells(rows, pictures, output / "sweep_images.png")
    write_json(dict(rows=rows, **about), output / "sweep.json")
    print(f"Saved {output / 'sweep.json'}, {output / 'sweep.png'} and {output / 'sweep_images.png'}")


def run_comparison(args: Namespace, command: Sequence[str], device: torch.device, output: Path) -> None:
    """Measure the two of --compare with the same seed: prints the table of differences, writes compare.json."""
    sides = [Namespace(**vars(args) | {"images" if is_ready(path) else "checkpoint": path}) for path in args.compare]
    sides = [fitting_count(with_checkpoint(side)) if side.checkpoint else side for side in sides]
    with distributed.local_rank_0_first():
        inputs = [load_inputs(side, device, output) for side in sides]
    _, _, data, floor_data, networks = inputs[0]
    counts = [len(floor.images) for *_, floor, _ in inputs]
    check_comparable(args.compare, [data for _, _, data, _, _ in inputs], counts)
    reference = None if distributed.rank() else make_reference(data, floor_data, *networks, args.data_dir)
    values, about = [], []
    for side, (loaded, generated, *_) in zip(sides, inputs, strict=True):
        images, labels, *_ = generated or make_images(side, loaded, loaded.options[0], counts[0])
        if reference:
            features = reference.extract(images, "images")
            with Bar("computing the figures"):
                figures = figure_values(features, reference.features, labels, (images, reference.data.images))
            bars = two_sample_bars(reference, "images")
            values.append(figures | two_sample_values(images, reference.data.images, device, bars))
            about.append(conditions(side, command, device, reference, counts[0], loaded.options[0] if loaded else None)
                         | dict(images_sha256=hashlib.sha256(images.numpy().tobytes()).hexdigest()))
    if reference:
        rows = comparison(*values, reference.floor | two_sample_floor(reference, device))
        print_heading(about[0])
        print_comparison(rows, args.compare, counts[0])
        write_json(dict(figures=rows, a=about[0], b=about[1]), output / "compare.json")
        print(f"Saved {output / 'compare.json'}")


# ------------------------------------------------------------------------------------------------------------- main


def output_folder(args: Namespace) -> Path:
    """--output_dir, else the folder of the checkpoint, else outputs/."""
    return Path(args.output_dir or (folder_of_results(args.checkpoint) if args.checkpoint else "outputs"))


def fitting_count(args: Namespace) -> Namespace:
    """The flags with as many images as the held-out pictures allow, for a checkpoint of one's own pictures.

    A number that the user gives stays as it is.
    """
    source = dataset_of(load_checkpoint(args.checkpoint), args.data_dir, args.dataset)
    if args.given_images or not isinstance(source, Path):
        return args
    held_out = min(len(load_dataset(source, split).images) for split in ("validation", "test"))
    return Namespace(**vars(args) | dict(num_images=min(args.num_images, held_out if held_out >= FEW else FEW)))


def load_inputs(args: Namespace, device: torch.device, output: Path):
    """(checkpoint or None, ready images or None, the reference's images, those of the floor, the feature networks)."""
    def check(pictures: str | None = None) -> None:
        inputs = [args.checkpoint or args.images, given_pictures(args), pictures]
        check_outputs([output / name for name in JUDGED], inputs)
    loaded = open_checkpoint(args, device, check) if args.checkpoint else check()  # None
    split = args.reference or ("test" if args.sweep is None else "validation")
    dataset = loaded.dataset if loaded else chosen_dataset(args, device.type == "cpu", quiet=True)
    data = reference_images(dataset, split, args.data_dir)
    if loaded:
        check_same_data(loaded.config, data)
    generated = None if loaded else ready_images(args, data)
    if args.cas and (loaded or generated).labels is None:
        raise UserError("--cas needs labels: a checkpoint trained with --conditional, or `labels` in the .npz")
    count = args.num_images if loaded else len(generated.images)
    if too_few(data):
        refuse_few(data, args)
        return loaded, generated, data, data, None
    floor_data = choose_floor_data(data, count, args.data_dir)
    return loaded, generated, data, floor_data, open_networks(data, args.features, count, device, args.data_dir)


@script
def main(argv=None):
    args = parse_args(argv)
    device = get_device(distributed.local_device(args.device))
    torch.set_float32_matmul_precision("highest")  # figures are comparable; a training in this process changes it
    distributed.init_process_group(device)
    threads.set_up(args.threads, device)
    if distributed.world_size() > 1 and not (measures_checkpoint(args) or args.compare):
        raise UserError("several processes only help to make images: without --checkpoint leave torchrun out")
    if args.runs is not None:
        return list_runs(Path(args.runs))
    if args.train_features:
        bf16 = pick_precision(args.precision, device) == "bf16"
        print(train_feature_network(args.train_features, args.data_dir, device, args.seed, bf16,
                                    progress("training", "steps")))
        print(train_second_network(args.train_features, args.data_dir, device, args.seed,
                                   progress("training the autoencoder", "steps")))
        return
    torchmetrics_image()  # an error now, not after the images are made
    args = fitting_count(with_checkpoint(args)) if measures_checkpoint(args) else args
    output, command = output_folder(args), ["evaluate.py", *(sys.argv[1:] if argv is None else argv)]
    if args.compare:
        run_comparison(args, command, device, output)
        return distributed.destroy_process_group()
    with distributed.local_rank_0_first():  # a download happens once; an error is raised by all
        loaded, generated, data, floor_data, networks = load_inputs(args, device, output)
    count = args.num_images if loaded else len(generated.images)
    if networks is None:
        images, *_ = generated or make_images(args, loaded, loaded.options[0], count)
        if distributed.rank() == 0:
            learned = load_dataset(data.source, "train", args.data_dir)
            learned = learned.first(loaded.train_images or None) if loaded else learned
            report_copies(images, learned, bool(loaded and loaded.mirrored), command, output)
        return distributed.destroy_process_group()
    reference = None if distributed.rank() else make_reference(data, floor_data, *networks, args.data_dir)
    if args.sweep is not None:
        run_sweep(args, command, reference, loaded, output)
    else:
        generated = generated or make_images(args, loaded, loaded.options[0], count)
        if reference:
            evaluate(args, command, reference, generated, loaded, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
