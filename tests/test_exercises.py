"""guide/exercises: each test fails on the file as given and on common mistakes, and passes on the solution."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from documents import broken_links

EXERCISES = [f"ex{number:02}" for number in range(1, 11)]
OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) \S+::test_(ex\d\d)_", re.MULTILINE)
EACH = """
import sys, pytest
for folder in sys.argv[1:]:
    print("ANSWERS", folder)
    pytest.main(["-rA", "--tb=no", "-p", "no:cacheprovider", "guide/exercises", "--answers", folder])
"""
MISTAKES = {  # a text of each solution, and what makes it wrong
    "ex01": ("np.exp(-log_snr)", "np.exp(-log_snr / 2)"),
    "ex02": ("(1 - rate).sqrt()", "(1 - rate)"),
    "ex03": ("alpha * x_t - sigma * v", "(x_t - sigma * v) / alpha"),
    "ex04": ("beta**0.5 * randn", "beta * randn"),
    "ex05": ("inner / sigma**2", "inner / sigma"),
    "ex06": ("(x_t - alpha_t * x_0_hat) / sigma_t", "x_t - alpha_t * x_0_hat"),
    "ex07": ("unconditional + scale", "conditional + scale"),
    "ex08": ("mask * x_s + (1 - mask) * diffusion", "(1 - mask) * x_s + mask * diffusion"),
    "ex09": ("a.T.cov(), b.mean(0), b.T.cov()", "a.T.cov(), a.mean(0), b.T.cov()"),
    "ex10": ("(here + there) / 2", "there"),
}


def source(folder, name):
    [path] = folder.glob(f"{name}_*.py")
    return path


def functions(path):
    """{name: signature} of the functions that a file defines."""
    names = {"__name__": path.stem}
    exec(path.read_text(), names)
    return {name: inspect.signature(each) for name, each in names.items()
            if inspect.isfunction(each) and each.__module__ == path.stem}


def test_starting_points_and_common_mistakes_fail_and_solutions_pass(root, tmp_path):
    """All in one process, because to begin one takes seconds."""
    for name, (right, wrong) in MISTAKES.items():
        path = source(root / "guide/exercises/solutions", name)
        assert path.read_text().count(right) == 1, name
        (tmp_path / path.name).write_text(path.read_text().replace(right, wrong))
    expected = {"guide/exercises": "FAILED", "guide/exercises/solutions": "PASSED", str(tmp_path): "FAILED"}
    done = subprocess.run([sys.executable, "-c", EACH, *expected], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    parts = done.stdout.split("ANSWERS ")[1:]
    assert [part.splitlines()[0] for part in parts] == list(expected), done
    for part, outcome in zip(parts, expected.values(), strict=True):
        found = {name: outcome for outcome, name in OUTCOME.findall(part)}
        assert found == dict.fromkeys(EXERCISES, outcome), part


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_has_the_functions_of_its_exercise(root, name):
    start, solution = (source(root / folder, name) for folder in ("guide/exercises", "guide/exercises/solutions"))
    assert start.name == solution.name and functions(start) == functions(solution) != {}


def test_the_page_has_a_section_and_a_command_for_every_exercise(root):
    text = (root / "guide/exercises.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == len(EXERCISES)
    for name, section in zip(EXERCISES, sections, strict=True):
        assert section.startswith(f"{int(name[2:])} ") and source(root / "guide/exercises", name).name in section
        assert f"    python -m pytest guide/exercises -k {name}\n" in section
        assert all(part in section for part in ("**Hint.**", "**Where to look.**", "**What you learn.**"))
    assert broken_links(root, "guide/exercises.md") == []
