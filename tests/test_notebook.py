import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "samplear.ipynb"


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_notebook_runs_from_outside_the_repository(tmp_path):
    """Top to bottom, in a folder that merely holds a clone, as on Colab."""
    (tmp_path / "clone").symlink_to(ROOT, target_is_directory=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    metadata = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=240, resources=metadata).execute()
    assert pictures(notebook) == shown > 5


def test_notebook_is_committed_as_executed():
    """Every code cell ran, in order and without error, and names no path of the machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    shown = [cell.source for cell in code] + [o.get("text", "") for o in outputs(notebook)]
    assert not re.search(r"/(home|root|work|content|Users|tmp)/", "".join(shown))


def test_readme_names_only_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link
