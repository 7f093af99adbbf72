"""Your own pictures, read once into one file that later runs map into memory.

data_dir/pictures/NAME-KEY holds for one folder of pictures and one way to read them, which KEY stands for:

    images.npy    (N, C, H, W) uint8: the test split, then validation, then train, each in the order of hashes
    labels.npy    (N,) int64
    about.json    what was read: see `_sort`

A picture's split and place follow from a hash of its pixels, so that copies of one picture are always in the same
split, and the files are the same on every machine, whatever the folder is called and in whichever order it is listed.
"""

import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_sources.folder import Found, Source, describe, describe_others, find_pictures, unpack_array
from data_sources.pictures import decode, open_image
from runtime.children import end_with
from runtime.cores import available_cores
from runtime.errors import RunFailed, UserError
from runtime.files import check_writable, one_line, quoted, write_json
from runtime.locks import alone, if_free
from runtime.progress import Bar

VERSION = 4  # of what is read from a picture; part of the key
MIN_HELD_OUT, HELD_OUT = 200, 0.1  # of fewer different pictures none is held out; else these shares for two splits
SIZES, LARGEST = (28, 32, 64), 512  # the sides that are chosen by themselves; the largest that can be asked for
SIZED = 100  # pictures whose sizes are looked at
CHUNK, MIN_PARALLEL = 32, 256  # pictures that a process reads at a time; fewer are read without other processes
MOST_PROCESSES = 61  # that Windows lets one process wait for
PART = r"(train|test|val|dev|eval|pred)(?:ing|id|idation|uation|iction)?\d*"
SPLIT_NAME = re.compile(rf"(?i)(?:.*[\W_])?{PART}(?:[\W_].*)?")  # of a part of a data set, such as seg_train
CLEAR = 16  # levels between the channels of a pixel that make a colour clear; less may be the tint of a scan
BLOCK = 2**22  # bytes of pictures that are sorted into the final file at a time


class Pictures(NamedTuple):
    """Pictures and how to read them: the flags of these names; image_size None: chosen."""

    path: str
    image_size: int | None = None
    fit: str = "crop"
    channels: str = "auto"
    background: str = "white"


def pictures_of(args: Namespace) -> Pictures:
    """The pictures that the flags ask for."""
    return Pictures(args.dataset, **{name: getattr(args, name) for name in Pictures._fields[1:] if hasattr(args, name)})


# ------------------------------------------------------------------------------------------------- finding the cache


def cached(pictures: Pictures, data_dir: str | Path, small: bool = True, quiet: bool = False) -> Path:
    """The folder of the cache of these pictures, which are read if that has not been done or if any file has changed.

    small: where no size is asked for, choose at most 32 pixels, for a slow device. Prints what was found. UserError if
    the pictures cannot be used.
    """
    path = Path(pictures.path).absolute()
    found = find_pictures(path)
    pictures = pictures._replace(path=str(path), image_size=_checked_size(pictures.image_size) or _size(
        found.side if found.array else _median_side(Source(path), found.names), small))
    name, place = short_name(path), Path(data_dir).absolute() / "pictures"
    key = hashlib.sha256(repr((VERSION, found.listing, found.class_names, pictures[1:])).encode()).hexdigest()[:16]
    folder = place / f"{name}-{key}"
    if not (folder / "about.json").exists():
        check_writable(place, "another --data_dir")
        with alone(place / f".{folder.name}.lock", "Another process is reading these pictures: waiting for it"):
            if not (folder / "about.json").exists():
                _read_all(pictures, found, name, folder)
                for line in _older(folder, pictures):
                    print(line, flush=True)
    if not quiet:
        print("\n".join(summary(about(folder))), flush=True)
    return folder


def _older(folder: Path, pictures: Pictures) -> Iterator[str]:
    """A line about earlier readings of the same folder in the same way, which files that changed have made useless."""
    for other in sorted(folder.parent.glob("*/about.json")):
        with contextlib.suppress(UserError, OSError):  # it may be deleted just now
            content = about(other.parent)
            if other.parent != folder and {name: content.get(name) for name in Pictures._fields} == pictures._asdict():
                size = sum(file.stat().st_size for file in other.parent.iterdir())
                yield (f"These pictures were read before, and have changed: {other.parent} ({size:,} bytes) can be "
                       f"deleted, unless a checkpoint that learned from them is still to be used")


