"""Asking a language model over a network that fails, with a cache that forgets nothing, killed and interrupted."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
from llm_server import LLMServer, cut, fails, garbled, good, hangs_up, phrases_of, says, waits

from dealkit import extract_concepts
from dealkit.concepts import ExtractionError

pytestmark = pytest.mark.filterwarnings("error::UserWarning")      # a warning that no test expects fails it
ROOT = Path(__file__).resolve().parents[1]
BIRDS = [f"bird{i}" for i in range(60)]
RIGHT = {bird: phrases_of(bird) for bird in BIRDS}
REFUSAL = "I am sorry, but I cannot help with that."


def extract(server, categories=("bird0", "bird1"), **options):
    client = openai.OpenAI(base_url=server.url, api_key="unused-key")
    return dict(extract_concepts(categories, client, "m", **{"progress": False, **options}))


def two(bank):
    return bank == {"bird0": RIGHT["bird0"], "bird1": RIGHT["bird1"]}


# What passes

def test_after_a_429_the_wait_is_the_one_that_the_server_asked_for():
    with LLMServer({"bird0": [fails(429, Retry_After=1.5), good]}) as server:
        assert two(extract(server))
    (gap,) = server.gaps("bird0")
    assert gap >= 1.5, "the client's own first pause would be half a second"
    assert server.counts["bird1"] == 1


def test_after_a_500_the_pauses_grow():
    with LLMServer({"bird0": [fails(500), fails(503), good]}) as server:
        assert two(extract(server))
    first, second = server.gaps("bird0")
    assert first > 0.3 and second > 0.7


@pytest.mark.parametrize("trouble", [cut, hangs_up])
def test_a_cut_connection_is_tried_again(trouble):
    with LLMServer({"bird0": [trouble, good]}) as server:
        assert two(extract(server))
    assert server.counts == {"bird0": 2, "bird1": 1}


def test_a_slow_answer_is_given_up_and_asked_for_again():
    with LLMServer({"bird0": [waits(120), good]}) as server:
        start = time.monotonic()
        assert two(extract(server, timeout=1.5))
        assert time.monotonic() - start < 60
    assert server.gaps("bird0")[0] >= 1.5


def test_the_number_of_retries_is_kept():
    with LLMServer({"bird0": fails(500)}) as server, pytest.warns(UserWarning, match="1 of 2"):
        extract(server, retries=1)
    assert server.counts == {"bird0": 2, "bird1": 1}


# What does not pass

NO_COMPLETION = [garbled, lambda call: call.send(200, {"choices": []}, {}),
                 lambda call: call.send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})]


@pytest.mark.parametrize("body", NO_COMPLETION)
def test_an_answer_that_is_no_completion_costs_one_category(body):
    with LLMServer({"bird0": body}) as server, pytest.warns(UserWarning, match=r"1 of 2 .*\('bird0'\)"):
        assert extract(server) == {"bird1": RIGHT["bird1"]}





@pytest.mark.parametrize("body", NO_COMPLETION)
def test_a_server_that_gives_only_such_answers_stops_the_run(body):
    with LLMServer(default=body) as server, pytest.raises(ExtractionError, match="in a row got no answer"):
        extract(server, BIRDS, concurrency=1)
    assert len(server.asked) < 20


@pytest.mark.parametrize("code", [401, 402, 403, 404])
def test_what_no_category_can_get_around_stops_at_once(code):
    categories = [f"c{i}" for i in range(400)]
    with LLMServer(default=fails(code, "not for you")) as server:
        with pytest.raises(ExtractionError, match="refuses every request: .*not for you.*key.*model.*'m'.*address"):
            extract(server, categories, concurrency=4)
    assert len(server.asked) < 100      # four would do; more may have slipped out on a busy machine


def test_a_server_that_is_down_is_named():
    with LLMServer() as server:
        pass
    with pytest.raises(ExtractionError, match="nothing could be had; 'bird[01]', for example: Connection error"):
        extract(server, retries=0)
    with pytest.raises(ExtractionError, match="8 categories in a row got no answer.*Connection error.*server up"):
        extract(server, BIRDS, retries=0, concurrency=2)


def test_all_failing_is_an_error():
    with LLMServer(default=says(REFUSAL)) as server:
        with pytest.raises(ExtractionError, match="nothing could be had; 'bird[01]', for example: no list of concepts"):
            extract(server)


def test_failures_here_and_there_do_not_stop_the_run():
    bad = set(BIRDS[::2])
    with LLMServer({bird: fails(500) for bird in bad}) as server, pytest.warns(UserWarning, match="30 of 60"):
        assert extract(server, BIRDS, retries=0, concurrency=1) == {b: RIGHT[b] for b in BIRDS if b not in bad}


# The cache

def test_a_server_that_goes_down_half_way_stops_the_run_and_the_next_goes_on(tmp_path):
    def behave(call):
        (good if server.asked.index(call.asked) < 20 or mended else fails(500))(call)

    mended = []
    with LLMServer(default=behave) as server:
        with pytest.raises(ExtractionError, match="in a row got no answer.*same cache: what was answered is not asked"):
            extract(server, BIRDS, cache=tmp_path, retries=0, concurrency=2)
        assert 28 <= len(server.asked) < 60
        answered = {asked.category for asked in server.asked[:20]}
        mended.append(True)
        assert extract(server, BIRDS, cache=tmp_path) == RIGHT
    assert {server.counts[bird] for bird in answered} == {1}


def test_a_second_run_asks_for_what_is_missing_and_gives_the_same_bank(tmp_path):
    script = {"bird1": [says(REFUSAL), good], "bird2": says(RIGHT["bird2"][:4])}

    def bank(**options):
        client = openai.OpenAI(base_url=server.url, api_key="unused-key")
        with pytest.warns(UserWarning, match="1 have fewer"):
            return extract_concepts(BIRDS[:5], client, "m", tmp_path / "new" / "cache", progress=False, **options)

    with LLMServer(script) as server:
        first = bank()
        assert server.counts == {"bird0": 1, "bird1": 2, "bird2": 2, "bird3": 1, "bird4": 1}
        assert bank() == first and server.counts["bird2"] == 3, "only what was incomplete, and only its second question"
        assert bank(concurrency=1) == first and len(server.asked) == 9
        bank(domain="photographs of birds")
        assert server.counts["bird0"] == 2, "another question has another answer"


def test_a_cache_knows_its_server(tmp_path):
    with LLMServer() as one, LLMServer() as other:
        assert extract(one, cache=tmp_path) == extract(other, cache=tmp_path)
    assert len(one.asked) == len(other.asked) == 2


def test_without_a_cache_all_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with LLMServer() as server:
        assert extract(server) == extract(server) and len(server.asked) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [
    [fails(400), fails(400), good], [fails(500), good], [garbled, good], [says(REFUSAL), says("[]"), good]])
def test_what_failed_is_asked_again_in_the_next_run(tmp_path, script):
    with LLMServer({"bird0": script}) as server:
        with pytest.warns(UserWarning, match="1 of 2 .*Call again with the same cache"):
            extract(server, cache=tmp_path, retries=0)
        assert two(extract(server, cache=tmp_path, retries=0))
    assert server.counts == {"bird0": len(script), "bird1": 1}


@pytest.mark.parametrize("content", [b"", b'{"reply": "[\\"re', b"[]", b'{"reply": 3}', b"\xff\xfe\x00"])
def test_a_broken_cache_file_is_asked_for_again_and_replaced(tmp_path, content):
    with LLMServer() as server:
        assert two(extract(server, cache=tmp_path))
        sorted(tmp_path.iterdir())[0].write_bytes(content)
        assert two(extract(server, cache=tmp_path)) and len(server.asked) == 3
        assert two(extract(server, cache=tmp_path)) and len(server.asked) == 3


def test_a_cache_that_cannot_be_written_stops_the_run_at_once(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with LLMServer() as server, pytest.raises(OSError, match="No space left"):
        extract(server, BIRDS, cache=tmp_path, concurrency=1)
    assert len(server.asked) < 10 and not list(tmp_path.iterdir())


# Killed and interrupted

RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)      # whoever started us may have switched Ctrl-C off
from dealkit import extract_concepts
assert "openai" not in sys.modules, "dealkit imports openai only when it has to ask"
extract_concepts(sys.argv[2:], model="m", cache=sys.argv[1], concurrency=4, progress=False)
"""


