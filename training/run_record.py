"""run.json in the folder of a run: command, versions, machine, seed, when each sitting began and ended, and how.

{"sittings": [...]}: a run that is resumed has several, the latest last. "how" is "completed", "stopped by SIGTERM",
"failed: ..."; null while the sitting lasts.
"""

import contextlib
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from runtime import distributed
from runtime.cores import available_cores, processor
from runtime.files import one_line, write_json
from runtime.version import __version__

NAME = "run.json"
DIED = "ended without a word: the process was killed, or the machine stopped"


def sittings(folder: Path, script: str | None = None) -> list[dict]:
    """The sittings of the run in `folder`, or only those of a `script`, the latest last; [] without a run.json."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = [dict(sitting) for sitting in json.loads((folder / NAME).read_text())["sittings"]]
        return [each for each in found if script in (None, script_and_words(str(each.get("command", "")))[0])]
    return []


def script_and_words(command: str) -> tuple[str, list[str]]:
    """(the name of the script, the words behind it) of a sitting's command; ("", []) without a script."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation mark without its pair
        words = command.split()
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    return ("", []) if at is None else (Path(words[at]).name, words[at + 1:])


def is_of_this_launch(folder: Path) -> bool:
    """Whether this launch of torchrun, before it restarted its processes, began the latest sitting in `folder`."""
    last = sittings(folder)[-1:]
    return distributed.launch() is not None and any(sitting.get("launch") == distributed.launch() for sitting in last)


@contextlib.contextmanager
def recorded(run, script: str, argv: Sequence[str] | None, earlier: Sequence[dict]) -> Iterator[None]:
    """Write a sitting of `run` to run.json and, at the end of the block, when and how it ended.

    argv: the script's flags; None: those of the command line. earlier: the sittings that it continues.
    """
    if distributed.rank() == 0:
        earlier = [sitting | dict(how=sitting.get("how") or DIED) for sitting in earlier]
        write_json({"sittings": [*earlier, describe(run, script, argv)]}, run.folder / NAME)
    try:
        yield
        how = f"stopped by {signal.Signals(run.stopped).name}" if run.stopped else "completed"
    except BaseException as error:
        how = f"failed: {one_line(error, None) or type(error).__name__}"
        raise
    finally:
        end_sitting(run.folder, how)


def end_sitting(folder: Path, how: str) -> None:
    """Add to run.json when and how the sitting of this process ended, if there is one and the disk has room."""
    found = sittings(folder)
    if distributed.rank() == 0 and found and found[-1].get("process") == os.getpid() and not found[-1].get("how"):
        found[-1] |= dict(ended=_now(), how=how)
        with contextlib.suppress(OSError):
            write_json({"sittings": found}, folder / NAME)


def describe(run, script: str, argv: Sequence[str] | None) -> dict:
    """What run.json says of a sitting that begins now."""
    processes, device = distributed.world_size(), run.trainer.device
    return dict(
        command=f"{launcher(processes)} {shlex.join([script, *(sys.argv[1:] if argv is None else argv)])}",
        began=_now(), ended=None, how=None, seed=run.trainer.seed, step=run.trainer.step,
        versions=dict(tiny_diffusion=__version__, python=platform.python_version(), torch=str(torch.__version__),
                      numpy=np.__version__),
        machine=dict(system=platform.platform(), processor=processor(), cores=available_cores(),
                     threads=torch.get_num_threads(), processes=processes,
                     device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)),
        process=os.getpid(), launch=distributed.launch())


def launcher(processes: int) -> str:
    """What stands before the script in the command."""
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    nodes = "" if machines == "1" else f" --nnodes={machines}"
    own = os.environ.get("LOCAL_WORLD_SIZE", processes)
    return "python" if processes == 1 else f"torchrun{nodes} --nproc_per_node={own}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
