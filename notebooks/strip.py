"""Make the exercises from the solutions: the same notebook without what stands between the fences.

    python notebooks/strip.py

A solution is the only place where an exercise is written. Its code cells tagged `exercise` have a fence,

    # YOUR CODE: what is asked
    ...
    # END OF YOUR CODE

and what lies inside is left out of the exercise; so are cells tagged `solution`, which explain the answer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent
FENCE = re.compile(r"^(?P<open>(?P<indent> *)# YOUR CODE.*\n)(?P<body>(?:.*\n)*?)(?P<close> *# END OF YOUR CODE)$",
                   re.MULTILINE)
ADVICE = """

Work in a copy of this notebook, then a later version of the course does not touch your answers. A check never stops the
notebook: it says what is right, or gives a hint. In JupyterLab, a *Solution* that opens at its top goes to the exercise
when you click the link once more. On Colab such links lead nowhere: open notebook and solutions from the
[course guide](https://github.com/dealkit/dealkit/blob/main/notebooks/README.md)."""
HEADING = re.compile(r"^## Exercise \d\.\d$", re.M)


def fill(source: str, body: str | None = None) -> str:
    """The source of a cell with another body between its fences; None: empty, as the student meets it."""
    def replace(fence: re.Match) -> str:
        inside = fence["indent"] + ("..." if fence["indent"] else "answer = ...") + "\n" if body is None else body
        return fence["open"] + inside + fence["close"]
    return FENCE.sub(replace, source)


def strip(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The exercises of a notebook of solutions, without outputs; every exercise links to its solution in `name`."""
    stripped = nbformat.from_dict(notebook)
    stripped.cells = [cell for cell in stripped.cells if "solution" not in cell.metadata.get("tags", [])]
    stripped.cells[0].source = (stripped.cells[0].source.replace("· Solutions", "· Exercises")
                                .replace(f"notebooks/solutions/{name}", f"notebooks/exercises/{name}") + ADVICE)
    for cell in stripped.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = fill(cell.source) if "exercise" in cell.metadata.get("tags", []) else cell.source
        elif heading := HEADING.search(cell.source):
            anchor = heading.group().removeprefix("## ").replace(" ", "-")
            cell.source += f"\n\n[Solution](../solutions/{name}#{anchor})"
    return stripped


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook as all of this repository are written: one newline at the end, on every system."""
    nbformat.validate(notebook)
    partial = path.with_suffix(".partial")                       # renamed when whole, so that nothing half is left
    partial.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, path)


if __name__ == "__main__":
    for path in sorted((NOTEBOOKS / "solutions").glob("*.ipynb")):
        write(strip(nbformat.read(path, as_version=4), path.name), NOTEBOOKS / "exercises" / path.name)
        print("exercises/" + path.name)
