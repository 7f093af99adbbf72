"""Pack a checkpoint into models/pretrained/, so that every script can read it by its name.

    python train.py --dataset mnist --budget 10m --output_dir outputs/mnist
    python evaluate.py --checkpoint outputs/mnist/model_final.pt
    python -m benchmarks.pretrained --checkpoint outputs/mnist/model_final.pt --name mnist

Writes NAME.pt and its entry in index.json: the sha256, the command and the machine from the run.json beside the
checkpoint, and the figures from its evaluation.json.

NAME.pt is a checkpoint like any other, but only for making images: the moving average of the weights in half
precision, which `model` and `ema` share, no state of the optimiser, and few records of the losses.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import FIELDS, load_checkpoint, load_model, save_checkpoint, to_precision
from data import code_of
from evaluation.report import evaluation_of
from runtime import checkpoints
from runtime.errors import UserError
from runtime.files import file_digest, write_json
from runtime.parser import Parser
from runtime.sampling import sampling_options
from runtime.script import script
from samplers import all_images
from training import run_record
from utils import evenly_spaced

RECORDS = 20  # of the losses that are kept
COMPARED_IMAGES = 20


def parse_args(argv: Sequence[str] | None):
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="the file of train.py to pack")
    parser.add_argument("--name", required=True, help="the name by which scripts read it: the name of the data set")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name):
        parser.error(f"--name must be made of lower-case letters, digits and _, not {args.name!r}")
    if not Path(args.checkpoint).is_file():
        parser.error(f"there is no checkpoint {args.checkpoint}: train one with python train.py")
    return args


def packed(checkpoint: dict) -> dict:
    """The fields of the packed file of a loaded checkpoint."""
    weights = to_precision(checkpoint["ema"], torch.float16)
    records = checkpoint["history"].get("records", [])
    history = dict(records=[records[i] for i in evenly_spaced(len(records), RECORDS)] if records else [], losses=[])
    fields = {name: checkpoint[name] for name in FIELDS}
    return fields | dict(model=weights, ema=weights, optimizer={}, history=history)


def rounded(value):
    """The same figures, at any depth, with at most four decimals."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def describe(path: Path, checkpoint: dict) -> dict:
    """The entry of index.json but for the sha256: how the checkpoint at `path` was trained, and its figures."""
    sittings = run_record.sittings(path.parent)
    if not sittings:
        raise UserError(f"{path.parent / run_record.NAME} is missing or damaged: give a checkpoint in the folder of "
                        f"its run")
    evaluation = evaluation_of(path)
    if not evaluation:
        raise UserError(f"{path.parent / 'evaluation.json'} is missing or of another checkpoint: measure this one with "
                        f"python evaluate.py --checkpoint {path}")
    machine = sittings[-1]["machine"]
    return dict(command=" && ".join(sitting["command"] for sitting in sittings),
                machine={name: machine[name] for name in ("processor", "cores", "threads", "device")},
                seconds=round(checkpoint["seconds"], 1), images_seen=checkpoint["images_seen"],
                precision=checkpoint["precision"], seed=checkpoint["seed"],
                measured=" ".join(["python", *evaluation["command"]]), figures=rounded(evaluation["figures"]))


def draw(path: Path) -> Tensor:
    """The first images (N, C, H, W) uint8 that the checkpoint at `path` makes, as sample.py makes them in float32."""
    model, diffusion, checkpoint = load_model(path)
    config = checkpoint["config"]
    options = sampling_options(config, count=COMPARED_IMAGES)
    return code_of(config).decode(
        all_images(model, diffusion, config["data"]["shape"], range(COMPARED_IMAGES), **options))


@script
def main(argv=None):
    args = parse_args(argv)
    path, target = Path(args.checkpoint), checkpoints.PRETRAINED / f"{args.name}.pt"
    checkpoint, index = load_checkpoint(path), checkpoints.pretrained_models()
    entry = describe(path, checkpoint)
    save_checkpoint(target, **packed(checkpoint))
    index[args.name] = dict(sha256=file_digest(target)) | entry
    write_json(dict(sorted(index.items())), checkpoints.PRETRAINED / "index.json")
    apart = (draw(path).int() - draw(target).int()).abs()
    print(f"{COMPARED_IMAGES} images of both files differ by {apart.max()} of 255 levels at most, by "
          f"{apart.float().mean():.4f} on average")
    print(f"Saved {target}, {target.stat().st_size:,} bytes: python sample.py --checkpoint {args.name}")


if __name__ == "__main__":
    sys.exit(main())
