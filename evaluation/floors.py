"""Floors that were computed before: a file in data_dir/floors for each.

The floor is the same for all images that are measured against the same real ones, and takes as long as they do. A file
names all that its figures depend on. One that is damaged or differs in any of it is not used: the floor is computed
again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data import ImageData
from evaluation import classifier
from runtime.files import write_json
from runtime.version import __version__

CODE = (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parent.parent / "data.py")


def digest(content) -> str:
    """The sha256 of a buffer, or of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode() if isinstance(content, (dict, list))
                          else content).hexdigest()


class FloorCache(NamedTuple):
    """Floors by their name, for one reference and one set of floor images; basis: what all of them depend on."""

    folder: Path
    dataset: str
    basis: dict

    def get(self, name: str, compute: Callable[[], dict[str, dict]], **more) -> dict[str, dict]:
        """The figures that compute() returns, {name: {"value", ...}}, from the file if it is there.

        more: what these figures depend on besides the basis, JSON types. A folder that cannot be written is no error.
        """
        depends = dict(self.basis, floor=name, **more)
        path = self.folder / f"{self.dataset}_{name}_{digest(depends)[:16]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(path.read_text())
            if saved["depends_on"] == depends and saved["sha256"] == digest(saved["figures"]):
                return saved["figures"]
        figures = compute()
        with contextlib.suppress(OSError):
            write_json(dict(figures=figures, sha256=digest(figures), depends_on=depends), path)
        return figures


def floor_cache(data: ImageData, floor_data: ImageData, features: str, device: torch.device, data_dir) -> FloorCache:
    """The floors of floor_data measured against data with these features ("own" or "inception")."""
    import torchmetrics

    def images(part: ImageData) -> dict:
        arrays = (part.images.contiguous().numpy(), part.labels.contiguous().numpy())
        return dict(split=part.split, shape=list(part.images.shape), sha256=[digest(array.data) for array in arrays])
    networks = (classifier.place(data.source)[0] / "SHA256SUMS").read_text()
    basis = dict(dataset=data.name, reference=images(data), floor_images=images(floor_data), features=features,
                 feature_networks=digest(networks.encode()), code=digest([digest(path.read_bytes()) for path in CODE]),
                 version=__version__, torch=str(torch.__version__), torchmetrics=torchmetrics.__version__,
                 device=device.type)
    return FloorCache(Path(data_dir) / "floors", data.name, basis)
