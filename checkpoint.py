"""The file format: one dict with everything that is needed to continue a run or to make images.

    format            FORMAT
    version           of the program that wrote the file; missing in files from before version 1.0.0
    config            {"model", "diffusion", "data", "training"}: JSON types only; the first two rebuild both
    model, ema        weights by name, the second their exponential moving average: the same keys; float32 or, to save
                      space, float16, which load_checkpoint converts to float32
    optimizer         the optimiser's state_dict; empty in a file that is only for making images
    step, epoch, images_seen, seconds, precision, seed
    history           {"records": the lines of metrics.jsonl, "losses": of the steps since the last of them,
                      "skipped": how many steps had no finite gradient, in all and in a row until now}
"""

import json
import math
import numbers
import warnings
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from data import ImageData, code_of, refuse_points
from data_sources.pictures import FITS
from diffusion import DiffusionProcess
from learned_variance import create_process
from models import create_model
from runtime.errors import UserError
from runtime.files import atomic_write, check_archive, file_digest, one_line, verified_archive, write_json
from runtime.version import __version__
from utils import is_tensor_like

FORMAT = "tiny-diffusion-1"
SAFETENSORS = "model.safetensors"  # a checkpoint that is only for making images; the rest is in config.json beside it
FIELDS = {"config": dict, "model": dict, "ema": dict, "optimizer": dict, "step": int, "epoch": int,
          "images_seen": int, "seconds": float, "precision": str, "seed": int, "history": dict}
CONFIG_PARTS = ("model", "diffusion", "data", "training")
# The types and the largest values that a config from an unknown file may have, so that little memory is allocated.
LIMITS = {
    "model": {"image_channels": (int, 3), "base_channels": (int, 4096), "time_emb_dim": (int, 65536),
              "depth": (int, 64), "middle_depth": (int, 64), "patch_size": (int, 4), "num_classes": (int, 100_000),
              "channel_mults": (list, 8), "attention": (list, 8)},
    "diffusion": {"num_timesteps": (int, 100_000)},
}
MAX_IMAGE_SIDE, MAX_MULT, MAX_SIZE, MAX_COUNT, MAX_GUIDANCE = 1024, 64, 100_000, 2**53, 100


def save_checkpoint(path: str | Path, **fields) -> None:
    """Write a checkpoint with the FIELDS to `path`. If that fails, the old file stays.

    ValueError for missing or unknown fields and for a config that is not made of JSON types.
    """
    if fields.keys() != FIELDS.keys():
        raise ValueError(f"a checkpoint has the fields {', '.join(FIELDS)}; got {', '.join(fields)}")
    try:
        json.dumps(fields["config"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a checkpoint's config must be made of JSON types: {error}") from error
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, "version": __version__, **fields}, file)
        except RuntimeError as error:  # torch's writer hides why a write failed behind its own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint and check all of it; its tensors are on the CPU, its weights float32.

    Nothing in the file is executed (weights_only), and the memory that is allocated is a few times the file's
    size at most. UserError, with the reason, for a file that is not a checkpoint, was changed after it was written, or
    does not fit its own config.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train one with python train.py, "
                        f"which writes outputs/model_final.pt")
    try:
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs {error.name}: pip install -r requirements-export.txt") from error
    except Exception as error:  # torch, zipfile and pickle have different errors for a damaged or foreign file
        raise UserError(f"{path} is damaged or no checkpoint: {_first_sentence(error)}") from error
    try:
        problem = _problem(checkpoint, path.stat().st_size)
    except Exception as error:  # objects from an unknown file can make any comparison fail
        problem = _first_sentence(error)
    if problem:
        raise UserError(f"{path} is no checkpoint of this project: {problem}")
    for part in ("model", "ema"):
        if any(weight.dtype == torch.float16 for weight in checkpoint[part].values()):
            checkpoint[part] = {name: weight.float() for name, weight in checkpoint[part].items()}
    return checkpoint


