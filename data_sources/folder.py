"""Find the pictures of a folder, a .zip of one or a .npz, and their classes, without opening any of them."""

import contextlib
import hashlib
import io
import math
import os
import re
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_sources.pictures import MAX_RATIO, MIN_BYTES, array_name
from runtime.errors import UserError
from runtime.files import check_archive, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_BYTES = 2**28  # of one file
CLASS_NAME = 255  # characters of the name of a class: as many as that of a folder can have
UTF8_FLAG = 0x800  # of a file in a .zip: its name is in UTF-8, and else in code page 437
HIDDEN = re.compile(r"(?:^|/)(?:\.|__MACOSX|@eaDir|#recycle|\$RECYCLE\.BIN)")  # names that begin so are left out


class Found(NamedTuple):
    """The pictures of a folder or archive: their names in it, sorted, with a label each.

    class_names   of the sub-folders, sorted; empty where there are no classes
    skipped       why a picture is not among them, by its name
    others        how many files of each ending are no pictures, most first: {".heic": 45, "": 1}
    listing       a sha256 of the names, sizes and dates (in an archive: checksums): it changes when a file does
    mixed         whether pictures lie beside sub-folders with pictures, so that there are no classes
    shared        the folders that all pictures share, above those of the classes: "images/set"
    array         of a .npz the name of the array of pictures, else None; side and unpacked are for it
    side          the shorter side of the pictures
    unpacked      how many bytes they take
    """

    names: list[str]
    labels: list[int]
    class_names: tuple[str, ...]
    skipped: dict[str, str]
    others: dict[str, int]
    listing: str
    mixed: bool
    shared: str = ""
    array: str | None = None
    side: int = 0
    unpacked: int = 0


def find_pictures(path: Path) -> Found:
    """The pictures in a folder with its sub-folders, a .zip or a .npz. UserError if `path` is none, or holds none.

    The sub-folders of the first level are the classes. A folder that holds nothing but one sub-folder counts as that
    sub-folder. Hidden files, and files whose names do not end in one of SUFFIXES, are not looked at.
    """
    skipped: dict[str, str] = {}
    if path.is_file():
        path.open("rb").close()  # an error now: zipfile says of what may not be read that it is no archive
    if path.suffix.lower() == ".npz" and path.is_file():
        return _find_in_npz(path)
    if path.is_dir():
        files = list(_files_of_folder(str(path), skipped))
    elif path.is_file() and zipfile.is_zipfile(path):
        files = list(_files_of_archive(path, skipped))
    elif path.is_file() and path.suffix.lower() == ".zip":
        raise UserError(f"{path} is damaged or incomplete (a .zip ends with a list of its files): copy it again")
    else:
        raise UserError(f"{path} is no folder, no .zip and no .npz: give the folder that holds your pictures")
    files = sorted(entry for entry in files if not HIDDEN.search(entry[0]))
    pictures = [entry for entry in files if entry[0].lower().endswith(SUFFIXES)]
    endings = (PurePosixPath(name).suffix for name, *_ in files if not name.lower().endswith(SUFFIXES))
    others = dict(Counter(_plain(ending).lower() if ending else "" for ending in endings).most_common())
    if not pictures:
        why = f"; {describe(skipped)}" if skipped else ""
        raise UserError(f"{path} holds no pictures ({describe_others(others)}{why}): give a folder with "
                        f"{', '.join(SUFFIXES[:6])} ... files")
    listing = hashlib.sha256()
    for entry in pictures:
        listing.update(repr(entry).encode(errors="surrogateescape"))
    names = [name for name, *_ in pictures]
    return Found(names=names, skipped=skipped, others=others, listing=listing.hexdigest(), **_classes(names))


def _files_of_folder(top: str, skipped: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """(name, size, date) of every file below `top`.

    A folder that links lead to again and again counts once, and by its own name if it lies below `top`.
    """
    waiting, links, seen = [""], [], set()
    while waiting or links:
        inner = waiting.pop() if waiting else links.pop()
        try:
            about = os.stat(os.path.join(top, inner))
            if about.st_ino and (about.st_dev, about.st_ino) in seen:  # some network drives number nothing
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(os.path.join(top, inner)), key=lambda entry: entry.name)
        except OSError as error:
            skipped[inner] = error.strerror or "it cannot be read"
            continue
        for entry in entries:
            name = f"{inner}/{entry.name}" if inner else entry.name
            try:
                if HIDDEN.match(entry.name):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(name)
                elif stat.S_ISREG((about := entry.stat()).st_mode):
                    yield name, about.st_size, about.st_mtime_ns
            except OSError as error:  # such as a link to nothing, or to itself
                skipped[name] = error.strerror or "it cannot be read"


