"""Measure training on many pictures of one's own: reading them, memory, and speed."""

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import processes
from benchmarks.context import Context
from benchmarks.tables import print_row
from runtime.cores import available_cores

CHUNK = 50  # pictures that a process reads or writes at a time
EACH = 40  # pictures that are made of one drawn scene: moved sideways, and mirrored


def measure_pictures(context: Context) -> dict:
    """Draw many pictures of 64×64, read them, train on them.

    read_ratio    seconds of the first reading, as train.py does it, for each second that decoding alone takes
    speed_ratio   images per second of training, the pictures mapped from their file over the same ones in memory
    own_mb        the most memory of its own that train.py had: pages of the file, which can be dropped, do not count
    """
    plan, folder, data_dir = context.plan.pictures, context.temporary / "many", context.temporary / "data"
    draw_pictures(folder, plan["count"])
    decoding = [processes.run_job("decode_pictures", folder=str(folder))["seconds"]]
    reading = processes.run_job("read_pictures", folder=str(folder), data_dir=str(data_dir))
    decoding.append(processes.run_job("decode_pictures", folder=str(folder))["seconds"])
    argv = [*context.plan.train_flags, "--dataset", str(folder), "--image_size", "64", "--data_dir", str(data_dir),
            "--device", context.device, "--budget", f"{plan['train_seconds']}s", "--sample_interval", "0",
            "--output_dir", str(context.temporary / "pictures")]
    training = processes.run_job("train_on_pictures", argv=argv)
    speeds = processes.run_job("picture_steps", checkpoint=str(context.temporary / "pictures/model_final.pt"),
                               cache=reading["cache"], device=context.device, seconds=plan["step_seconds"])["speeds"]
    found = dict(count=plan["count"], decode_seconds=decoding, read_seconds=reading["seconds"],
                 read_ratio=reading["seconds"] / statistics.mean(decoding), read_own_mb=reading["own_mb"],
                 own_mb=training["own_mb"], speeds=speeds,
                 speed_ratio=statistics.median(speeds["mapped"]) / statistics.median(speeds["in memory"]))
    print_row(f"{plan['count']:,} pictures", "decoding, s", "reading, s", "ratio", "own memory, MB", "speed ratio")
    print_row("", statistics.mean(decoding), found["read_seconds"], found["read_ratio"], found["own_mb"],
              found["speed_ratio"])
    return found


# ------------------------------------------------------------------------------------------------------------- jobs


def decode_pictures(folder: str) -> dict:
    """The seconds of decoding all PNGs of a folder to arrays on all cores, and of nothing else."""
    start, paths = time.perf_counter(), sorted(str(path) for path in Path(folder).rglob("*.png"))
    with ProcessPoolExecutor(available_cores()) as pool:
        values = sum(pool.map(_decode, paths, chunksize=CHUNK))
    return dict(seconds=time.perf_counter() - start, values=values)


def read_pictures(folder: str, data_dir: str) -> dict:
    """The seconds of the first reading, and where it is kept ("cache")."""
    from data_sources.cache import Pictures, cached

    with own_memory() as memory:
        start = time.perf_counter()
        cache = cached(Pictures(folder, 64), data_dir, quiet=True)
        seconds = time.perf_counter() - start
    return dict(seconds=seconds, cache=str(cache), **memory)


@contextlib.contextmanager
def own_memory() -> Iterator[dict]:
    """Yields a dict that gets "own_mb": the most anonymous memory that this process held, in 10^6 bytes. Only Linux."""
    found, ended, status = dict(own_mb=None), threading.Event(), Path("/proc/self/status")

    def watch():
        last = False
        while not last:
            last = ended.wait(0.02)
            [line] = [line for line in status.read_text().splitlines() if line.startswith("RssAnon:")]
            found["own_mb"] = max(found["own_mb"] or 0, int(line.split()[1]) * 1024 / 1e6)
    watcher = threading.Thread(target=watch, daemon=True)
    if status.exists():
        watcher.start()
    try:
        yield found
    finally:
        ended.set()
        if watcher.is_alive():
            watcher.join()


# ------------------------------------------------------------------------------------------------------ the pictures


def draw_pictures(folder: Path, count: int) -> None:
    """Write `count` different colour PNGs of 64×64 in four sub-folders, by the number of objects in them."""
    from data_sources.scenes import draw_scenes

    scenes = draw_scenes(-(-count // EACH), 0)
    for label in range(4):
        (folder / str(label + 1)).mkdir(parents=True)
    with ProcessPoolExecutor(available_cores(), initializer=_share, initargs=(scenes,)) as pool:
        list(pool.map(partial(_write, folder), range(count), chunksize=CHUNK))


def _share(scenes) -> None:
    global _scenes
    _scenes = scenes


def _write(folder: Path, number: int) -> None:
    from PIL import Image

    scene, variant = divmod(number, EACH)
    pixels = np.roll(_scenes.images[scene].transpose(1, 2, 0), 3 * (variant // 2), 1)
    pixels = np.ascontiguousarray(pixels[:, ::-1] if variant % 2 else pixels)
    Image.fromarray(pixels).save(folder / str(_scenes.labels[scene] + 1) / f"{number:06}.png")


def _decode(path: str) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB")).size
