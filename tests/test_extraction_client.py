"""Asking a language model: whose client, which key, which arguments; and where the key must never turn up."""
from __future__ import annotations

import asyncio
import json
import logging
import sys
import traceback
import warnings
from collections import Counter
from types import SimpleNamespace

import openai
import pytest
from llm_server import LLMServer, echoes_key, fails, good, phrases_of, says, waits

from dealkit import extract_concepts
from dealkit.concepts import ExtractionError

BIRDS = [f"bird{i}" for i in range(12)]
RIGHT = phrases_of("wren")
KEY = "sk-test-0123456789abcdef"


def extract(server, categories=("wren",), **options):
    client = openai.OpenAI(base_url=server.url, api_key=KEY)
    return extract_concepts(categories, client, "m", **{"progress": False, **options})


# Clients, surroundings, arguments

def completion(text):
    return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])


def test_any_object_with_that_method_is_a_client():
    def create(model, messages, **options):
        seen[model, len(messages), "response_format" in options] += 1
        return completion(json.dumps(RIGHT))

    seen = Counter()
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    assert extract_concepts(["wren"], client, "mine", progress=False)["wren"] == RIGHT
    assert seen == {("mine", 1, True): 1}


def test_it_works_inside_a_running_event_loop_as_in_jupyter():
    async def cell():
        return extract(server, BIRDS)

    with LLMServer() as server:
        assert asyncio.run(cell()).categories == BIRDS


def test_the_progress_bar_counts_requests_and_can_be_switched_off(capfd):
    with LLMServer({"bird1": [says("No."), good]}) as server:
        extract(server, BIRDS[:3], progress=False)
        assert capfd.readouterr() == ("", "")
        extract(server, BIRDS[:3], progress=True)
    last = capfd.readouterr().err.split("\r")[-1]
    assert "asking m: 100%" in last and "3/3" in last and "requests=3" in last


def test_the_progress_bar_counts_the_last_failure(capfd):
    with LLMServer({"bird1": waits(0.5, fails(400))}) as server, pytest.warns(UserWarning):
        extract(server, BIRDS[:2], progress=True)
    assert "failed=1" in capfd.readouterr().err.split("\r")[-1]


@pytest.mark.parametrize("categories, options, message", [
    ("wren", {}, "expected a list of categories.*write \\['wren'\\]"),
    ([], {}, "no categories given"),
    (["wren", "crow", "wren"], {}, "each category once, got 'wren' twice"),
    (["wren", " "], {}, "expected a category"),
    (["wren"], {"n": 0}, "n >= 1"),
    (["wren"], {"n": 2.5}, "n is the number"),
    (["wren"], {"concurrency": 0}, "concurrency of at least 1"),
    (["wren"], {"model": None}, "which model"),
    (["wren"], {"model": ""}, "which model"),
])
def test_bad_arguments_are_refused_before_anything_is_asked(categories, options, message):
    def create(**options):
        raise AssertionError("a request went out")

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    with pytest.raises(ValueError, match=message):
        extract_concepts(categories, client, **{"model": "m", **options})


def set_environment(monkeypatch, **values):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("key", [{}, {"OPENAI_API_KEY": "from-the-environment"}])
def test_server_and_key_come_from_the_environment(monkeypatch, key):
    with LLMServer() as server:
        set_environment(monkeypatch, OPENAI_BASE_URL=server.url, **key)
        assert extract_concepts(["wren"], model="m", progress=False)["wren"] == RIGHT
    assert server.asked[0].headers["authorization"] == f"Bearer {key.get('OPENAI_API_KEY', 'unused')}"


def test_nothing_in_the_environment(monkeypatch):
    set_environment(monkeypatch)
    with pytest.raises(ValueError, match="OPENAI_API_KEY.*OPENAI_BASE_URL.*pass client="):
        extract_concepts(["wren"], model="m")


def test_without_the_openai_package(monkeypatch):
    set_environment(monkeypatch, OPENAI_API_KEY="any-key")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'dealkit\[llm\]'"):
        extract_concepts(["wren"], model="m")


# The key

def texts_of(error):
    """All that a traceback or a logger could print of an error and of those it came from, local variables included."""
    while error is not None:
        frames = traceback.TracebackException.from_exception(error, capture_locals=True).format(chain=False)
        yield f"{error!s} {error!r} {vars(error)} {''.join(frames)}"
        error = error.__cause__ or error.__context__


ECHOES = {
    "in a good reply": echoes_key(before=json.dumps(RIGHT)),
    "as a concept": lambda call: call.say(json.dumps(RIGHT[:5] + [call.asked.headers["authorization"]])),
    "in a refusal": echoes_key(before="I cannot answer that as long as you send me"),
    "in a 400": echoes_key(400),
    "in a 500": echoes_key(500),
    "in a 429": echoes_key(429),
    "in a 401": echoes_key(401),
}


@pytest.mark.parametrize("where", ECHOES)
def test_the_key_reaches_no_file_log_warning_error_or_output(where, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    said = []
    with LLMServer({"wren": ECHOES[where]}) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            bank = extract(server, ["wren", "crow"], cache=tmp_path / "cache", retries=0, progress=True)
            bank.save(tmp_path / "bank.json")
            said.append(repr(dict(bank)) + json.dumps(bank.provenance))
        except ExtractionError as error:
            said += ["".join(traceback.format_exception(error)), *list(texts_of(error))[:1]]
    said += [str(warning.message) for warning in caught] + list(capfd.readouterr()) + [caplog.text]
    said += [path.read_text(encoding="utf-8") + path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY in server.asked[0].headers["authorization"], "else this test shows nothing"
    assert "DEBUG" in caplog.text and "[key]" in "".join(said)
    assert not [text for text in said if KEY in text]


def test_the_key_is_in_no_error_that_an_extraction_error_came_from():
    with LLMServer(default=echoes_key(401)) as server, pytest.raises(ExtractionError, match=r"\[key\]") as caught:
        extract(server)
    assert not [text for text in texts_of(caught.value) if KEY in text]


def test_a_line_break_behind_the_key_does_no_harm(monkeypatch):
    with LLMServer() as server:
        set_environment(monkeypatch, OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY + "\n")
        assert extract_concepts(["wren"], model="m", progress=False, retries=0)["wren"] == RIGHT
