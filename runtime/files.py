"""Write files as a whole or not at all, and check archives before they are read."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path, PurePath

from runtime.errors import UserError

LONGEST_NAME = 240  # bytes of a file's name: most systems take 255, and `atomic_write` adds some


def one_line(message: object, length: int | None = 120) -> str:
    """A message on one line, cut to `length` characters (None: not cut)."""
    return " ".join(str(message).split())[:length]


def quoted(path: str | PurePath) -> str:
    """A path as a word of a command line, in quotes where the shell of this system needs them."""
    word = (Path(path) if isinstance(path, str) else path).as_posix()  # Windows takes /, too
    return f'"{word}"' if sys.platform == "win32" and shlex.quote(word) != word else shlex.quote(word)


def file_digest(path: str | Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path`; at the end of the block, sync it and rename it to `path`.

    If the block raises, `path` is unchanged and the temporary file is deleted. Makes the folder if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        with os.fdopen(descriptor, mode, **{} if "b" in mode else dict(encoding="utf-8", newline="")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def temporaries(path: Path) -> list[Path]:
    """The temporary files left by processes killed while they wrote `path`, whose name may be a glob pattern."""
    return list(path.parent.glob(f".{path.name}.????????.tmp"))


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_writable(folder: str | Path, instead: str = "another folder") -> Path:
    """Make `folder` and write a test file to it. UserError, with what to choose instead, if that fails."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f".probe-{os.getpid()}") as file:
            file.write(b"probe")
        (folder / f".probe-{os.getpid()}").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose {instead}") from error
    return folder


def check_output(path: str | Path, *inputs: str | Path | None) -> Path:
    """Check, before any work is done, that the file `path` can be written. UserError if not.

    inputs: what the script reads, which must stay as it is (`check_inputs_stay`).
    """
    check_outputs([path := Path(path)], inputs)
    return path


def check_outputs(paths: Sequence[Path], inputs: Sequence[str | Path | None] = ()) -> None:
    """`check_output` for all files that a script writes: a run must not end at the second of them."""
    for path in paths:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"the name {path.name[:20]}... is longer than {LONGEST_NAME} bytes: choose a shorter one")
    check_inputs_stay(paths, inputs)
    for folder in dict.fromkeys(path.parent for path in paths):
        check_writable(folder)
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file is to be written there: choose another place for the "
                            f"output")


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is `folder`, if that is a folder, or lies anywhere below it."""
    return os.path.isdir(folder) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def check_inputs_stay(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """UserError if one of the files to write is one of the inputs, also by a link, or lies below an input folder."""
    for path, given in product(outputs, (given for given in inputs if given is not None)):
        if lies_in(path, given):
            raise UserError(f"{path} would be written into the input {given}: choose another place for the output")
        if os.path.exists(path) and os.path.exists(given) and os.path.samefile(path, given):
            raise UserError(f"{path} would overwrite an input: choose another place for the output")


def check_archive(path: str | Path, largest: int) -> None:
    """UserError if a zip archive states an unpacked size of more than `largest` bytes. Unpacks nothing."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > largest:
        raise UserError(f"would unpack to {unpacked:,} bytes")


def verified_archive(path: str | Path) -> io.BytesIO:
    """A copy of a zip archive with new headers; the CRC of each member is checked.

    UserError or an error of zipfile if the archive is damaged.
    """
    check_archive(path, largest=Path(path).stat().st_size)
    verified = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as new:
        for part in archive.infolist():
            new.writestr(part.filename, archive.read(part))  # read checks the CRC
    verified.seek(0)
    return verified


def finite_number(value) -> float | None:
    """`value`, as it stands in a JSON file, if it is a number that a float can hold; else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return value if is_number else None


def write_json(content, path: str | Path) -> None:
    """Write JSON, indented by 2."""
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def write_json_lines(records: Sequence[dict], path: str | Path) -> None:
    """Write one JSON object per line."""
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