def find_cached(key: str, digest: str, data_dir: str | Path) -> Path | None:
    """The folder of the cache with this key and this digest of pictures, if it is there; it replaces the pictures."""
    if not re.fullmatch("[0-9a-f]{16}", key):
        return None
    found = sorted((Path(data_dir).absolute() / "pictures").glob(f"*-{key}/about.json"))
    return next((path.parent for path in found if about(path.parent).get("digest") == digest), None)


def short_name(path: Path) -> str:
    """A name for a data set that is also good for a file: letters, digits and _.- of the name of `path`."""
    return f"my_{re.sub(r'[^A-Za-z0-9_.-]+', '_', path.stem).strip('._') or 'pictures'}"[:43]


def about(folder: Path) -> dict:
    """about.json of a cache. UserError if it is missing or damaged."""
    try:
        content = json.loads((folder / "about.json").read_text())
        return content if content["splits"].keys() == {"test", "validation", "train"} else content["missing"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder} is damaged: delete it, then the pictures are read again") from error


def open_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """(images (N, C, H, W) uint8 mapped from the file, labels (N,) int64, about.json) of a split; N may be 0."""
    content = about(folder)
    try:
        images, labels = _mapped(folder / "images.npy"), np.load(folder / "labels.npy")
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images) == len(labels) == content["count"]:
            raise ValueError("other arrays than about.json says")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({one_line(error)}): delete it, then the pictures are read "
                        f"again") from error
    first = 0
    for name, count in content["splits"].items():
        if name == split:
            return images[first:first + count], labels[first:first + count].copy(), content
        first += count
    raise KeyError(split)


def _mapped(path: Path) -> np.ndarray:
    """An array mapped from its file, which changes of the array do not reach; a very large one must not be changed."""
    try:
        return np.load(path, mmap_mode="c")
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return np.load(path, mmap_mode="r")  # Linux has no "c" for files larger than the memory


def summary(content: dict) -> Iterator[str]:
    """Lines that say what was read: about.json in words."""
    skipped, shape, splits = content["skipped"], content["shape"], content["splits"]
    said = [f"{content['name']}: {content['count']:,} pictures used"]
    said += [describe(skipped)] if skipped else []
    said += [describe_others(content["others"])] if content["others"] else []
    yield "; ".join(said)
    classes = ", ".join(f"{name} {count:,}" for name, count in zip(content["class_names"], content["counts"],
                                                                   strict=True))
    kind, number = "grey" if shape[0] == 1 else "colour", len(content["class_names"])
    yield (f"As {shape[1]}×{shape[2]}, {kind}, --fit {content['fit']}; "
           f"{f'{number} classes: {one_line(classes, 300)}' if classes else 'no classes'}")
    if part := part_for_training(content["class_names"]):
        path = Path(content["path"])
        unpack = "" if path.is_dir() else "unpack the archive and "
        such_as = (path.with_suffix("") if unpack else path) / one_line(content["shared"], None) / part
        yield (f"These look like parts for training and for testing, and not like classes: to learn the classes in one "
               f"of them, {unpack}give it with --dataset, such as {quoted(such_as)}")
    if unlearned := [name for name, count in zip(content["class_names"], content["learned"], strict=True) if not count]:
        yield (f"All pictures of {one_line(', '.join(unlearned), 300)} are held out, so that none is left to learn "
               f"from: add some, or leave the class out")
    if content["copies"]:
        two = f"; in more than one class: {content['in_two_classes']:,}" if content["in_two_classes"] else ""
        yield f"Exact copies of others: {content['copies']:,}{two}"
    if content["mixed"]:
        yield "Some lie beside the sub-folders: for classes, move every picture into a sub-folder"
    if content["transparent"]:
        yield f"{content['transparent']:,} have transparent parts, which show --background {content['background']}"
    if shape[0] == 3 and content["clear"] < 0.1 * content["count"]:
        yield f"Only {content['clear']:,} have clear colours: --channels 1 turns all pictures to grey"
    if splits["test"]:
        yield (f"{splits['train']:,} to learn from, {splits['validation']:,} for validation and {splits['test']:,} for "
               f"test, chosen by their content")
    else:
        yield (f"With fewer than {MIN_HELD_OUT} different pictures none is held out: there is no validation loss, and "
               f"evaluate.py cannot compare with unseen pictures")


