"""The course guide, self-test, glossary and the Chinese README say what the notebooks and the README say."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = [path.name for path in sorted(FOLDER.glob("[0-9]*.ipynb"))]
TEXT = {name: (FOLDER / name).read_text(encoding="utf-8")
        for name in ("README.md", "README.zh-CN.md", "self_test.md", "glossary.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A result with a sign, a decimal point or a percentage: what drifts when a study is run again.
RESULT = re.compile(r"(?<![\w./=-])(?:[+−]\d*\.?\d+|0\.\d+|\d+(?= ?%))(?![\w/]|\.\d)", re.ASCII)


def without_code(text: str) -> str:
    """Without code, formulas and addresses, whose digits are no results."""
    return re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)", " ", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_guide_names_each_notebook_its_exercises_and_its_time(name):
    runtime = next(cell.source for cell in nbformat.read(FOLDER / name, as_version=4).cells
                   if "runtime" in cell.metadata.get("tags", []))
    seconds = re.search(r"Runtime about (\d+) s", runtime).group(1)
    (row,) = (line for line in TEXT["README.md"].splitlines() if line.startswith("|") and f"]({name})" in line
              and "colab-badge" in line)
    assert f"| {seconds} s |" in row, f"the notebook says {seconds} s"
    assert f"(exercises/{name})" in row and f"/notebooks/{name})" in row and len(re.findall(r"\*\*\w+", row)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_chinese_map_has_each_notebook(name):
    (row,) = (line for line in TEXT["README.zh-CN.md"].splitlines() if line.startswith("|") and f"]({name})" in line)
    assert f"(exercises/{name})" in row and f"(solutions/{name})" in row and f"/notebooks/{name})" in row


def test_chinese_setup_has_the_same_commands():
    """Each command of the README's set-up stands there, too; the comments behind them are translated."""
    setup = README[README.index("## Two commands"):README.index("## The notebooks")]
    commands = {line.split("#")[0].strip() for block in re.findall(r"```\w*\n(.*?)```", setup, re.DOTALL)
                for line in block.splitlines()} - {""}
    assert len(commands) >= 8
    missing = {command for command in commands if command not in TEXT["README.zh-CN.md"]}
    assert not missing
    for word in ("DEALKIT_DATA", "conda env create -f environment.yml", "make lab", "Colab", "VS Code"):
        assert word in TEXT["README.zh-CN.md"]


@pytest.mark.parametrize("name", ["README.zh-CN.md", "self_test.md", "glossary.md"])
def test_every_result_is_one_of_the_readme(name):
    """The README's figures are bound to the tables (tests/test_claims.py); these texts may only repeat them."""
    known = set(RESULT.findall(without_code(README)))
    assert known and set(RESULT.findall(without_code(TEXT[name]))) <= known


def claims(text: str) -> list[list[str]]:
    """The figures of each of the three claims, in the order in which they stand."""
    items = [re.search(rf"^{k}\. \*.*?(?=^\d\. \*|^$)", text, re.MULTILINE | re.DOTALL).group() for k in (1, 2, 3)]
    return [RESULT.findall(without_code(item)) for item in items]


def test_the_chinese_claims_have_the_figures_of_the_english_ones():
    english, chinese = (claims(text[text.index(mark):]) for text, mark in (
        (README, "What the paper claims, and what we find"), (TEXT["README.zh-CN.md"], "只做对比微调")))
    assert english == chinese and sum(map(len, english)) >= 8


def test_self_test_has_twelve_questions_with_answers():
    parts = re.split(r"^## ", TEXT["self_test.md"], flags=re.MULTILINE)[1:]
    questions = [part for part in parts if re.match(r"\d+\b", part)]
    assert [int(re.match(r"\d+", part).group()) for part in questions] == list(range(1, 13))
    for part in questions:
        question, answer = part.split("<details>")
        assert len(question.split()) > 20
        assert len(answer.split()) > 25 and "</details>" in answer and re.search(r"\]\(\d\d_\w+\.ipynb", answer), part[:60]
    asked = set(re.findall(r"\]\((\d\d_\w+\.ipynb)", TEXT["self_test.md"]))
    assert asked == set(NAMES), "spread over all notebooks"


def test_glossary_is_in_order_and_complete():
    terms = re.findall(r"^\*\*(.+?)\*\*", TEXT["glossary.md"], re.MULTILINE)
    keys = [re.sub(r"[^a-z0-9 ]", "", term.lower().replace("-", " ")) for term in terms]
    assert keys == sorted(keys) and len(set(keys)) == len(keys) >= 40
    for wanted in ("saliency map", "attention relevance", "entanglement", "pointing game", "spurious correlation",
                   "dead map", "insertion fidelity", "worst group accuracy", "control"):
        assert any(wanted in key for key in keys), wanted


def test_table_of_compatibility_is_dated_and_has_the_pins():
    section = TEXT["README.md"].split("## Where it was run")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d{4}-\d\d-\d\d \|", line)]
    assert len(rows) >= 3 and {re.search(r"\| 3\.(\d+)\.\d+ \|", row).group(1) for row in rows} >= {"11", "12", "13"}
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
                if "==" in line and not line.startswith("#"))
    (first,) = (row for row in rows if "open_clip" in row and "the pins" in row)
    for shown, pin in {"torch": "torch", "torchvision": "torchvision", "open_clip": "open_clip_torch",
                       "captum": "captum", "numpy": "numpy"}.items():
        assert f" {shown} {pins[pin]}" in first, "pins have moved: run everything again and write a new row"