def to_precision(weights: dict, dtype: torch.dtype) -> dict:
    """The weights in another floating-point precision; what is too large for it becomes its largest number."""
    largest = torch.finfo(dtype).max
    return {name: weight.clamp(-largest, largest).to(dtype) for name, weight in weights.items()}


def _read_archive(path: Path):
    verified = verified_archive(path)  # torch checks no CRC and trusts the headers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load_checkpoint says the same in one line
        return torch.load(verified, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict:
    from safetensors.torch import load

    weights, about = load(path.read_bytes()), json.loads(path.with_name("config.json").read_text())
    if about.pop("sha256", None) not in (None, file_digest(path)):
        raise ValueError("config.json beside it was written with other weights: export them again")
    return {**about, "model": weights, "ema": weights, "optimizer": {}, "history": {}}


def save_safetensors(folder: Path, weights: dict, checkpoint: dict) -> None:
    """Write SAFETENSORS with these weights and config.json, from which load_checkpoint makes the same images.

    config.json names the sha256 of the weights, so that nobody draws with those of another export by mistake.
    """
    from safetensors.torch import save

    about = {name: value for name, value in checkpoint.items() if name not in ("model", "ema", "optimizer", "history")}
    with atomic_write(folder / SAFETENSORS) as file:
        file.write(save({name: weight.contiguous() for name, weight in weights.items()}, {"format": "pt"}))
    write_json(about | dict(sha256=file_digest(folder / SAFETENSORS)), folder / "config.json")


def load_model(path: str | Path, device="cpu", use_ema: bool = True,
               points: bool = False) -> tuple[nn.Module, DiffusionProcess, dict]:
    """(model, diffusion, checkpoint): network and process as the config in the file says, in eval mode on `device`.

    use_ema   take the moving average of the weights, which makes better images
    points    whether the caller can use points in the plane, too

    UserError: as load_checkpoint, and for points where the caller cannot use them.
    """
    checkpoint = load_checkpoint(path)
    if not points:
        refuse_points(checkpoint["config"]["data"]["dataset"], str(path))
    model = create_model(**checkpoint["config"]["model"])
    edges = code_of(checkpoint["config"]).edges
    diffusion = create_process(model.learn_variance, edges, **checkpoint["config"]["diffusion"])
    model.load_state_dict(checkpoint["ema" if use_ema else "model"])
    return model.to(device).eval().requires_grad_(False), diffusion.to(device), checkpoint


def peek(path: Path) -> dict:
    """A checkpoint that is not checked and whose weights are not read yet. Any error if the file cannot be read."""
    check_archive(path, largest=path.stat().st_size)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def saved_step(path: Path) -> float:
    """The step of a checkpoint, read without its weights; infinity if the file cannot be read.

    A file that has not changed is read once: a run asks for the step of each of its checkpoints whenever it saves one.
    """
    try:
        status = path.stat()
        return _saved_step(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except Exception:  # load_checkpoint gives the reason
        return math.inf


@lru_cache(maxsize=256)
def _saved_step(path: Path, state: tuple) -> float:
    """The step of the file that has this state. Any error if it cannot be read."""
    step = peek(path)["step"]
    return step if type(step) is int else math.inf


# ------------------------------------------------------------------------------------ what can be wrong with a file


def _problem(checkpoint, file_size: int) -> str | None:
    """What is wrong with a loaded object, or None; found before anything is allocated for it."""
    return (_wrong_form(checkpoint) or _wrong_numbers(checkpoint) or _wrong_limits(checkpoint["config"])
            or _wrong_data(checkpoint["config"]) or _wrong_network(checkpoint, file_size))


def _wrong_form(checkpoint) -> str | None:
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        return f"its format is not {FORMAT!r}"
    if type(checkpoint.get("version", "")) is not str:
        return f"its version is {_shown(checkpoint['version'])}"
    for name, kind in FIELDS.items():
        if not isinstance(checkpoint.get(name), kind):
            return f"the field {name!r} is missing or not of type {kind.__name__}"
    for part in CONFIG_PARTS:
        if not isinstance(checkpoint["config"].get(part), dict):
            return f"its config has no part {part!r}"
    return None


def _wrong_numbers(checkpoint: dict) -> str | None:
    """Invalid counts, and a history that is not made of records and losses."""
    for name in ("step", "epoch", "images_seen", "seconds"):
        if not 0 <= checkpoint[name] <= MAX_COUNT:
            return f"the field {name!r} is {_shown(checkpoint[name])}"
    records, losses, skipped = (checkpoint["history"].get(name, []) for name in ("records", "losses", "skipped"))
    if type(records) is not list or not all(map(_is_record, records)):
        return "its history holds other things than records of numbers"
    if any(type(numbers) is not list or any(type(number) is not float for number in numbers)
           for numbers in (losses, skipped)) or len(skipped) not in (0, 2):
        return "its history holds other things than losses and the number of skipped steps"
    return None


def _is_record(record) -> bool:
    """Whether this is a valid line of metrics.jsonl."""
    return (type(record) is dict and record.keys() >= {"step", "loss", "seconds"} and type(record["step"]) is int
            and type(record["seconds"]) is float
            and all(type(name) is str and (value is None or (type(value) in (int, float) and math.isfinite(value)))
                    for name, value in record.items()))


def _wrong_limits(config: dict) -> str | None:
    for part, limits in LIMITS.items():
        for name, (kind, largest) in limits.items():
            value = config[part].get(name)
            size = len(value) if isinstance(value, list) else value
            if value is not None and (type(value) is not kind or not 0 <= size <= largest):
                return f"its config asks for {name} {_shown(value)}, which is no {kind.__name__} up to {largest}"
    for part in LIMITS:
        for name, value in config[part].items():
            if type(name) is not str or not all(map(_is_plain, value if type(value) is list else [value])):
                return f"its config has {_shown(name)} {_shown(value)}"
    if max(config["model"].get("channel_mults") or [1]) > MAX_MULT:
        return f"its config asks for channel_mults beyond {MAX_MULT}"
    return None


def _is_plain(value) -> bool:
    """Whether a value from an unknown file is small: safe to compare and to print."""
    return (value is None or type(value) in (bool, float) or (type(value) is str and len(value) <= 100)
            or (type(value) is int and abs(value) <= MAX_SIZE))


def _wrong_data(config: dict) -> str | None:
    """An image shape or class names that are invalid or do not fit the network."""
    shape, names = config["data"].get("shape"), config["data"].get("class_names")
    classes = config["model"].get("num_classes")
    if type(shape) is not list or len(shape) != 3 or any(
            type(side) is not int or not 1 <= side <= MAX_IMAGE_SIDE for side in shape):
        return f"its config has the image shape {_shown(shape)}"
    if shape[0] != config["model"].get("image_channels", 1):
        return f"its images have {shape[0]} channels, which its network is not made for"
    if type(config["data"].get("dataset")) is not str:
        return "its config does not name a dataset"
    if type(names) is not list or any(type(name) is not str for name in names):
        return "the class_names in its config are no list of names"
    if "pictures" in config["data"] and not _is_pictures(config["data"]["pictures"]):
        return "the pictures in its config are not described by their flags and digest"
    if "level_code" in config["data"] and not _is_level_code(config["data"]["level_code"]):
        return "the level_code in its config is no rising list of 256 numbers from -1 to 1"
    guidance = config["data"].get("guidance_scale", 1.0)
    if type(guidance) not in (int, float) or not 0 <= guidance <= MAX_GUIDANCE:
        return f"the guidance_scale in its config is {_shown(guidance)}"
    if classes and classes != len(names):
        return f"its config has {classes} classes and {len(names)} class_names"
    return None


def _is_pictures(about) -> bool:
    """Whether this describes pictures of one's own, as `training.flags.make_config` does; the path may be missing."""
    texts, numbers = ("path", "fit", "channels", "background", "key", "digest"), ("count", "held_out")
    return (type(about) is dict and {*texts[1:], "count"} <= about.keys() <= {*texts, *numbers}
            and all(type(about[name]) is (int if name in numbers else str) for name in about)
            and about["fit"] in FITS and about["channels"] in ("auto", "1", "3"))


def _is_level_code(points) -> bool:
    """Whether this is 256 rising numbers from -1 to 1."""
    return (type(points) is list and len(points) == 256 and all(type(point) is float for point in points)
            and points[0] == -1 and points[-1] == 1 and all(low < high for low, high in pairwise(points)))


def _wrong_network(checkpoint: dict, file_size: int) -> str | None:
    """Why no network can be built from the config, or which tensor does not fit it."""
    config, depth = checkpoint["config"], checkpoint["config"]["model"].get("depth") or 1
    if depth * len(config["model"].get("channel_mults") or [1]) > len(checkpoint["model"]):
        return "its config asks for more layers than it has tensors"
    try:
        with torch.device("meta"):
            model = create_model(**config["model"])
        create_process(model.learn_variance, **config["diffusion"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        return f"its config cannot be built: {_first_sentence(error)}"
    if any(side % model.divisor for side in config["data"]["shape"][1:]):
        return f"its network cannot make images of the shape {config['data']['shape']}"
    expected = model.state_dict()
    size = sum(2 * weight.numel() for weight in expected.values())  # float16 at least
    if size > file_size:
        return f"its config asks for a network of {size:,} bytes, which do not fit into the file's {file_size:,}"
    return _wrong_weights(checkpoint, expected)


def _wrong_weights(checkpoint: dict, expected: dict) -> str | None:
    """The first tensor of model or ema that is missing, unknown, of another shape, or not finite, or None."""
    for part in ("model", "ema"):
        weights = checkpoint[part]
        for name in expected.keys() - weights.keys():
            return f"the tensor {name!r} of {part} is missing"
        for name in weights.keys() - expected.keys():
            return f"the tensor {_shown(name)} of {part} is unknown"
        for name, weight in weights.items():
            if not any(is_tensor_like(weight, like) for like in (expected[name], expected[name].half())):
                return (f"the tensor {name!r} of {part} does not fit its config: it should be of the shape "
                        f"{tuple(expected[name].shape)}")
            if not bool(weight.isfinite().all()):
                return f"the tensor {name!r} of {part} holds numbers that are not finite: its run diverged"
    return None


def training_flag(checkpoint: dict, name: str, default):
    """A numeric flag of the training; the default if it is missing or not a valid number."""
    value = checkpoint["config"]["training"].get(name)
    return value if isinstance(value, numbers.Real) and 0 <= value <= MAX_COUNT else default


def data_mismatch(config: dict, data: ImageData) -> str | None:
    """How the images or the classes of a checkpoint's config differ from those of the data set, or None."""
    shape, classes = list(data.images.shape[1:]), config["model"].get("num_classes")
    if config["data"]["shape"] == shape and classes in (None, len(data.class_names)):
        return None
    return (f"the checkpoint is of images {config['data']['shape']} and {classes} classes, {data.name} has {shape} and "
            f"{len(data.class_names)}")


def check_same_data(config: dict, data: ImageData) -> None:
    """UserError if a checkpoint's config does not fit the data set that was loaded for it."""
    if problem := data_mismatch(config, data):
        raise UserError(f"{problem}: give the --data_dir that it was trained on")


def _shown(value) -> str:
    """A value from an unknown file for a message: only its type if it could be long."""
    plain = value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 1e30)
    return repr(value[:40]) if type(value) is str else repr(value) if plain else f"of type {type(value).__name__}"


def _first_sentence(error: Exception) -> str:
    return one_line(error, None).split(". ")[0][:200]
