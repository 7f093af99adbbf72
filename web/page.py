"""One HTML file that holds models and draws with them in a browser: what goes into it, and how it is put together.

The file has a script, the parts of SCRIPT one after the other, which also runs as the worker; the models' configs as
JSON; and their weights in base64. Nothing in a checkpoint can become markup or script: its words stand in the JSON,
whose "<" are escaped; and the page's content security policy allows the one script by its hash, the worker that the
script starts from a blob: of its own text, and no request.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import to_precision
from data import code_of
from diffusion import DiffusionProcess
from models.unet import SimpleUNet
from runtime.errors import UserError
from runtime.sampling import can_be_guided, is_student, label_words, sampling_options
from samplers import KARRAS_RHO, SAMPLERS, noise_range

FOLDER = Path(__file__).parent
SCRIPT = ("weights", "convolutions", "network", "noise", "diffusion", "samplers", "worker", "widgets", "make", "sketch",
          "compare", "inside", "page")
STYLE, MARKUP, PRODUCT = FOLDER / "page.css", FOLDER / "page.html", FOLDER / "multiply.wasm"
PRECISIONS = {"float16": torch.float16, "float32": torch.float32}
LARGEST = 64_000_000  # bytes of weights


@dataclass(frozen=True)
class PageModel:
    """A model of a page: what the script has to know of it (JSON types), and its weights."""

    entry: dict
    weights: bytes


def page_model(name: str, model: nn.Module, diffusion: DiffusionProcess, config: dict, precision: str = "float16",
               use_ema: bool = True) -> PageModel:
    """The model with this checkpoint's config for a page. sample.py draws the same with --checkpoint `name`, and with
    --no-use_ema unless use_ema.

    UserError for a network that the page cannot run.
    """
    if type(model) is not SimpleUNet:
        raise UserError(f"the page runs the networks of models/unet.py, not {type(model).__name__}: leave out {name}")
    tensors = to_precision(model.state_dict(), PRECISIONS[precision])
    weights = b"".join(_bytes(weight) for weight in tensors.values())
    if len(weights) > LARGEST:
        raise UserError(f"the weights of {name} take {len(weights):,} bytes, too many for a page (at most "
                        f"{LARGEST:,}): train a smaller network, or choose another --format")
    data, options = config["data"], sampling_options(config, count=1)
    entry = dict(
        name=name, use_ema=use_ema, dataset=data["dataset"], shape=data["shape"],
        levels=code_of(config).points.tolist(), class_names=(names := data["class_names"] if model.num_classes else []),
        label_words=label_words(names),
        network=model.config,
        parameters=sum(weight.numel() for weight in tensors.values()),
        diffusion={key: diffusion.config[key] for key in ("prediction", "data_std")},
        alphas_cumprod=diffusion.alphas_cumprod.tolist(), student=is_student(config), guided=can_be_guided(config),
        precision=precision,
        tensors=[[key, list(weight.shape)] for key, weight in tensors.items()],
        defaults={key: options[key] for key in ("sampler", "steps", "guidance_scale")},
        samplers={key: row.spacing for key, row in SAMPLERS.items() if not (model.learn_variance and key == "ddpm")},
        noise_range=dict(zip(("low", "high"), noise_range(diffusion), strict=True), rho=KARRAS_RHO))
    return PageModel(entry, weights)


def _bytes(weight: Tensor) -> bytes:
    """The numbers of a tensor, the lowest byte of each first."""
    return weight.cpu().numpy().astype(f"<f{weight.dtype.itemsize}").tobytes()


def page(models: list[PageModel]) -> str:
    """The HTML file with these models; the first is shown at first."""
    script = "\n".join(_read(FOLDER / f"{part}.js") for part in SCRIPT)
    script = f'"use strict";\n{script}'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    entries = json.dumps([model.entry for model in models]).replace("<", "\\u003c")
    blocks = {f"weights-{i}": _base64(model.weights) for i, model in enumerate(models)}
    blocks |= {"multiply": _base64(PRODUCT.read_bytes())}
    parts = dict(digest=digest, style=_read(STYLE), entries=entries, script=script, blocks="\n".join(
        f'<script type="text/plain" id="{key}">{text}</script>' for key, text in blocks.items()))
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read(MARKUP))  # in one pass: words of a model


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
