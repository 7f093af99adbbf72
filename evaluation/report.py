"""What evaluate.py prints, and the conditions of a measurement that it records."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.autoencoder import SUFFIX
from evaluation.classifier import weights_digest
from runtime import distributed
from runtime.errors import UserError
from runtime.files import file_digest, finite_number, quoted
from runtime.version import __version__
from utils import pick_precision

SAMPLING = ("seed", "sampler", "steps", "spacing", "eta", "guidance_scale", "guidance_interval", "batch_size")


def evaluation_of(checkpoint: Path) -> dict | None:
    """What evaluate.py has written of this very file into evaluation.json beside it; None if nothing.

    UserError if that file is damaged.
    """
    path = checkpoint.parent / "evaluation.json"
    measure = f"measure the checkpoint with python evaluate.py --checkpoint {quoted(checkpoint)}"
    try:
        report = json.loads(path.read_text()) if path.is_file() else {}
        if report.get("checkpoint_sha256") != file_digest(checkpoint):
            return None
        for figure in report["figures"].values():
            numbers = [figure[name] for name in ("value", "low", "high")]
            numbers += [] if figure["floor"] is None else [figure["floor"]]
            if None in map(finite_number, numbers):
                raise TypeError("a figure is no number")
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {measure}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {measure}") from error
    return report


def conditions(args, command: Sequence[str], device: torch.device, reference, count: int,
               options: dict | None) -> dict:
    """All that is needed to repeat a measurement of `count` images, apart from the machine.

    reference: a `Reference`.
    options: the arguments of samplers.generate; None for a sweep, whose rows have them, and for ready images.
    """
    import torchmetrics
    import torchvision

    made = dict(images=args.images)
    if args.checkpoint:
        sampling = {name: getattr(args, name) for name in SAMPLING} | {
            name: value for name, value in (options or {}).items() if name in SAMPLING}
        made = dict(checkpoint=args.checkpoint, checkpoint_sha256=file_digest(args.checkpoint), use_ema=args.use_ema,
                    processes=distributed.world_size(), **sampling)
    data, floor_data = reference.data, reference.floor_data
    return dict(command=list(command), version=__version__, **made,
                dataset=data.name, num_images=count, reference=dict(split=data.split, n=len(data.images)),
                floor=dict(split=floor_data.split, n=len(floor_data.images)),
                features=args.features,
                feature_network_sha256=weights_digest(data.source, "" if data.class_names else SUFFIX),
                autoencoder_sha256=weights_digest(data.source, SUFFIX),
                device=device.type, precision=pick_precision(args.precision, device),
                versions=dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__,
                              torchvision=torchvision.__version__, torchmetrics=torchmetrics.__version__))


def print_heading(about: dict) -> None:
    """Print what is compared with what; about: the `conditions`."""
    print(f"{about['dataset']}: {about['num_images']:,} images against the {about['reference']['n']:,} of "
          f"{about['reference']['split']}; floor: {about['floor']['n']:,} real images of {about['floor']['split']}; "
          f"features: {about['features']}")


def print_figures(figures: dict[str, dict]) -> None:
    """Print the table: one line for each figure, "-" where it has no floor."""
    width = max(map(len, figures))
    print(f"{'':{width}} {'value':>9}   {'95 % interval':^19}   {'floor':>9} {'n':>7}")
    for name, f in figures.items():
        floor = "-" if f["floor"] is None else f"{f['floor']:.4f}"
        print(f"{name:{width}} {f['value']:9.4f}   {f['low']:9.4f}{f['high']:10.4f}   {floor:>9} {f['n']:7,}")


def print_classes(shares: dict[str, float]) -> None:
    """Print the share of each class among the generated images."""
    if shares:
        print("Classes: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


def print_memorisation(report: dict) -> None:
    """Print the result of `memorisation`, in pixels and in features."""
    print(f"Distance to the nearest of {report['training_images']:,} training images, compared with "
          f"{report['real_images']:,} real test images:")
    for space in ("pixels", "features"):
        r = report[space]
        print(f"  in {space:8}  closer than 99 % of them: {r['closer_than_99_percent']:.2%} ({r['expected']:.1%} is "
              f"expected), than any of them: {r['closer_than_any_real']:.2%}, copies: {r['copies']:.2%}; "
              f"median distance {r['median']:.3f}, of the real images {r['real_median']:.3f}")
