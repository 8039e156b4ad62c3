"""The committed notebooks hide no error and keep the house style. nbval runs them; nothing is run here."""

from __future__ import annotations

import ast
import re
import statistics
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
from colab import notebooks  # noqa: E402  (a script beside the notebooks, not a package)

EVERY = notebooks()
PATHS = [path for path in EVERY if path.parent == ROOT / "notebooks"]
SPINE = ["00_tour", "01_concept_extraction", "02_entanglement_diagnosis", "03_deal_finetuning", "04_ablations",
         "05_spurious_correlations", "06_what_cannot_be_trusted"]

WORDS_PER_LINE = 3  # of prose before a code cell, for each of its lines of code
RUNTIME = re.compile(r"Runtime about \d+ s on \d+ cores?, peak memory \d+ MB, download: \S")
HIDING_TAGS = {"raises-exception", "skip", "skip-execution", "nbval-skip", "nbval-raises-exception",
               "nbval-ignore-output", "injected-parameters", "remove-cell", "remove-output"}
HIDING_WORDS = re.compile(r"NBVAL_(SKIP|RAISES_EXCEPTION|IGNORE_OUTPUT)|PYTEST_VALIDATE_IGNORE_OUTPUT"
                          r"|%%capture|--no-raise-error|%xmode|(filterwarnings|simplefilter)\(.ignore.\)")
# An absolute path, which only one machine has (from "/" or from a drive's letter), or an object's address in memory.
LOCAL = re.compile(r"""(?:^|[\s"'(=`\[])(/[\w.-]+/[\w.-]+)|\b([A-Z]:\\\w)|(\bat 0x[0-9a-f]{6,})""", re.MULTILINE)


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def notebook(path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture(params=EVERY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def any_notebook(request) -> nbformat.NotebookNode:
    """The numbered notebooks, and exercises, solutions and snippets."""
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code_lines(cell) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def words(markdown: str) -> int:
    """Number of words that a reader sees: no code block, no HTML tag, no address of a link or picture."""
    text = re.sub(r"```.*?```", " ", markdown, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[^>]+>|https?://\S+", " ", text)
    return len(re.findall(r"[^\W\d_][\w'-]*", text))


def texts(output) -> list[str]:
    """What an output says in words: printed text and the text forms of displayed objects."""
    if output.output_type == "stream":
        return [output.text]
    return [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]


def syntax(cell) -> ast.Module:
    return ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.MULTILINE))  # without magics


def where(cell) -> str:
    return f"In [{cell.execution_count}]: {cell.source[:80]!r}"


def is_checked(cell) -> bool:
    return "nbval-check-output" in tags(cell) or re.search(r"^\s*# *NBVAL_CHECK_OUTPUT\s*$", cell.source, re.MULTILINE)


# --- the set ----------------------------------------------------------------------------------------------------------

def test_the_notebooks_are_there():
    names = [path.stem for path in PATHS]
    assert set(SPINE) <= set(names), f"missing: {sorted(set(SPINE) - set(names))}"
    assert [name[:2] for name in names] == [f"{number:02d}" for number in range(len(names))], "numbered without a gap"


# --- nothing is hidden ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", EVERY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_cell_ran_in_order(path):
    """Exercises are handed out as nobody has touched them yet."""
    cells = code_cells(nbformat.read(path, as_version=4))
    ran = [None] * len(cells) if path.parent.name == "exercises" else list(range(1, len(cells) + 1))
    assert [cell.execution_count for cell in cells] == ran


def test_no_output_is_an_error(any_notebook):
    for cell in code_cells(any_notebook):
        assert not [output for output in cell.outputs if output.output_type == "error"], where(cell)
        assert "Traceback (most recent call last)" not in "".join(sum(map(texts, cell.outputs), [])), where(cell)


def test_no_cell_is_excused(any_notebook):
    for cell in any_notebook.cells:
        assert not tags(cell) & HIDING_TAGS, f"{tags(cell) & HIDING_TAGS} in {cell.source[:80]!r}"
        assert cell.cell_type != "code" or not HIDING_WORDS.search(cell.source), where(cell)


def test_no_error_is_swallowed(any_notebook):
    """A handler names what it expects and does something; a broad one raises again."""
    broad = {"Exception", "BaseException"}
    for cell in code_cells(any_notebook):
        for node in ast.walk(syntax(cell)):
            if isinstance(node, ast.ExceptHandler):
                caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else broad
                idle = all(isinstance(step, (ast.Pass, ast.Continue, ast.Break))
                           or isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant) for step in node.body)
                raises = any(isinstance(step, ast.Raise) for step in ast.walk(node))
                assert not idle and (raises or not caught & broad), where(cell)
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name not in {"suppress", "ignore_warnings"}, where(cell)


def test_at_least_five_outputs_are_checked(notebook):
    """nbval compares these with a fresh run; a picture alone is not compared, so there must be words or numbers."""
    checked = [cell for cell in code_cells(notebook) if is_checked(cell)]
    assert len(checked) >= 5
    for cell in checked:
        said = "".join(sum(map(texts, cell.outputs), []))
        assert re.sub(r"<Figure size .*? Axes>", "", said).strip(), f"nothing to compare in {where(cell)}"


def test_outputs_are_committed_and_clean(path, notebook):
    assert path.stat().st_size <= 1_000_000
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, "write it with notebooks/run.py --update"
    assert notebook.metadata.kernelspec.name == "python3"
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs, "run it first"
    for output in outputs:
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert output.get("name") != "stderr", f"a warning or a progress bar: {output.text[:200]!r}"


def test_nothing_of_one_machine_is_in_it(any_notebook):
    for cell in any_notebook.cells:
        for text in [cell.source] + sum(map(texts, cell.get("outputs", [])), []):
            assert not LOCAL.search(text), f"{LOCAL.search(text).group()!r} in {cell.source[:80]!r}"


# --- the style --------------------------------------------------------------------------------------------------------

def test_it_opens_as_all_do(path, notebook):
    first = next(index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    opening = "\n".join(cell.source for cell in notebook.cells[:first])
    assert opening.startswith("# ") and "?" in opening, "a title and the question it answers"
    (runtime,) = (cell for cell in notebook.cells if "runtime" in tags(cell))
    assert runtime.cell_type == "markdown" and runtime.source in opening and RUNTIME.search(runtime.source)
    parameters = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert parameters == code_cells(notebook)[1:2] and "PRESET = " in parameters[0].source


def test_code_cells_are_short(notebook):
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_cells(notebook)]
    assert statistics.median(lengths) <= 7 and min(lengths) > 0
    assert max(lengths) <= 30, where(code_cells(notebook)[lengths.index(max(lengths))])


def test_prose_comes_before_code(notebook):
    prose = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose += words(cell.source)
        elif cell.cell_type == "code":
            assert prose, f"no prose before {where(cell)}"
            needed = WORDS_PER_LINE * len(code_lines(cell))
            assert prose >= needed, f"{prose} words, {needed} wanted, before {where(cell)}"
            prose = 0


def test_every_picture_in_the_prose_has_alt_text(any_notebook):
    for cell in any_notebook.cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\s*\]\(", cell.source), cell.source[:80]
            for tag in re.findall(r"<img[^>]*>", cell.source):
                assert re.search(r"""alt=["'][^"']+["']""", tag), tag


def test_it_ends_with_what_was_learned(notebook):
    headings = re.findall(r"^#+ +(.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    for part in ("learned", "limits", "exercises", "references"):
        assert part in " ".join(headings).lower(), f"no heading with {part!r} in {headings}"
