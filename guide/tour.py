"""Run tour.ipynb and keep the pictures of the cells that show one in the repository; no other output.

    python -m guide.tour

Needs requirements-dev.txt, and some minutes.
"""

import sys

from guide.results import ROOT
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.parser import Parser
from runtime.script import script

PATH = ROOT / "tour.ipynb"


def strip(cells: list, keep: list[bool]) -> None:
    """Leave of the outputs of code cells the pictures, and of the cells that are not to be kept nothing."""
    for cell, kept in zip(cells, keep, strict=True):
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if kept and "image/png" in output.get("data", {})]
        for output in cell.outputs:
            output.data, output.metadata = {"image/png": output.data["image/png"]}, {}


@script
def main(argv=None):
    Parser(__doc__).parse_args(argv)
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise UserError("this needs nbclient: pip install -r requirements-dev.txt") from error
    notebook = nbformat.read(PATH, 4)
    metadata, cells = dict(notebook.metadata), [cell for cell in notebook.cells if cell.cell_type == "code"]
    keep = [bool(cell.outputs) for cell in cells]
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    strip(cells, keep)
    notebook.metadata = metadata
    with atomic_write(PATH) as file:
        file.write(nbformat.writes(notebook).encode() + b"\n")
    print(f"Saved {PATH}")


if __name__ == "__main__":
    sys.exit(main())
