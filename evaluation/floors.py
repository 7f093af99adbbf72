"""What was computed from real images before: files in data_dir/floors.

The floor is the same for all images that are measured against the same real ones, and takes as long as they do; so are
the features of the real images, and their distances to training images. A file names all that it depends on. One that
is damaged or differs in any of it is not used: what it held is computed again.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import ImageData
from evaluation import classifier
from runtime.files import atomic_write, write_json
from runtime.version import __version__

CHECK = "sha256"  # the array of a kept file that holds its `arrays_digest`
CODE = (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parent.parent / "data.py")


def digest(content) -> str:
    """The sha256 of a buffer, or of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode() if isinstance(content, (dict, list))
                          else content).hexdigest()


class FloorCache(NamedTuple):
    """What is kept, by its name, for one reference and one set of floor images."""

    folder: Path
    dataset: str
    networks: dict  # what features depend on besides their images
    basis: dict  # what floors depend on

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

    def tensors(self, name: str, images: ImageData, compute: Callable[[], dict[str, Tensor]],
                **more) -> dict[str, Tensor]:
        """What compute() returns for `images`, named tensors, from the file if it is there; `more` as in `get`.

        There is one file for each name, with what was computed last: features take megabytes.
        """
        depends = digest(dict(self.networks, images=described(images), **more))
        path = self.folder / f"{self.dataset}_{name}.npz"
        with contextlib.suppress(Exception), np.load(path) as file:  # numpy and zipfile raise a dozen different errors
            saved = {key: file[key] for key in file.files}
            if str(saved.pop(CHECK)) == arrays_digest(depends, saved):
                return {key: torch.from_numpy(array) for key, array in saved.items()}
        tensors = compute()
        arrays = {key: value.numpy() for key, value in tensors.items()}
        with contextlib.suppress(OSError), atomic_write(path) as file:
            np.savez(file, **{CHECK: arrays_digest(depends, arrays)}, **arrays)
        return tensors


def arrays_digest(depends: str, arrays: dict[str, np.ndarray]) -> str:
    """The sha256 of named arrays, and of what they depend on."""
    return digest([depends, *((name, str(array.dtype), array.shape, digest(np.ascontiguousarray(array).data))
                              for name, array in sorted(arrays.items()))])


def described(part: ImageData) -> dict:
    """What tells these images and labels from others, JSON types."""
    arrays = (part.images.contiguous().numpy(), part.labels.contiguous().numpy())
    return dict(split=part.split, shape=list(part.images.shape), sha256=[digest(array.data) for array in arrays])


def floor_cache(data: ImageData, floor_data: ImageData, features: str, device: torch.device, data_dir) -> FloorCache:
    """The floors of floor_data measured against data with these features ("own" or "inception")."""
    import torchmetrics

    sums = (classifier.place(data.source)[0] / "SHA256SUMS").read_text()
    networks = dict(dataset=data.name, features=features, feature_networks=digest(sums.encode()),
                    code=digest([digest(path.read_bytes()) for path in CODE]), version=__version__,
                    torch=str(torch.__version__), torchmetrics=torchmetrics.__version__, device=device.type)
    basis = dict(networks, reference=described(data), floor_images=described(floor_data))
    return FloorCache(Path(data_dir) / "floors", data.name, networks, basis)
