"""The runs below a folder as a table and as runs.csv: how each was started, how it ended, how good its images are."""

import csv
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import UserError
from runtime.files import atomic_write, check_output, file_digest, finite_number, one_line, quoted
from runtime.parser import SHARED_FLAGS
from training import run_record

RESULT = "runs.csv"
METRICS, EVALUATION = "metrics.jsonl", "evaluation.json"
SHOWN_FIGURES = ("two_sample_pixels", "two_sample_shapes", "frechet_distance", "recall", "asked_class")
HIDDEN_FLAGS = ("output_dir", "data_dir", "resume")  # they do not say how a run differs from another
LARGEST, LAST_BYTES = 2**24, 2**16  # bytes of a JSON file that is read; bytes read at the end of metrics.jsonl
SHOWN_LETTERS = 60  # of the flags and of the end


@dataclass
class FoundRun:
    """What the files in the folder of a run say; None and empty where they say nothing."""

    folder: str
    dataset: str | None = None
    command: str = ""
    began: str | None = None
    how: str | None = None
    seed: int | None = None
    images_seen: float | None = None
    seconds: float | None = None
    num_images: int | None = None  # that were measured
    reference: str | None = None  # the split that they were compared with
    figures: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- reading


def find_runs(top: Path) -> tuple[list[FoundRun], list[str]]:
    """(runs, notes): the runs in `top` and in all folders below, by the time they began, and a line for each problem.

    A run is a folder with run.json, metrics.jsonl or evaluation.json. Links to folders are not followed. UserError
    if there is no folder `top`.
    """
    if not top.is_dir():
        raise UserError(f"there is no folder {top}: give the one that holds the runs, such as --runs outputs")
    runs, notes = [], []
    for path, folders, names in os.walk(top, onerror=lambda error: notes.append(f"{error.filename}: {error.strerror}")):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if {run_record.NAME, METRICS, EVALUATION} & set(names):
            run = _read_run(Path(path), str(Path(path).relative_to(top)), set(names), notes)
            runs += [run] if run else []
    return sorted(runs, key=lambda run: (run.began or "", run.folder)), notes


def _read_run(path: Path, folder: str, names: set[str], notes: list[str]) -> FoundRun | None:
    """The run in the folder `path`; None, with notes, if none of its files can be read."""
    run, read = FoundRun(folder), 0
    for name, reader in ((run_record.NAME, _read_record), (METRICS, _read_metrics), (EVALUATION, _read_evaluation)):
        if name in names:
            try:
                reader(path / name, run)
                read += 1
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                notes.append(f"{path / name}: {one_line(error, 80) or type(error).__name__}")
    return run if read else None


