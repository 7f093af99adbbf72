"""The files of guide/measured/ and the tables in GUIDE.md and experiments.md that are made of them.

A file is {"command", "date", "machine", "rows"}: what was typed, when and where, and the figures that came out. A table
stands in a document between two comments, <!-- table NAME --> and <!-- end -->, and below it the command and the date.
So a number in a table is always the number that was measured.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

from runtime.cores import available_cores, processor
from runtime.files import atomic_write, write_json

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PICTURES = ROOT / "guide/measured", ROOT / "guide/pictures"
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def machine() -> str:
    """The processor, as people say it, and the version of torch."""
    cores = available_cores()
    return f"{cores} core{'s' * (cores > 1)} of {processor()}, torch {torch.__version__.partition('+')[0]}"


def write(name: str, command: str, rows: Sequence[Mapping] | Mapping, folder: Path = MEASURED) -> Path:
    """Write the figures that `command` gave today to NAME.json; returns its path."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(dict(command=command, date=date.today().isoformat(), machine=machine(), rows=rows), path)
    return path


def read(name: str, folder: Path = MEASURED) -> dict:
    """The content of NAME.json."""
    return json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def source(result: Mapping) -> str:
    """The line below a table: what was typed, when, and on what."""
    return f"\nMeasured by `{result['command']}`, {result['date']}, {result['machine']}.\n"


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The document with every table made anew; one that has no measurement yet is empty. KeyError for unknown names."""
    return PLACE.sub(lambda place: place[1] + tables[place[2]]() + place[3], text)


def fill_file(path: Path, tables: Mapping[str, Callable[[], str]]) -> None:
    """`fill` a file in place."""
    text = path.read_text(encoding="utf-8")
    if (filled := fill(text, tables)) != text:
        with atomic_write(path) as file:
            file.write(filled.encode())
