"""What GitHub, Codespaces and Binder read of this repository fits what is in it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|txt|toml|ya?ml|json|ipynb)")


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def runs(*jobs: dict) -> list[str]:
    """What the steps of jobs run, in order."""
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def words(commands: str) -> list[str]:
    """The words of shell commands, without comments; a line may go on after a backslash."""
    return [word for line in commands.replace("\\\n", " ").splitlines() for word in shlex.split(line, comments=True)]


def variable(name: str) -> str:
    return re.search(rf"^{name} :?= (.+)$", MAKEFILE, re.MULTILINE).group(1)


# --- workflows --------------------------------------------------------------------------------------------------------

@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return read(request.param)


@pytest.fixture
def newest() -> dict:
    return read(ROOT / ".github" / "workflows" / "newest.yml")


def test_workflows_are_bounded_and_ask_for_little(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 120, name
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/any@v1")), step["uses"]


def test_actions_are_those_of_the_tests(newest):
    used = [{step["uses"] for job in read(path)["jobs"].values() for step in job["steps"] if "uses" in step}
            for path in (WORKFLOWS[0].with_name("test.yml"), WORKFLOWS[0].with_name("newest.yml"))]
    assert used[1] <= used[0]


def test_what_workflows_run_is_there(workflow):
    targets = re.findall(r"^([\w.-]+):", MAKEFILE, re.MULTILINE)
    for commands in runs(*workflow["jobs"].values()):
        said = words(commands)
        # not what a variable leads to, nor a page of the web
        missing = [word for word in said if FILE.fullmatch(word) and not (ROOT / word).is_file()]
        assert not missing, commands
        asked = [after for word, after in zip(said, said[1:]) if word == "make"]
        assert set(asked) <= set(targets), commands


def test_once_a_week(newest):
    triggers = newest.get("on", newest.get(True))  # for YAML 1.1 the word "on" means true
    (schedule,) = triggers["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    assert "workflow_dispatch" in triggers and newest["concurrency"]["group"]


def test_newest_upgrades_all_that_the_ranges_allow(newest):
    said = words(next(commands for commands in runs(newest["jobs"]["newest"]) if "pip install" in commands))
    assert "--upgrade" in said and said[said.index("--upgrade-strategy") + 1] == "eager"
    (extras,) = (set(Requirement(f"dealkit{word.removeprefix('.')}").extras) for word in said if word.startswith(".["))
    assert extras == set(PROJECT["optional-dependencies"])
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for name in ("torch", "open_clip_torch", "captum"):
        assert not any(part.operator in ("==", "===", "~=") for part in ranges[name]), f"{name} cannot become newer"


def test_newest_uses_the_commands_of_every_reader(newest):
    """make takes an environment as it is when .venv/ready names the folder: no pin replaces what is new."""
    commands = runs(newest["jobs"]["newest"])
    assert f"pwd -P > {variable('READY')}" in commands[0] and f"{variable('PY')} -m pip install" in commands[0]
    assert commands[-2:] == ["make tutorial", "make test"]


def test_every_failure_is_reported_and_only_the_report_may_write(newest):
    jobs = dict(newest["jobs"])
    report = jobs.pop("report")
    assert report["needs"] == report["strategy"]["matrix"]["job"] == list(jobs)
    assert report["permissions"] == {"contents": "read", "issues": "write"}
    assert not any("permissions" in job for job in jobs.values())
    assert all(step["with"]["persist-credentials"] is False for job in jobs.values() for step in job["steps"]
               if step.get("uses", "").startswith("actions/checkout"))
    (step,) = report["steps"]
    assert "gh issue comment" in step["run"] and "gh issue create" in step["run"] and step["env"]["GH_TOKEN"]


# --- forms ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_what_github_accepts(path):
    form = read(path)
    assert form["name"] and form["description"] and len(form["description"]) <= 200
    identifiers = [element["id"] for element in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for element in form["body"]:
        assert element["type"] in ("dropdown", "input", "textarea", "checkboxes")
        assert element["attributes"]["label"]
        if element["type"] == "dropdown":
            options = element["attributes"]["options"]
            assert len(set(options)) == len(options) and all(isinstance(option, str) for option in options)
            assert "none" not in [option.lower() for option in options], "GitHub keeps this word for itself"


def test_bug_form_lists_the_notebooks():
    (options,) = (element["attributes"]["options"] for element in read(FORMS[0])["body"] if element["id"] == "notebook")
    assert FORMS[0].name == "bug.yml"
    main = [option for option in options if re.match(r"\d\d_", option)]
    assert main == sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    groups = {re.fullmatch(r"one in (\w+)/", option).group(1) for option in options if option.startswith("one in")}
    with_notebooks = {path.parent.name for path in (ROOT / "notebooks").glob("[a-z]*/*.ipynb")}
    assert with_notebooks <= groups and all((ROOT / "notebooks" / group).is_dir() for group in groups)
    assert options[-1].startswith("none of them") and len(options) == len(main) + len(groups) + 1


def test_bug_form_asks_for_what_is_needed():
    required = {element["id"] for element in read(FORMS[0])["body"] if element.get("validations", {}).get("required")}
    assert required == {"notebook", "cell", "place", "happened", "expected", "versions"}
    (box,) = (element for element in read(FORMS[0])["body"] if element["type"] == "checkboxes")
    assert all(option["required"] for option in box["attributes"]["options"])


def test_the_choice_of_forms():
    config = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")
    assert isinstance(config["blank_issues_enabled"], bool)
    assert all(set(link) == {"name", "url", "about"} for link in config["contact_links"])


# --- Codespaces, VS Code, Binder, citation ----------------------------------------------------------------------------

def test_container_has_what_make_makes():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert container["postCreateCommand"] == f"make {variable('READY')}" and "$(READY): requirements.txt" in MAKEFILE
    settings = container["customizations"]["vscode"]["settings"]
    assert settings["python.defaultInterpreterPath"] == "${containerWorkspaceFolder}/" + variable("PY")
    assert {"ms-python.python", "ms-toolsai.jupyter"} <= set(container["customizations"]["vscode"]["extensions"])
    assert all((ROOT / name).is_file() for name in container["customizations"]["codespaces"]["openFiles"])
    version = container["image"].rpartition(":")[2]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert container["hostRequirements"] == {"cpus": 2, "memory": "8gb", "storage": "32gb"}


def test_binder_finds_its_environment():
    """repo2docker reads environment.yml at the top, unless a folder binder/ or .binder/ stands before it."""
    assert not (ROOT / "binder").exists() and not (ROOT / ".binder").exists()
    environment = read(ROOT / "environment.yml")
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[-1] == "-e ."


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    named = set(re.findall(r"(?<![\w/.])(?:\.?[\w-]+/)+[\w.-]*", re.sub(r"https?://\S+", "", text)))
    named -= {"owner/name", ".venv/bin/python", ".venv/ready"}           # a placeholder, and what make makes
    # NN is the number of a notebook
    assert len(named) > 15 and [name for name in named if not [*ROOT.glob(name.replace("NN", "[0-9][0-9]"))]] == []
    assert set(re.findall(r"\bmake ([a-z]+)\b(?= REPO|`|  )", text)) <= set(re.findall(r"^([\w.-]+):", MAKEFILE, re.M))


def test_citation_agrees_with_the_rest():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert [citation[key] for key in ("title", "version", "license", "repository-code")] == [
        PROJECT["name"], PROJECT["version"], PROJECT["license"], PROJECT["urls"]["Homepage"]]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    paper = citation["preferred-citation"]
    bibtex = re.search(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    field = {key: re.sub(r"[{}]", "", value) for key, value in re.findall(r"(\w+) += \{(.*)\}", bibtex)}
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert (paper["title"], paper["conference"]["name"], str(paper["year"])) == (
        field["title"], field["booktitle"], field["year"])
    assert names == field["author"] and paper["url"] == PROJECT["urls"]["Paper"]
    assert [identifier["value"] for identifier in paper["identifiers"]] == [field["note"]]