def _files_of_archive(path: Path, skipped: dict[str, str]) -> Iterator[tuple[str, int, int]]:
    """(name, size, checksum) of every file of a .zip. UserError if it is damaged or would unpack to too much."""
    try:
        check_archive(path, largest=max(MIN_BYTES, MAX_RATIO * path.stat().st_size))
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path} is damaged or no .zip of pictures: {one_line(error)}") from error
    for part in parts:
        name = _archive_name(part)
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            skipped[name] = "its path leads out of the archive"
        elif not name.endswith("/"):
            yield name, part.file_size, part.CRC


def _archive_name(part: zipfile.ZipInfo) -> str:
    """The name of a file in a .zip, in UTF-8 and with /, even if the program that wrote it had other habits.

    The Finder does not say that it writes UTF-8, tar begins names with ./, and some programs of Windows write \\.
    """
    name = part.filename
    with contextlib.suppress(UnicodeError):
        if not part.flag_bits & UTF8_FLAG:
            name = part.filename.encode("cp437").decode()
    name = name.replace("\\", "/")
    return name.removeprefix("./")


def _classes(names: Sequence[str]) -> dict:
    """The labels, class_names, mixed and shared of `Found`: of pictures by their first sub-folders below `shared`."""
    folders = [name.rpartition("/")[0] for name in names]
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts.values(), strict=False)))
    tops = {folder: _plain(part[depth], CLASS_NAME) if len(part) > depth else "" for folder, part in parts.items()}
    class_names, shared = sorted(set(tops.values()), key=_by_number), "/".join(parts[folders[0]][:depth])
    if len(class_names) < 2 or "" in class_names:
        return dict(labels=[0] * len(names), class_names=(), mixed=len(class_names) > 1, shared=shared)
    numbers = {name: number for number, name in enumerate(class_names)}
    return dict(labels=[numbers[tops[folder]] for folder in folders], class_names=tuple(class_names), mixed=False,
                shared=shared)


def _by_number(name: str) -> tuple:
    """A key that sorts 2 before 10, and numbers before other names."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def _plain(name: str, length: int = 100) -> str:
    """The name of a file or folder on one line, in the same form whatever the file system keeps."""
    return unicodedata.normalize("NFC", one_line(os.fsencode(name).decode("utf-8", "replace"), length)) or "?"


def describe(skipped: dict[str, str], shown: int = 3) -> str:
    """"3 skipped: a.png (truncated), ..." with the first of them."""
    some = ", ".join(f"{_plain(name)} ({one_line(why, 90)})" for name, why in list(skipped.items())[:shown])
    return f"{len(skipped):,} skipped: {some}{', ...' if len(skipped) > shown else ''}"


def describe_others(others: dict[str, int], shown: int = 3) -> str:
    """"48 other files (45 .heic, 2 .mov, 1 without an ending)", and what to do with pictures that cannot be read."""
    kinds = [f"{count:,} {kind or 'without an ending'}" for kind, count in others.items()]
    kinds = [*kinds[:shown], "..."] if len(kinds) > shown else kinds
    said = f"{sum(others.values()):,} other files"
    said += f" ({', '.join(kinds)})" if kinds else ""
    unread = next((kind for kind in (".heic", ".heif", ".avif") if kind in others), None)
    return f"{said}; save the {unread} files as JPEG to use them, too" if unread else said


def _find_in_npz(path: Path) -> Found:
    """The pictures of a .npz by their numbers: arr_0 or images (N, H, W) or (N, H, W, C) uint8, labels (N,) or none.

    UserError if it holds other arrays. Only the labels are read.
    """
    try:
        check_archive(path, largest=max(MIN_BYTES, MAX_RATIO * path.stat().st_size))
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            name, shape, dtype = _check_arrays(file, archive)
            labels = file.get("labels")
            contents = [(part.filename, part.file_size, part.CRC) for part in archive.infolist()]
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except Exception as error:  # zipfile, zlib and numpy raise different errors for damaged files
        raise UserError(f"{path} is damaged or no .npz of pictures: {one_line(error, 250)}") from error
    if len(shape) == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        raise UserError(f"the pictures in {path} have the shape {shape}: save images.transpose(0, 2, 3, 1), "
                        f"(N, H, W, C)")
    if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)) or not shape[0]:
        raise UserError(f"the pictures in {path} are {dtype} {shape}: save uint8 of the shape (N, H, W), (N, H, W, 1) "
                        f"or (N, H, W, 3), such as np.uint8(np.round(x * 255)) of images x in [0, 1]")
    values = np.zeros(shape[0], int) if labels is None else labels
    if values.shape != shape[:1] or values.dtype.kind not in "iuU":
        raise UserError(f"the labels in {path} must be {shape[0]:,} whole numbers or names, not {values.dtype} "
                        f"{values.shape}")
    known, numbers = np.unique(values, return_inverse=True)
    names = [_plain(str(name), CLASS_NAME) for name in known]  # some may be the same, such as "cat" and "cat "
    classes = tuple(dict.fromkeys(names))
    place = {name: number for number, name in enumerate(classes)}
    labels = np.array([place[name] for name in names])[numbers].tolist()
    return Found([str(k) for k in range(shape[0])], labels, classes if len(classes) > 1 else (), {}, {},
                 hashlib.sha256(repr(contents).encode()).hexdigest(), mixed=False, array=name, side=min(shape[1:3]),
                 unpacked=int(np.prod(shape)))


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the type of an array of a .npz, which is not read. KeyError if there is none of this name."""
    with archive.open(f"{name}.npy") as array:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(array)[0]](array)
        return shape, dtype


