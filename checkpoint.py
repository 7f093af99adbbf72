"""The file format: everything that a run has learned and everything needed to go on or to make images, in one dict.

    format            FORMAT
    config            {"model", "diffusion", "data", "training"}: JSON types only; the first two rebuild both
    model, ema        weights by name, the second their exponential moving average: the same keys
    optimizer         the optimiser's state_dict
    step, epoch, images_seen, seconds, precision, seed
    history           {"records": the lines of metrics.jsonl, "losses": of the steps since the last of them}
"""

import json
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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each raise their own for a damaged or foreign file
        raise ValueError(f"{path} is damaged or no checkpoint: {_first_sentence(error)}") from error
    problem = _problem(checkpoint)
    if problem:
        raise ValueError(f"{path} is no checkpoint of this project: {problem}")
    return checkpoint


def load_model(path: str | Path, device="cpu", use_ema: bool = True) -> tuple[nn.Module, DiffusionProcess, dict]:
    """(model, diffusion, checkpoint): network and process rebuilt from the file's own config, in eval mode on `device`.

    use_ema: the moving average of the weights, which makes the better images. ValueError: as load_checkpoint.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = create_model(**checkpoint["config"]["model"])
        diffusion = DiffusionProcess(**checkpoint["config"]["diffusion"])
        model.load_state_dict(checkpoint["ema" if use_ema else "model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the weights or the config of {path} do not fit: {_first_sentence(error)}") from error
    return model.to(device).eval().requires_grad_(False), diffusion.to(device), checkpoint


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
