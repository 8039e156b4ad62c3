"""What asking costs beside the language model: 1,000 categories at 8 at a time against a server with 50 ms latency.

Floor: CATEGORIES * LATENCY / CONCURRENCY seconds, where nothing but the server's latency is waited for. The server is
a process of its own (tests/llm_server.py) on loopback, the client the real `openai` one, every reply goes through a
cache in a folder that is thrown away afterwards. Beside the clock stands the CPU time of this process, which a busy
machine disturbs less.

    python tests/bench/bench_extract.py            # a sentence
    python tests/bench/bench_extract.py --json     # one line of JSON
"""
from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

from dealkit import extract_concepts

TESTS = Path(__file__).resolve().parents[1]
CATEGORIES, CONCURRENCY, LATENCY = 1000, 8, 0.05
FLOOR = CATEGORIES * LATENCY / CONCURRENCY


def extract(url: str, categories: list[str], cache: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="unused")
    bank = extract_concepts(categories, client, "m", cache, concurrency=CONCURRENCY, progress=False)
    assert bank.categories == categories and not any(bank.provenance["report"].values())


def measure() -> dict:
    command = [sys.executable, str(TESTS / "llm_server.py"), "--port", "0", "--latency", str(LATENCY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, tempfile.TemporaryDirectory() as cache:
        try:
            url = server.stdout.readline().strip()
            extract(url, [f"warm{i}" for i in range(CONCURRENCY)], cache)
            clock, cpu = time.perf_counter(), time.process_time()
            extract(url, [f"category{i}" for i in range(CATEGORIES)], cache)
            seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        finally:
            server.terminate()
    return {"categories": CATEGORIES, "concurrency": CONCURRENCY, "latency": LATENCY, "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2), "floor": FLOOR, "ratio": round(seconds / FLOOR, 2),
            "python": platform.python_version(), "openai": openai.__version__, "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a sentence")
    options = parser.parse_args()
    result = measure()
    print(json.dumps(result) if options.json else
          "{categories} categories, {concurrency} at a time, {latency} s each: {seconds} s ({cpu_seconds} s of CPU), "
          "the floor is {floor} s, ratio {ratio}".format(**result))


if __name__ == "__main__":
    main()