@pytest.fixture
def half_way(tmp_path):
    """A server, a process that has 30 of 60 answers in its cache and waits for four more, and the gate they wait at."""
    def behave(call):
        turn = server.asked.index(call.asked)
        if turn >= 30:
            gate.wait(300)
            waits(0.2 if turn < 34 else 2)(call)      # slow enough to be stopped
        else:
            good(call)

    gate = threading.Event()
    with LLMServer(default=behave) as server:
        process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), *BIRDS], cwd=ROOT, text=True,
                                   stderr=subprocess.PIPE, env={**os.environ, "OPENAI_BASE_URL": server.url,
                                                                "OPENAI_API_KEY": "unused-key"})
        try:
            server.wait_for_requests(34)
            yield server, process, gate
        finally:
            gate.set()
            process.kill()
            process.communicate()


def test_killed_half_way_no_category_is_lost_or_paid_for_twice(half_way, tmp_path):
    server, process, _ = half_way
    under_way = {asked.category for asked in server.asked[30:]}
    process.kill()      # SIGKILL: nothing can be tidied up
    assert process.wait(60) != 0 and len(under_way) == 4 and len(server.asked) == 34
    server.default = good
    assert extract(server, BIRDS, cache=tmp_path, concurrency=4) == RIGHT
    assert server.counts == {bird: 2 if bird in under_way else 1 for bird in BIRDS}
    assert extract(server, BIRDS, cache=tmp_path) == RIGHT and len(server.asked) == 64


def test_ctrl_c_waits_for_what_is_under_way_and_nothing_is_asked_twice(half_way, tmp_path):
    server, process, gate = half_way
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)      # the process stops asking; then the four answers come
    gate.set()
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1] and process.returncode != 0
    assert 34 <= len(server.asked) < 60
    server.default = good
    assert extract(server, BIRDS, cache=tmp_path) == RIGHT
    assert server.counts == dict.fromkeys(BIRDS, 1)
