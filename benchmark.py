"""Measure speed, memory and image quality on this machine, and compare with other toolkits.

    python benchmark.py
    python benchmark.py train sample --contestants fast ddpm
    python benchmark.py quality --budgets 1m 3m 10m --num_images 5000
    python benchmark.py gpu

train    training speed in images per second
sample   seconds for 64 and for 10,000 images
memory   peak memory of training and of sampling
scaling  how time and memory grow with batch size, width, image size and number of steps
busy     training speed on the processor alone and beside one and two busy processes, with fixed numbers of threads
         and with the number that is chosen while training
peak     FLOP/s of training as a share of the fastest matrix product, and the operations that take the time
quality  Fréchet distance above its floor after training for each of --budgets. Images are made with few steps: ours by
         the defaults of sample.py, diffusers by DPM-Solver++, denoising-diffusion-pytorch by DDIM
pictures reading 200,000 pictures of 64×64 and training on them: time, memory, and speed against pictures in memory;
         takes 8 GB of the disk, and is done only where it is named
gpu      CUDA only: quality after 10 s of training on MNIST and 60 s on Fashion-MNIST, without the start-up, and seconds
         for 10,000 images

Contestants are the recipes of train.py, the configurations in benchmarks/*.txt and, if installed (pip install -r
requirements-bench.txt), other toolkits. Ratios compare the first contestant with each of the others. Each measurement
runs in a process of its own. Writes benchmark.json, benchmark_scaling.png and benchmark_quality.png. Other programs
that run meanwhile make the numbers worse.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import busy, pictures, quality, scaling, speed
from benchmarks.context import OURS, Context, Plan
from benchmarks.machine import describe_machine
from benchmarks.peers import PEERS, is_installed
from benchmarks.plots import PLOTS
from benchmarks.tables import print_ratios
from data import DATASETS, VALIDATION_IMAGES, load_dataset
from data_sources.points import POINT_SETS
from evaluation.copies import FEW
from runtime.errors import UserError
from runtime.files import check_outputs, write_json
from runtime.parser import Parser, add_shared_flags, duration, number
from runtime.script import script
from utils import get_device

IMAGE_SETS = tuple(name for name in DATASETS if name not in POINT_SETS)
PARTS = {"train": speed.measure_train, "sample": speed.measure_sample, "memory": speed.measure_memory,
         "scaling": scaling.measure_scaling, "busy": busy.measure_busy, "peak": scaling.measure_peak,
         "quality": quality.measure_quality, "pictures": pictures.measure_pictures, "gpu": quality.measure_gpu}
FULL = Plan(seconds=8.0, epochs=4, train_images=None, batch_size=128, train_flags=(), many=10_000, few_steps=20,
            busy=dict(seconds=5.0, chosen_seconds=20.0, base_channels=48),
            pictures=dict(count=200_000, train_seconds=120, step_seconds=20.0), ddpm_steps=1000, steps_images=64,
            matrix_size=4096, gpu_seconds=dict(mnist=10.0, fashion_mnist=60.0),
            axes=dict(batch_size=(16, 32, 64, 128, 256, 512), base_channels=(32, 64, 96, 128),
                      image_size=(16, 28, 40, 64), steps=(5, 10, 20, 50, 100)))
QUICK = Plan(seconds=0.1, epochs=2, train_images=64, batch_size=16, many=128, few_steps=2, ddpm_steps=100,
             busy=dict(seconds=0.1, chosen_seconds=0.5, base_channels=8),
             pictures=dict(count=400, train_seconds=15, step_seconds=0.1), steps_images=16, matrix_size=256,
             gpu_seconds=dict(glyphs=2.0),
             train_flags=("--base_channels", "8", "--patch_size", "4", "--channel_mults", "1", "--batch_size", "16",
                          "--time_emb_dim", "16", "--depth", "1"),
             axes=dict(batch_size=(16, 32), steps=(2, 4)))


def part_name(text: str) -> str:
    """A parser of flags' values: one of PARTS."""
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PARTS)}, not {text!r}")
    return text


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="*", type=part_name, metavar="what",
                        help=f"any of {', '.join(PARTS)} (default: all but pictures; gpu only on CUDA)")
    parser.add_argument("--contestants", nargs="+", choices=(*OURS, *PEERS), default=[*OURS, *PEERS],
                        help="the contestants to compare; peak measures only ours; scaling, busy and gpu only the "
                             "first of ours")
    parser.add_argument("--budgets", nargs="+", type=duration, default=[60.0, 180.0], metavar="TIME",
                        help="the training times of quality: 90s, 10m, 1.5h")
    parser.add_argument("--num_images", type=number(int, FEW, VALIDATION_IMAGES), default=VALIDATION_IMAGES,
                        help="the number of images that quality evaluates, at most as many as its floor has")
    parser.add_argument("--image_time", type=duration, default=300.0, metavar="TIME",
                        help="the maximum sampling time for each figure of quality; if it is too short, fewer images "
                             "are evaluated, and a line says so")
    parser.add_argument("--limit", type=number(float, 0), default=30.0,
                        help="the maximum seconds for each figure of sample; a longer time is measured in part, "
                             "extrapolated, and marked")
    parser.add_argument("--quick", action="store_true",
                        help="take tiny networks and few steps, to test that everything works; the numbers mean "
                             "nothing")
    parser.add_argument("--dataset", choices=IMAGE_SETS, default="mnist", metavar="NAME",
                        help=f"the images to learn from: {', '.join(IMAGE_SETS)}")
    add_shared_flags(parser, "data_dir", "output_dir", "device", "seed")
    parser.set_defaults(output_dir="outputs/benchmark")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(budgets=[15.0], num_images=500, limit=1.0)
        args = parser.parse_args(argv)
    return args


