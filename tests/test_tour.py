"""tour.ipynb: it runs from top to bottom, and is kept small and clean."""

import json
import subprocess
import sys

import pytest
from documents import links

from guide import tour

MAX_BYTES, MAX_CELLS = 500_000, 3


@pytest.fixture(scope="module")
def path(pytestconfig):
    return pytestconfig.rootpath / "tour.ipynb"


@pytest.fixture(scope="module")
def cells(path):
    return json.loads(path.read_text())["cells"]


def test_tour_runs(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: pip install -r requirements-dev.txt")
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # else figures would not become outputs
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()  # raises at an error
    outputs = {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for source, made in outputs.items():
        assert not [output for output in made if output.get("name") == "stderr"], source
        if "\nshow(" in source or "\nplt.show(" in source:
            assert [output for output in made if "image/png" in output.get("data", {})], source


def test_on_a_hosted_service_the_first_cell_brings_the_project(cells, root, tmp_path):
    """In an empty folder, with the address of this repository: git clones it, and pip finds all that it needs."""
    pytest.importorskip("IPython", reason="IPython is missing: pip install -r requirements-dev.txt")
    if subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("there is no repository of git here")
    first = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    (tmp_path / "empty").mkdir()
    for address, said in (("", "set ADDRESS"), (str(root), f"{tmp_path}/tiny-diffusion/diffusion.py")):
        code = first.replace('ADDRESS = ""', f"ADDRESS = {address!r}").replace("cd -q /tmp", f"cd -q {tmp_path}")
        (tmp_path / "cell.ipy").write_text(f"{code}\nimport diffusion\nprint(diffusion.__file__)\n")
        done = subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", tmp_path / "cell.ipy"],
                              cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300)
        assert said in done.stdout + done.stderr, done
        assert (tmp_path / "tiny-diffusion/tour.ipynb").exists() == bool(address)


def test_outputs_are_stripped(path, cells):
    kept = [cell["outputs"] for cell in cells if cell.get("outputs")]
    assert 1 <= len(kept) <= MAX_CELLS
    for output in (output for outputs in kept for output in outputs):
        assert output["output_type"] == "display_data" and set(output["data"]) == {"image/png"}
    assert all(cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert path.stat().st_size < MAX_BYTES


def test_only_pictures_of_chosen_cells_are_kept():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: pip install -r requirements-dev.txt")
    new = nbformat.v4
    cells = [new.new_code_cell("1", execution_count=i, metadata={"execution": {"a": "1"}}, outputs=[
        new.new_output("stream", text="words"),
        new.new_output("display_data", {"image/png": "AAAA", "text/plain": "<Figure>"}, metadata={"needs": "?"}),
        new.new_output("execute_result", {"text/plain": "1"}, execution_count=i)]) for i in range(2)]
    tour.strip(cells, [False, True])
    assert [len(cell.outputs) for cell in cells] == [0, 1]
    assert cells[1].outputs[0] == new.new_output("display_data", {"image/png": "AAAA"})
    assert all(cell.execution_count is None and not cell.metadata for cell in cells)
    assert "words" not in nbformat.writes(new.new_notebook(cells=cells))


def test_code_is_clean(path):
    pytest.importorskip("ruff", reason="ruff is missing: pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", path]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_links_lead_to_files(path, cells):
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = [target for target in links(text) if "://" not in target]
    assert targets and not [target for target in targets if not (path.parent / target).exists()]
