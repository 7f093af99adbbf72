"""Run each measurement in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, argv: Sequence[str]) -> dict:
    """Run a script of this project as from a shell; returns its "output" and its "process_seconds", start-up included.

    RunFailed with the last line of its error output.
    """
    return _run([str(ROOT / name), *argv])


def run_sample(argv: Sequence[str]) -> dict:
    """run_script of sample.py; also returns the "steps" and the "seconds" that it prints."""
    result = run_script("sample.py", argv)
    printed = re.search(r"\d+ images by .* in (\d+) steps: ([\d.]+) s", result["output"])
    if not printed:
        raise RunFailed(f"sample.py does not print its time: {result['output'][-200:]!r}")
    return dict(result, steps=int(printed[1]), seconds=float(printed[2]))


def run_job(job: str, **fields) -> dict:
    """Run a job of benchmarks/jobs.py and return what it measured. Paths among the fields must be absolute."""
    result = _run(["-m", "benchmarks.jobs", json.dumps(dict(job=job, parent=os.getpid(), **fields))], folder=ROOT)
    return json.loads(result["output"].splitlines()[-1])


def _run(argv: Sequence[str], folder: Path | None = None) -> dict:
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise RunFailed(lines[-1].strip())
    return dict(output=process.stdout, process_seconds=time.perf_counter() - start)
