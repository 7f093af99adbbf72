"""Which checkpoint a script reads: a file, a pretrained model by its name, or the newest that was trained here.

models/pretrained/ holds a checkpoint NAME.pt for each pretrained model, and index.json: by name the sha256 of the file,
the command that trained it, and its figures. Scripts only read there.
"""

import contextlib
import json
import os
from argparse import Namespace
from pathlib import Path

from checkpoint import SAFETENSORS, peek
from data_sources.points import is_points
from runtime import distributed
from runtime.errors import UserError
from runtime.files import file_digest
from runtime.sampling import is_student

PRETRAINED = Path(__file__).resolve().parent.parent / "models/pretrained"
OUTPUTS = Path("outputs")  # of train.py without --output_dir
DEFAULT = "mnist"


def with_checkpoint(args: Namespace, students: bool = True, points: bool = False) -> Namespace:
    """The parsed flags, and as `checkpoint` the path of the file to read.

    Without --checkpoint that is the newest model_final.pt below outputs/, else the pretrained DEFAULT, and a line says
    which. Call it after the processes of torchrun have joined: all of them take the file that rank 0 has found.

    students: whether the script can use the students of distill.py, and points: points in the plane; if not, none is
    taken without --checkpoint.
    UserError if there is no such file or name, or if a pretrained file is damaged.
    """
    if args.checkpoint is not None:
        path = find_checkpoint(args.checkpoint)
    else:
        path, whose = distributed.broadcast(newest_checkpoint(students, points)), "" if students else " of train.py"
        if path:
            print(f"Using {path} (the newest{whose}; give another with --checkpoint)")
        else:
            path = pretrained_path(DEFAULT)
            print(f"Using the pretrained {DEFAULT} ({OUTPUTS}/ holds no model_final.pt{whose}; give another with "
                  f"--checkpoint)")
    if (is_pretrained(path) or path.suffix == ".safetensors") and not getattr(args, "use_ema", True):
        weights = "the moving average of the weights" if is_pretrained(path) else "one set of weights"
        raise UserError(f"{path} only holds {weights}: leave out --no-use_ema")
    return Namespace(**vars(args) | dict(checkpoint=str(path)))


def find_checkpoint(given: str) -> Path:
    """The file that --checkpoint names: a path, also of a folder that export.py --format safetensors wrote; or, where
    nothing has that path, the name of a pretrained model.

    UserError that lists the names if there is neither, for a folder, and for a damaged pretrained file.
    """
    path = Path(given)
    if (path / SAFETENSORS).is_file():
        return path / SAFETENSORS
    if os.path.isdir(given):
        raise UserError(f"{given} is a folder: give a checkpoint in it, such as {path / 'model_final.pt'}")
    if os.path.exists(given):
        return pretrained_path(path.stem) if is_pretrained(path) else path
    names = list(pretrained_models())
    if given in names:
        return pretrained_path(given)
    listed = f", or give the name of a pretrained one: {', '.join(names)}" if names else ""
    raise UserError(f"there is no checkpoint {given or 'without a name'}: train one with python train.py, which writes "
                    f"{OUTPUTS}/model_final.pt{listed}")


def newest_checkpoint(students: bool = True, points: bool = False) -> Path | None:
    """The model_final.pt below outputs/ that was written last; None if there is none.

    students, points: whether it may be a student of distill.py, and one of points in the plane. A file that
    cannot be read counts as none of them: the script that loads it gives the reason.
    """
    written = {}
    for path in OUTPUTS.rglob("model_final.pt"):
        with contextlib.suppress(OSError):  # a run may move it away just now
            if path.is_file():
                written[path] = path.stat().st_mtime_ns
    newest_first = sorted(written, key=lambda path: (written[path], str(path)), reverse=True)
    return next((path for path in newest_first if _suits(path, students, points)), None)


def _suits(path: Path, students: bool, points: bool) -> bool:
    try:
        config = peek(path)["config"]
        return (students or not is_student(config)) and (points or not is_points(config["data"]["shape"]))
    except Exception:  # load_checkpoint gives the reason
        return True


# ------------------------------------------------------------------------------------------------ pretrained models


def pretrained_models() -> dict[str, dict]:
    """The entries of index.json by the names of the models; empty without that file. UserError if it is damaged."""
    path = PRETRAINED / "index.json"
    try:
        index = json.loads(path.read_text()) if path.exists() else {}
        if any(type(entry["sha256"]) is not str for entry in index.values()):
            raise ValueError("a sha256 is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{_shown(path)} is damaged: restore it with git checkout models/pretrained") from error
    return index


def pretrained_path(name: str) -> Path:
    """The file of a pretrained model. UserError if it is missing or damaged: its sha256 must be that of index.json."""
    path, entry = PRETRAINED / f"{name}.pt", pretrained_models().get(name)
    if entry is None:
        raise UserError(f"there is no pretrained {name} in {_shown(PRETRAINED / 'index.json')}: train one with python "
                        f"train.py, which writes {OUTPUTS}/model_final.pt, or give another with --checkpoint")
    if not path.is_file() or file_digest(path) != entry["sha256"]:
        raise UserError(f"{_shown(path)} is missing or damaged (its sha256 is not the one in index.json): restore it "
                        f"with git checkout models/pretrained")
    return _shown(path)


def is_pretrained(path: str | Path) -> bool:
    """Whether this is a file in models/pretrained/."""
    return Path(path).resolve().parent == PRETRAINED


def folder_of_results(path: str | Path) -> Path:
    """The folder of a checkpoint, for what is written beside it; of a pretrained NAME outputs/pretrained/NAME.

    In outputs/ itself the figures would seem to be those of outputs/model_final.pt.
    """
    return OUTPUTS / "pretrained" / Path(path).stem if is_pretrained(path) else Path(path).parent


def _shown(path: Path) -> Path:
    """The path as seen from the working folder, if it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