def chosen_parts(what: Sequence[str], device: str) -> list[str]:
    """The parts that the arguments name, in the order of PARTS. Without a name: all but pictures, gpu only on CUDA."""
    left_out = {"pictures"} | (set() if "cuda" in device else {"gpu"})
    return [name for name in PARTS if (name in what if what else name not in left_out)]


def plot_name(part: str) -> str:
    """The file with the plot of a part."""
    return f"benchmark_{part}.png"


def check(args, parts: Sequence[str]) -> None:
    """UserError if something cannot be measured."""
    check_outputs([Path(args.output_dir) / name for name in ("benchmark.json", *map(plot_name, PLOTS))])
    if list(parts) == ["pictures"]:  # which are drawn, and learned by the defaults alone
        return
    load_dataset(args.dataset, "train", args.data_dir)
    missing = [name for name in args.contestants if name in PEERS and not is_installed(name)]
    if set(missing) == set(args.contestants):
        raise UserError("no contestant is left: pip install -r requirements-bench.txt, or name one of ours: "
                        f"--contestants {' '.join(OURS)}")
    if {"scaling", "busy", "peak", "gpu"} & set(parts) and not set(args.contestants) & set(OURS):
        raise UserError(f"scaling, busy, peak and gpu measure only ours: add one of {', '.join(OURS)} to --contestants")
    if missing:
        print(f"Left out {' and '.join(missing)}: pip install -r requirements-bench.txt", file=sys.stderr)


def print_machine(machine: dict, quick: bool) -> None:
    load = "unknown" if machine["load"] is None else f"{machine['load']:.1f}"
    print(f"{machine['cpu']}, {machine['cores']} cores, load {load}; torch {machine['torch']}; {machine['device']}"
          + ("; QUICK: the numbers mean nothing" if quick else ""))


@script
def main(argv=None):
    args = parse_args(argv)
    device = str(get_device(args.device))
    parts = chosen_parts(args.what, device)
    check(args, parts)
    start, path = time.perf_counter(), Path(args.output_dir) / "benchmark.json"
    report = dict(command=["benchmark.py", *(sys.argv[1:] if argv is None else argv)],
                  flags=dict(vars(args), what=parts, device=device), machine=describe_machine(device))
    print_machine(report["machine"], args.quick)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        context = Context(args, device, QUICK if args.quick else FULL, Path(temporary))
        for name in parts:
            found = report[name] = PARTS[name](context)
            print_ratios(found)
            report |= dict(errors=context.errors, seconds=time.perf_counter() - start)
            if name in PLOTS and (found.get("axes") or found.get("rows")):
                PLOTS[name](found, path.with_name(plot_name(name)))
            write_json(report, path)
    print(f"Saved {path} after {report['seconds'] / 60:.1f} minutes")
    return 1 if context.errors else 0


if __name__ == "__main__":
    sys.exit(main())