def _check_arrays(file, archive: zipfile.ZipFile) -> tuple[str, tuple[int, ...], np.dtype]:
    """The name, the shape and the type of the array of pictures in a .npz.

    UserError for labels that have another name or are objects.
    """
    name = array_name(file.files)
    shape, dtype = _header(archive, name)
    if archive.getinfo(f"{name}.npy").file_size < math.prod(shape) * dtype.itemsize:
        raise UserError(f"is damaged: its array {name} has fewer bytes than its shape {shape} asks for")
    if "labels" in file.files:
        if _header(archive, "labels")[1].hasobject:
            raise UserError("has labels that are Python objects: save labels.astype(str)")
        return name, shape, dtype
    shapes = {}
    for other in sorted(set(file.files) - {name}):
        with contextlib.suppress(KeyError, ValueError):  # of something else than an array
            shapes[other] = _header(archive, other)[0]
    if like_labels := [other for other, found in shapes.items() if found in (shape[:1], (*shape[:1], 1))]:
        raise UserError(f"has an array {like_labels[0]} that looks like labels: save it as "
                        f"np.savez(path, {name}=images, labels=labels.ravel()), or leave it out of the file")
    return name, shape, dtype


def unpack_array(path: Path, name: str, target: Path) -> None:
    """Write an array of a .npz to a file that can be mapped into memory. UserError if the .npz is damaged."""
    with target.open("wb") as file:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as array:
                shutil.copyfileobj(array, file)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{path} is damaged: {one_line(error, 250)}") from error


class Source:
    """Opens the pictures of a folder, an archive or a .npy of pictures by their names."""

    def __init__(self, path: Path):
        self.path, self.archive, self.array, self.parts = path, None, None, {}
        if path.suffix == ".npy" and path.is_file():
            self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif not path.is_dir():
            self.archive = zipfile.ZipFile(path)
            self.parts = {_archive_name(part): part for part in self.archive.infolist()}

    def reopen(self) -> "Source":
        """This source in a forked process, with a place of its own in the archive."""
        if self.archive:
            self.archive.fp = io.FileIO(self.path)
        return self

    def open(self, name: str):
        """A path or a file for PIL. ValueError for a file of more than MAX_BYTES."""
        if self.array is not None:
            from PIL import Image

            pixels, file = self.array[int(name)], io.BytesIO()
            Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).save(file, "PNG", compress_level=0)
            return file
        if not self.archive:
            if os.path.getsize(path := os.path.join(self.path, name)) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
            return path
        if self.parts[name].file_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return self.archive.open(self.parts[name])
