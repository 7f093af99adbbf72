"""The file format: everything that a run has learned and everything needed to go on or to make images, in one dict.

    format            FORMAT
    config            {"model", "diffusion", "data", "training"}: JSON types only; the first two rebuild both
    model, ema        weights by name, the second their exponential moving average: the same keys
    optimizer         the optimiser's state_dict
    step, epoch, images_seen, seconds, precision, seed
    history           {"records": the lines of metrics.jsonl, "losses": of the steps since the last of them}
"""

import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from diffusion import DiffusionProcess
from files import atomic_write
from models import create_model

FORMAT = "tiny-diffusion-1"
FIELDS = {"config": dict, "model": dict, "ema": dict, "optimizer": dict, "step": int, "epoch": int,
          "images_seen": int, "seconds": float, "precision": str, "seed": int, "history": dict}
CONFIG_PARTS = ("model", "diffusion", "data", "training")
# What a config from a stranger may ask for: type and largest value. Nothing is allocated beyond it.
LIMITS = {
    "model": {"image_channels": (int, 3), "base_channels": (int, 4096), "time_emb_dim": (int, 65536),
              "depth": (int, 64), "patch_size": (int, 4), "num_classes": (int, 100_000), "channel_mults": (list, 8),
              "attention": (list, 8)},
    "diffusion": {"num_timesteps": (int, 100_000)},
}
MAX_IMAGE_SIDE, MAX_MULT = 1024, 64


def save_checkpoint(path: str | Path, **fields) -> None:
    """Write a checkpoint with exactly the FIELDS to `path`; whatever happens, `path` holds a whole file or the old one.

    ValueError for missing or unknown fields and for a config that is not made of JSON types.
    """
    if fields.keys() != FIELDS.keys():
        raise ValueError(f"a checkpoint has the fields {', '.join(FIELDS)}; got {', '.join(fields)}")
    try:
        json.dumps(fields["config"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a checkpoint's config must be made of JSON types: {error}") from error
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **fields}, file)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint and check its form; its tensors lie on the CPU.

    Nothing in the file is executed (weights_only). ValueError, with the reason, for whatever is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}: train one with python train.py, "
                         f"which writes outputs/model_final.pt")
    try:
        _check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own for a damaged or foreign file
        raise ValueError(f"{path} is damaged or no checkpoint: {_first_sentence(error)}") from error
    problem = _problem(checkpoint) or _misfit(checkpoint)
    if problem:
        raise ValueError(f"{path} is no checkpoint of this project: {problem}")
    return checkpoint


def load_model(path: str | Path, device="cpu", use_ema: bool = True) -> tuple[nn.Module, DiffusionProcess, dict]:
    """(model, diffusion, checkpoint): network and process rebuilt from the file's own config, in eval mode on `device`.

    use_ema: the moving average of the weights, which makes the better images. ValueError: as load_checkpoint.
    """
    checkpoint = load_checkpoint(path)
    model = create_model(**checkpoint["config"]["model"])
    diffusion = DiffusionProcess(**checkpoint["config"]["diffusion"])
    model.load_state_dict(checkpoint["ema" if use_ema else "model"])
    return model.to(device).eval().requires_grad_(False), diffusion.to(device), checkpoint


def _check_archive(path: Path) -> None:
    """Read the file through once and compare every part with its CRC, which torch does not. ValueError if it differs.

    torch stores without compression, so that what unpacks to more than the file is no checkpoint of torch's.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than it is")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"its part {damaged} has changed since it was written")


def _misfit(checkpoint: dict) -> str | None:
    """Why the config cannot be built or its tensors are not the file's, or None; found without allocating anything."""
    config = checkpoint["config"]
    for part, limits in LIMITS.items():
        for name, (kind, largest) in limits.items():
            value = config[part].get(name)
            size = len(value) if isinstance(value, list) else value
            if value is not None and (type(value) is not kind or not 0 <= size <= largest):
                return f"its config asks for {name} {str(value)[:40]}, which is no {kind.__name__} up to {largest}"
    mults, shape = config["model"].get("channel_mults") or [], config["data"].get("shape")
    if any(type(mult) is not int or mult > MAX_MULT for mult in mults):
        return f"its config asks for channel_mults {str(mults)[:40]}"
    if not isinstance(shape, list) or len(shape) != 3 or any(
            type(side) is not int or not 1 <= side <= MAX_IMAGE_SIDE for side in shape):
        return f"its config has the image shape {str(shape)[:40]}"
    try:
        with torch.device("meta"):
            expected = create_model(**config["model"]).state_dict()
        DiffusionProcess(**config["diffusion"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return _first_sentence(error)
    return _wrong_weights(checkpoint, expected)


def _wrong_weights(checkpoint: dict, expected: dict) -> str | None:
    """The first tensor of model or ema that is missing, unknown, of another shape, or not finite, or None."""
    for part in ("model", "ema"):
        weights = checkpoint[part]
        for name in expected.keys() ^ weights.keys():
            return f"the tensor {str(name)[:60]!r} of {part} is {'missing' if name in expected else 'unknown'}"
        for name, weight in weights.items():
            if not isinstance(weight, torch.Tensor) or weight.shape != expected[name].shape:
                return f"the tensor {name!r} of {part} does not have the shape {tuple(expected[name].shape)}"
            if not bool(weight.isfinite().all()):
                return f"the tensor {name!r} of {part} holds numbers that are not finite: its run diverged"
    return None


def _problem(checkpoint) -> str | None:
    """What is wrong with the form of a loaded object, or None."""
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return f"its format is not {FORMAT!r}"
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            return f"the field {name!r} is missing or not of type {kind.__name__}"
    for part in CONFIG_PARTS:
        if not isinstance(checkpoint["config"].get(part), dict):
            return f"its config has no part {part!r}"
    return None


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200]