def _load_json(path: Path) -> dict:
    """The object in a JSON file. ValueError or OSError if it is no regular file, too large or no object."""
    if not path.is_file():
        raise ValueError("no file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST:,} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _text(value) -> str | None:
    """`value` on one line if it is a text, else None."""
    return one_line(value, None) if isinstance(value, str) else None


def _read_record(path: Path, run: FoundRun) -> None:
    """run.json: the command and the beginning are those of the first sitting, seed and end those of the last one."""
    sittings = _load_json(path).get("sittings")
    if not isinstance(sittings, list) or not sittings or not all(isinstance(each, dict) for each in sittings):
        raise ValueError("no sittings of a run")
    first, last = sittings[0], sittings[-1]
    run.command, run.began = _text(first.get("command")) or "", _text(first.get("began"))
    run.seed = finite_number(last.get("seed"))
    run.how = _text(last.get("how")) or "running, or killed"
    script, flags = split_command(run.command)
    default = SHARED_FLAGS["dataset"]["default"] if script == "train.py" else None
    run.dataset = run.dataset or flags.get("dataset", default)


def _read_metrics(path: Path, run: FoundRun) -> None:
    """metrics.jsonl: its last whole line; the line that is being written, or was cut off, does not count."""
    if not path.is_file():
        raise ValueError("no file")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
            run.images_seen, run.seconds = finite_number(record["images_seen"]), finite_number(record["seconds"])
            return
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    raise ValueError("no line with images_seen and seconds")


def _read_evaluation(path: Path, run: FoundRun) -> None:
    """evaluation.json: the value of each figure. Its command counts only where there is no run.json.

    ValueError if it is not of a checkpoint of the run there: of an earlier one, as after --resume, or of other images.
    """
    content = _load_json(path)
    name, digest = Path(_text(content.get("checkpoint")) or "").name, content.get("checkpoint_sha256")
    trained = run.how is not None or run.seconds is not None
    if trained and content["figures"] and not name.startswith("model_"):
        raise ValueError(f"it is of {name or 'ready images'}, not of this run: run evaluate.py on its checkpoint")
    for file in (path.parent / name, path.parent / "checkpoints" / name):
        if digest and file.is_file() and digest != file_digest(file):
            raise ValueError(f"it is of another or an earlier {name}: run evaluate.py again")
    values = {_text(name): finite_number(figure["value"]) for name, figure in content["figures"].items()}
    run.figures = {name: value for name, value in values.items() if value is not None}
    run.dataset, run.num_images = _text(content.get("dataset")) or run.dataset, finite_number(content.get("num_images"))
    run.reference = _text(content["reference"]["split"]) if "reference" in content else None  # few pictures have none
    if not run.command and isinstance(content.get("command"), list):
        run.command = one_line(shlex.join(map(str, content["command"])), None)


def split_command(command: str) -> tuple[str, dict[str, str]]:
    """(script, {flag: its values}) of a command, such as ("train.py", {"budget": "10m"}); ("", {}) without a script."""
    script, words = run_record.script_and_words(command)
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value
        elif name:
            flags[name] = f"{flags[name]} {word}".strip()
    return script, flags


# ------------------------------------------------------------------------------------------------------------- showing


def list_runs(top: Path) -> None:
    """Print the table of the runs below `top` and the files that could not be read, and write runs.csv into `top`."""
    runs, notes = find_runs(top)
    if runs:
        print("\n".join(table(runs)))
    for note in notes:
        print(f"Skipped {_printable(note)}")
    if not runs:
        raise UserError(f"no run has written to {top} or to a folder below: start one with python train.py "
                        f"--output_dir {quoted(top)}")
    write_csv(runs, check_output(top / RESULT))
    print(f"Saved {top / RESULT}: {len(runs)} run{'' if len(runs) == 1 else 's'}")


def table(runs: list[FoundRun]) -> Iterator[str]:
    """The lines of the table. Flags that all runs of a script share stand in a line above it."""
    commands = [split_command(run.command) for run in runs]
    shared = _shared_flags(commands)
    for script, flags in shared.items():
        if flags:
            yield f"All runs of {script}: {_flags_text(flags)}"
    names = [name for name in SHOWN_FIGURES if any(name in run.figures for run in runs)]
    rows = [["folder", "data set", "images", "seconds", *(_short(name) for name in names), "end", "command"]]
    for run, (script, flags) in zip(runs, commands, strict=True):
        own = {name: value for name, value in flags.items() if shared[script].get(name) != value}
        counts = ["-" if value is None else f"{value:,.0f}" for value in (run.images_seen, run.seconds)]
        values = [f"{run.figures[name]:.4f}" if name in run.figures else "-" for name in names]
        text = f"{script} {_flags_text(own)}".strip()
        rows.append([run.folder, run.dataset or "-", *counts, *values, _cut(run.how or "-"), _cut(text)])
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(2, 4 + len(names))
    for row in rows:
        yield "  ".join(cell.rjust(width) if i in numbers else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()


def _shared_flags(commands: list[tuple[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """For each script the flags that all its commands have with the same values; none where it has one command."""
    shared = {}
    for script in dict.fromkeys(script for script, _ in commands):
        several = [flags.items() for name, flags in commands if name == script]
        shared[script] = dict(x for x in several[0] if len(several) > 1 and all(x in flags for flags in several))
    return shared


def _flags_text(flags: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}".strip() for name, value in flags.items() if name not in HIDDEN_FLAGS)


def _short(name: str) -> str:
    """The head of a figure's column."""
    return name.removesuffix("_distance") if name != "autoencoder_distance" else "autoenc."


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS - 1]}…"


def _printable(text: str) -> str:
    """`text` without control characters and without bytes of file names that are no letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def write_csv(runs: list[FoundRun], path: Path) -> None:
    """Write a line for each run: all that is known of it, and a column for each figure that any of them has."""
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    facts = ("folder", "dataset", "command", "began", "how", "seed", "images_seen", "seconds", "num_images",
             "reference")
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*facts, *names])
        for run in runs:
            cells = [*(getattr(run, fact) for fact in facts), *(run.figures.get(name) for name in names)]
            writer.writerow([_printable(cell) if isinstance(cell, str) else cell for cell in cells])
