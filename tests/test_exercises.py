"""Every exercise, both ways: empty it gets its first hint, solved it passes, and three wrong answers each their own hint."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

import dealkit.check

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = [path.name for path in sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))]
LEVELS = ["reading", "implementing", "research"]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


strip = load(FOLDER / "strip.py")


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def wrong_answers(name: str) -> dict[str, list[tuple[str, str]]]:
    """Of each exercise of a notebook: (the short name of the mistake, the code between the fences)."""
    return load(Path(__file__).with_name(f"wrong_answers_{name[:2]}.py")).WRONG


@pytest.fixture(scope="module", params=NAMES, ids=lambda name: name[:2])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def solutions(name):
    return nbformat.read(FOLDER / "solutions" / name, as_version=4)


@pytest.fixture(scope="module")
def results(name, solutions) -> dict[str, dict[str, dealkit.check.Result]]:
    """Walk through the solutions once; at each exercise, give the check the empty, the wrong and the right answer."""
    space, found, pending = {"__name__": "exercise"}, {}, None
    for cell in solutions.cells:
        tags = cell.metadata.get("tags", [])
        if "check" in tags:
            check = re.search(r"ex_\d\d_\d", cell.source).group()
            answers = {"start": None} | dict(wrong_answers(name)[check])
            found[check] = {}
            for mistake, body in answers.items():
                exec(compile(strip.fill(pending, body), f"{check}: {mistake}", "exec"), space)
                found[check][mistake] = eval(cell.source, space)
            exec(compile(pending, check, "exec"), space)
            found[check][""] = eval(cell.source, space)
        elif "exercise" in tags:
            pending = cell.source
        elif cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), space)
    return found


def test_the_set(name, solutions):
    number = name[:2]
    checks = [re.search(r"dealkit\.check\.(ex_\d\d_\d)\(", cell.source).group(1) for cell in tagged(solutions, "check")]
    assert len(checks) >= 4
    assert checks == [f"ex_{number}_{k}" for k in range(1, len(checks) + 1)], "numbered without a gap"
    assert set(checks) == {check for check in dealkit.check.__all__ if check.startswith(f"ex_{number}_")}
    assert len(tagged(solutions, "exercise")) == len(checks)


def test_they_are_graded(solutions):
    """From reading to implementing to research, each exercise with its level, a fence and an explained solution."""
    statements = [cell.source for cell in solutions.cells if cell.source.startswith("## Exercise ")]
    levels = [re.search(r"\*\((\w+)\)\*", statement).group(1) for statement in statements]
    assert set(levels) == set(LEVELS) and levels == sorted(levels, key=LEVELS.index)
    assert all(strip.FENCE.search(cell.source) for cell in tagged(solutions, "exercise"))
    assert len(tagged(solutions, "solution")) >= len(statements)


def test_the_exercises_are_the_solutions_without_the_answers(name, solutions):
    exercises = nbformat.read(FOLDER / "exercises" / name, as_version=4)
    assert exercises == strip.strip(solutions, name), "run: python notebooks/strip.py"
    text = "\n".join(cell.source for cell in exercises.cells)
    assert text.count(f"../solutions/{name}#Exercise-") == len(tagged(exercises, "check"))


def test_an_empty_answer_gets_its_first_hint(results):
    for check, given in results.items():
        assert not given["start"] and given["start"].mistake == "start", given["start"]
    assert len({given["start"].text for given in results.values()}) == len(results), "each has a first step of its own"


def test_every_solution_passes(results):
    for given in results.values():
        assert given[""], given[""]


def test_three_wrong_answers_get_their_own_hint(name, results):
    for check, answers in wrong_answers(name).items():
        assert len(answers) >= 3, check
        for mistake, _ in answers:
            result = results[check][mistake]
            assert not result and result.mistake == mistake and mistake not in ("start", "error", "other"), result
        texts = {results[check][mistake].text for mistake, _ in answers}
        assert len(texts) == len(answers) and all(len(text.split()) >= 8 for text in texts), check


def test_committed_solutions_have_passed(solutions):
    for cell in tagged(solutions, "check"):
        said = "".join(output.get("data", {}).get("text/plain", "") for output in cell.outputs)
        assert ": right." in said, cell.source


def test_main_notebook_leads_to_its_exercises(name):
    text = "\n".join(cell.source for cell in nbformat.read(FOLDER / name, as_version=4).cells)
    assert f"(exercises/{name})" in text and f"(solutions/{name})" in text