def part_for_training(class_names: Sequence[str]) -> str | None:
    """Which of the classes is the part for training, if all of them look like the parts of a data set and not classes.

    As in train, test; seg_train, seg_test; training, validation.
    """
    parts = [match and match[1].lower() for match in map(SPLIT_NAME.fullmatch, class_names)]
    return class_names[parts.index("train")] if all(parts) and "train" in parts else None


# ---------------------------------------------------------------------------------------------- choosing and reading


def size_step(side: int) -> int:
    """What an --image_size of about `side` has to be a multiple of: 4 up to 64 pixels, 8 to 128, 16 to 256, 32 above.

    So a network comes down to 16 × 16 positions or fewer (`training.sizing`), where attention costs little.
    """
    return max(4, 2**math.ceil(math.log2(side)) // 16)


def _checked_size(side: int | None) -> int | None:
    """--image_size. UserError, with the nearest valid one, for a side that the networks cannot divide well."""
    if side is None or (8 <= side <= LARGEST and side % size_step(side) == 0):
        return side
    within = min(LARGEST, max(8, side))
    step = size_step(within)
    raise UserError(f"--image_size must be a multiple of {step} from 8 to {LARGEST}"
                    f"{f', for pictures of about {within} pixels' if step > 4 else ''}: the nearest to {side} is "
                    f"{max(8, step * round(within / step))}")


def _size(side: float, small: bool) -> int:
    """The largest of SIZES that is no more than the median shorter side of the pictures; if `small` at most 32."""
    most = min(side, 32 if small else SIZES[-1])
    return max([size for size in SIZES if size <= most], default=SIZES[0])


def _median_side(source: Source, names: Sequence[str]) -> float:
    """The median of the shorter sides of some of the pictures."""
    sides = []
    for name in names[::max(1, len(names) // SIZED)]:
        with contextlib.suppress(Exception), open_image(source.open(name)) as image:  # it is named when it is read
            sides.append(min(image.size))
    return statistics.median(sides or [SIZES[0]])


class _Task(NamedTuple):
    """What the reading processes share: where the pictures are, their shape, and the file that gets them.

    place: the path of the pictures; of a .npz that of its array, unpacked
    """

    pictures: Pictures
    place: Path
    shape: tuple[int, int, int]
    names: Sequence[str]
    scratch: Path  # N pictures (C, H, W) uint8, without a header


class _Fact(NamedTuple):
    """What is known of a picture that was read, or why it was not."""

    digest: bytes = b""  # of its pixels as it was scaled, grey as colour
    coloured: bool = False
    clear: bool = False  # whether it has a clear colour
    transparent: bool = False
    why: str = ""


def _read_rows(rows: range) -> list[_Fact]:
    """Read pictures into their rows of the scratch file; returns what is known of each."""
    task, source = _shared
    pictures = np.zeros((len(rows), *task.shape), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = [_read(task, source, task.names[row], picture) for row, picture in zip(rows, pictures, strict=True)]
    with task.scratch.open("r+b") as file:
        file.seek(rows.start * pictures[0].size)
        file.write(pictures)
    return facts


def _read(task: _Task, source: Source, name: str, picture: np.ndarray) -> _Fact:
    """Read one picture into `picture` (C, H, W).

    UserError if the system cannot read it: it may be able to later, so this must not be kept.
    """
    try:
        pixels, transparent = decode(source.open(name), task.shape, task.pictures.fit, task.pictures.background)
    except MemoryError as error:
        raise UserError(f"there is too little memory for {name}: close other programs, or move it out of "
                        f"{task.pictures.path}") from error
    except FileNotFoundError as error:  # the next listing differs, and is read anew
        if not task.place.exists():
            raise UserError(f"{task.pictures.path} is no longer there: run again when it is") from error
        return _Fact(why="it was deleted meanwhile")
    except Exception as error:  # PIL raises different errors for damaged files
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{name} cannot be read ({error.strerror}): run again, or mend that, or move it out of "
                            f"{task.pictures.path}") from error
        return _Fact(why=_why(error, task.pictures.path))
    picture[:] = pixels.transpose(2, 0, 1)
    tint = int((picture.max(0) - picture.min(0)).max())  # the most that the channels of a pixel differ, in levels
    in_colour = pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, 2)
    return _Fact(hashlib.sha256(in_colour.data).digest(), tint > 0, tint >= CLEAR, transparent)


def _why(error: Exception, folder: str) -> str:
    """Why PIL could not read a picture, in a few words and without the path of the folder."""
    if "cannot identify image file" in str(error):
        return "it is no picture, or damaged at its beginning"
    return one_line(str(error).replace(f"{folder}/", "")) or "damaged"


_shared: list = [None, None]  # of a reading process: its _Task and Source


def _begin(task: _Task, source: Source | None, parent: int) -> None:
    """Begin a reading process: Ctrl-C is for its parent, whose end, even by a kill, is its own.

    source: of the parent, if this is a fork of it: the list of a large archive is then in memory once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    _shared[:] = task, source.reopen() if source else Source(task.place)


@contextlib.contextmanager
def _readers(task: _Task) -> Iterator[Callable]:
    """The map of processes for `_read_rows` and `_place`; where there is little to read, of this process alone."""
    cores = min(available_cores(), MOST_PROCESSES)
    if len(task.names) < MIN_PARALLEL or cores == 1:
        _shared[:] = task, Source(task.place)
        try:
            yield map
        finally:
            _shared[:] = None, None
    else:  # fork starts at once; outside Linux it is not safe beside the system's own threads
        method = "fork" if sys.platform == "linux" else "spawn"
        source = Source(task.place) if method == "fork" else None
        with warnings.catch_warnings(), ProcessPoolExecutor(
                cores, multiprocessing.get_context(method), _begin, (task, source, os.getpid())) as executor:
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the readers use none
            try:
                yield executor.map
            except BrokenProcessPool as error:
                raise RunFailed("a process that reads pictures was killed, perhaps because memory ran out: close other "
                                "programs and run again") from error
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise


def _read_all(pictures: Pictures, found: Found, name: str, folder: Path) -> None:
    """Read the pictures and write the folder of their cache, whole or not at all."""
    temporary, side = folder.with_name(f".{folder.name}.tmp"), pictures.image_size
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed, as those of other keys:
    for left in folder.parent.glob(f".{name}-*.tmp"):
        with if_free(left.with_suffix(".lock")) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    place = temporary / "unpacked.npy" if found.array else Path(pictures.path)
    task = _Task(pictures, place, (1 if pictures.channels == "1" else 3, side, side), found.names,
                 temporary / "scratch")
    _check_space(folder.parent, 2 * len(found.names) * task.shape[0] * side * side + found.unpacked)
    try:
        temporary.mkdir()
        if found.array:
            unpack_array(Path(pictures.path), found.array, place)
        task.scratch.touch()
        with _readers(task) as mapped:
            facts = _read_in_parallel(task, mapped)
            content = _sort(task, facts, found, mapped)
        task.scratch.unlink()
        if found.array:
            place.unlink()
        write_json(dict(name=name, **content, key=folder.name[-16:]), temporary / "about.json")
        shutil.rmtree(folder, ignore_errors=True)  # without an about.json
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_space(folder: Path, size: int) -> None:
    """UserError if the disk has less than `size` bytes left."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(f"reading the pictures takes up to {size:,} bytes in {folder}, and {free:,} are free: choose "
                        f"another --data_dir, or a smaller --image_size")


def _read_in_parallel(task: _Task, mapped: Callable) -> list[_Fact]:
    """What `_read_rows` returns for all pictures, with a bar."""
    chunks = [range(first, min(first + CHUNK, len(task.names))) for first in range(0, len(task.names), CHUNK)]
    facts, parts = [], mapped(_read_rows, chunks)  # which forks, before the bar has a thread
    with Bar("reading pictures", len(task.names), "pictures") as bar:
        for part in parts:
            facts += part
            bar.update(len(part))
    return facts


def _sort(task: _Task, facts: Sequence[_Fact], found: Found, mapped: Callable) -> dict:
    """Write images.npy and labels.npy beside the scratch file; returns what about.json says of them.

    UserError if no picture could be read.
    """
    pictures, folder = task.pictures, task.scratch.parent
    skipped = found.skipped | {name: fact.why for name, fact in zip(found.names, facts, strict=True) if fact.why}
    used = [row for row, fact in enumerate(facts) if not fact.why]
    if not used:
        raise UserError(f"{pictures.path} holds no picture that can be read; {describe(skipped)}")
    hashes = [facts[row].digest for row in used]
    used = [used[i] for i in sorted(range(len(used)), key=lambda i: (hashes[i], found.labels[used[i]]))]
    hashes.sort()
    counts = {name: sum(getattr(facts[row], name) for row in used) for name in ("coloured", "clear", "transparent")}
    channels = 1 if pictures.channels == "1" or (pictures.channels == "auto" and not counts["coloured"]) else 3
    shape = (channels, *task.shape[1:])
    images = np.lib.format.open_memmap((images_file := folder / "images.npy"), "w+", np.uint8, (len(used), *shape))
    size = max(1, BLOCK // math.prod(task.shape))
    blocks = [(used[first:first + size], images.offset + first * math.prod(shape))
              for first in range(0, len(used), size)]
    for _ in mapped(partial(_place, target=images_file, channels=channels), blocks):
        pass
    present, labels = np.unique([found.labels[row] for row in used], return_inverse=True)
    np.save(folder / "labels.npy", labels := labels.astype(np.int64))
    for name in ("images.npy", "labels.npy"):  # about.json must not be on the disk before them
        with (folder / name).open("r+b") as file:
            os.fsync(file.fileno())
    class_names = [found.class_names[label] for label in present] if len(present) > 1 else []
    splits = _splits(hashes)
    learned = np.bincount(labels[len(labels) - splits["train"]:], minlength=len(class_names))
    classes_of = Counter(digest for digest, _ in {*zip(hashes, labels.tolist(), strict=True)})  # of each picture
    digest = hashlib.sha256(b"".join(hashes) + labels.tobytes() + json.dumps([class_names, images.shape]).encode())
    return dict(count=len(used), shape=list(images.shape[1:]), class_names=class_names,
                counts=np.bincount(labels, minlength=len(class_names)).tolist()[:len(class_names)],
                learned=learned.tolist()[:len(class_names)], splits=splits, copies=len(used) - len(classes_of),
                in_two_classes=sum(count > 1 for count in classes_of.values()), digest=digest.hexdigest(),
                others=found.others, mixed=found.mixed, shared=found.shared, skipped=skipped, **counts,
                **pictures._asdict())


def _place(block: tuple[Sequence[int], int], target: Path, channels: int) -> None:
    """Write pictures into images.npy: (their rows in the scratch file, where in `target` they begin, in bytes)."""
    rows, first = block
    task, _ = _shared
    scratch = np.memmap(task.scratch, np.uint8, "r", shape=(len(task.names), *task.shape))
    with target.open("r+b") as file:
        file.seek(first)
        file.write(np.ascontiguousarray(scratch[rows, :channels]))


def _splits(hashes: Sequence[bytes]) -> dict[str, int]:
    """How many of the sorted hashes each split gets, in the order of the file: by the number that a hash begins with.

    So a picture stays in its split when others are added.
    """
    if len(set(hashes)) < MIN_HELD_OUT:
        return dict(test=0, validation=0, train=len(hashes))
    shares = np.array([int.from_bytes(each[:8], "big") / 2**64 for each in hashes])
    test, held_out = np.searchsorted(shares, [HELD_OUT, 2 * HELD_OUT]).tolist()
    return dict(test=test, validation=held_out - test, train=len(hashes) - held_out)
