"""`extract_concepts`: ask a language model for the concepts of every category, patiently, and never pay twice."""
from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from tqdm.auto import tqdm

from dealkit.concepts.bank import ConceptBank
from dealkit.concepts.checks import check_concepts
from dealkit.concepts.language import concept_prompt, parse_concepts

# An object around the list, because OpenAI's strict mode wants one. No minItems: older servers refuse the keyword, and
# a wrong count is asked again anyway.
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "concepts", "strict": True, "schema": {
    "type": "object", "properties": {"concepts": {"type": "array", "items": {"type": "string"}}},
    "required": ["concepts"], "additionalProperties": False}}}
_HOPELESS = (401, 402, 403, 404)      # wrong key, no credit, no such model: every other category would end the same way


class ExtractionError(RuntimeError):
    """The server cannot be used, or gave nothing. What it had answered before is in the cache."""


def extract_concepts(categories: Iterable[str], client=None, model: str | None = None, cache: str | Path | None = None,
                     *, n: int = 6, domain: str = "photographs", name: str = "my categories", concurrency: int = 8,
                     retries: int = 6, timeout: float = 120.0, progress: bool = True) -> ConceptBank:
    """Ask a language model for the concepts of every category and return them as a checked bank.

    Each category is one request with `concept_prompt`. The reply is asked for as JSON by a schema; a server that
    refuses schemas is asked for a plain list. A reply that breaks a rule of `check_concepts` is sent back once with the
    violations named; then the phrases of both replies that break no rule are taken, the second reply's first, at most
    `n`. Rate limits (429, with its Retry-After), server errors, cut connections and time-outs are tried again with a
    growing pause by the `openai` client.

    Args:
        categories: their names, in the order of the data set's labels.
        client: an `openai.OpenAI` for any compatible server, e.g. `OpenAI(base_url="http://localhost:11434/v1",
            api_key="unused")` for Ollama; vLLM, llama.cpp and LM Studio likewise. None makes one from the environment
            variables OPENAI_API_KEY and OPENAI_BASE_URL; the key stands nowhere else.
        model: the server's name of the model.
        cache: a folder that keeps every reply as soon as it is there, so that a run that was stopped goes on where it
            was and a second run costs nothing. None keeps nothing.
        n: concepts of a category.
        domain: what the pictures are, see `concept_prompt`.
        name: name of the data set, for the bank.
        concurrency: requests under way at a time.
        retries: further attempts for a request.
        timeout: seconds that one attempt may take.
        progress: show a progress bar.

    Returns:
        `ConceptBank` in the order of `categories`. `bank.provenance["report"]` says what could not be had:
        `asked_again` (categories whose first reply broke a rule), `incomplete` (category -> what is wrong with the last
        reply; fewer than n concepts are left) and `failed` (category -> why; not in the bank). A warning names both.
        The number of requests stands at the end of the progress bar.

    Raises:
        ImportError: no client was given and the package `openai` is missing.
        ValueError: no categories, one twice, no model, or no key and no server in the environment.
        ExtractionError: the server refuses the key or the model, cannot be reached, or gave nothing at all.
    """
    categories = _checked(categories, model, concurrency)
    ask = _Asker(client or _client_from_environment(), model, cache, retries, timeout)
    prompts = [concept_prompt(category, n, domain) for category in categories]
    found, asked_again, incomplete, failed, in_a_row = {}, [], {}, {}, 0
    pool = ThreadPoolExecutor(concurrency)
    try:
        jobs = {pool.submit(_concepts_of, ask, category, prompt, n): category
                for category, prompt in zip(categories, prompts)}
        bar = tqdm(as_completed(jobs), total=len(jobs), desc=f"asking {model}", unit="category", disable=not progress)
        for job in bar:
            bar.set_postfix(requests=ask.requests, cached=ask.from_cache, failed=len(failed), refresh=False)
            category = jobs[job]
            try:
                found[category], again, wrong = job.result()
            except Exception as error:      # whatever a server can do to a client: it costs one category, not the run
                if getattr(error, "status_code", None) in _HOPELESS:
                    raise ExtractionError(f"the server refuses every request: {ask.clean(error)}. Check the key, the "
                                          f"model's name {model!r} and the address.") from None
                failed[category] = ask.clean(error)
                in_a_row = 0 if isinstance(error, _BadReply) else in_a_row + 1
                if in_a_row >= max(2 * concurrency, 8):
                    raise ExtractionError(f"{in_a_row} categories in a row got no answer, the last: "
                                          f"{failed[category]}. Is the server up?{ask.resume_hint}") from None
                continue
            in_a_row = 0
            asked_again += [category] if again else []
            if wrong:
                incomplete[category] = wrong
    finally:      # also on Ctrl-C: nothing new is asked, what is under way is waited for and cached
        pool.shutdown(cancel_futures=True)
    if not found:
        category, reason = next(iter(failed.items()))
        raise ExtractionError(f"nothing could be had; {category!r}, for example: {reason}")
    in_order = [category for category in categories if category in found]
    report = {"asked_again": sorted(asked_again), "incomplete": incomplete, "failed": failed}
    if incomplete or failed:
        warnings.warn(f"{len(failed)} of {len(categories)} categories could not be had and are not in the bank "
                      f"({_some(failed)}); {len(incomplete)} have fewer than {n} concepts ({_some(incomplete)}). "
                      f"Reasons: bank.provenance['report'].{ask.resume_hint}", stacklevel=2)
    return ConceptBank(name, {category: found[category] for category in in_order}, {
        "model": model, "prompt": concept_prompt("CATEGORY", n, domain), "count": n, "date": date.today().isoformat(),
        "hand_edits": [], "report": report})


class _BadReply(ValueError):
    """The server answered, but not with concepts."""


class _Asker:
    """One server, one model, one cache: messages in, text of the reply out. Used by several threads at once."""

    def __init__(self, client, model: str, cache: str | Path | None, retries: int, timeout: float):
        # A client of another make (a test's, a proxy's) may lack with_options: then its own retries hold.
        configure = getattr(client, "with_options", None)
        self.client = configure(max_retries=retries, timeout=timeout) if configure else client
        self.model, self.cache = model, None if cache is None else Path(cache)
        self.requests = self.from_cache = 0
        self.schema, self._counting = True, threading.Lock()
        if self.cache:
            self.cache.mkdir(parents=True, exist_ok=True)

    @property
    def resume_hint(self) -> str:
        return (" Call again with the same cache: what was answered is not asked again." if self.cache else
                " With cache=<a folder> a second call asks only for what is missing.")

    def __call__(self, messages: list[dict]) -> str:
        path = self._path(messages)
        if path and path.exists():
            with self._counting:
                self.from_cache += 1
            try:
                return json.loads(path.read_bytes())["reply"]
            except (ValueError, KeyError, TypeError) as error:      # not ours: we rename whole files into place
                raise ValueError(f"{path} is no cached reply ({error}); delete it, and it is asked again") from error
        reply = self.clean(self._request(messages))
        if path:
            temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
            temporary.write_text(json.dumps({"model": self.model, "messages": messages, "reply": reply},
                                            ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(temporary, path)
        return reply

    def forget(self, messages: list[dict]) -> None:
        """Drop a reply that is of no use, so that a later call may ask again."""
        if self.cache:
            self._path(messages).unlink(missing_ok=True)

    def _path(self, messages: list[dict]) -> Path | None:
        key = json.dumps([self.model, messages], sort_keys=True)
        return self.cache and self.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _request(self, messages: list[dict]) -> str:
        if self.schema:
            try:
                return self._text(messages, response_format=_SCHEMA)
            except Exception as error:
                if getattr(error, "status_code", None) not in (400, 422, 501):
                    raise
            reply = self._text(messages)
            self.schema = False      # only now: had the plain request failed too, the schema was not to blame
            return reply
        return self._text(messages)

    def _text(self, messages: list[dict], **options) -> str:
        with self._counting:
            self.requests += 1
        completion = self.client.chat.completions.create(model=self.model, messages=messages, **options)
        if not getattr(completion, "choices", None):      # also a body that is text and not a completion at all
            raise _BadReply("the server answered with no message")
        return completion.choices[0].message.content or ""

    def clean(self, text: object) -> str:
        """The text without the key, which a server may echo into a reply or into the message of an error."""
        key = getattr(self.client, "api_key", None)
        text = str(text) or type(text).__name__
        return text.replace(key, "[key]") if isinstance(key, str) and len(key) > 7 else text


def _concepts_of(ask: _Asker, category: str, prompt: str, n: int) -> tuple[list[str], bool, str]:
    """Concepts of one category -> (concepts, was it asked again, what is wrong with it or "")."""
    messages = [{"role": "user", "content": prompt}]
    reply = ask(messages)
    first, wrong = _read(category, reply, n)
    if not wrong:
        return first, False, ""
    messages += [{"role": "assistant", "content": reply},
                 {"role": "user", "content": f"This breaks the rules: {wrong}. Answer again, with all {n} features."}]
    reply = ask(messages)
    second, wrong = _read(category, reply, n)
    if not wrong:
        return second, True, ""
    concepts = []
    for phrase in second + first:
        trial = concepts + [phrase]
        if len(concepts) < n and not len(check_concepts({category: trial}, count=len(trial))):
            concepts = trial
    if not concepts:
        ask.forget(messages)
        raise _BadReply(wrong)
    return concepts, True, "" if len(concepts) == n else wrong


def _read(category: str, reply: str, n: int) -> tuple[list[str], str]:
    """The concepts in a reply and, in words that a model understands, what is wrong with them."""
    try:
        concepts = parse_concepts(reply)
    except ValueError as error:
        return [], str(error)
    faults = check_concepts({category: concepts}, count=n)
    return concepts, "; ".join(f"{row.concept!r} ({row.rule}: {row.detail})" if row.concept else row.detail
                               for row in faults.itertuples())


def _checked(categories: Iterable[str], model: str | None, concurrency: int) -> list[str]:
    if isinstance(categories, str):
        raise ValueError(f"expected a list of categories, got one string; write [{categories!r}]")
    categories = list(categories)
    twice = sorted(category for category, times in Counter(categories).items() if times > 1)
    if not categories or twice:
        raise ValueError(f"expected each category once, got {_some(twice)} twice" if twice else "no categories given")
    if not model or concurrency < 1:
        raise ValueError("say which model to ask, e.g. model='gpt-4o-mini' or the name that the server lists, and a "
                         f"concurrency of at least 1; got {model!r} and {concurrency}")
    return categories


def _client_from_environment():
    try:
        import openai
    except ImportError:
        raise ImportError("asking a language model needs the openai package: pip install 'dealkit[llm]'. The shipped "
                          "banks (dealkit.load_concepts) need nothing.") from None
    key, server = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not key and not server:
        raise ValueError("no language model is configured: set OPENAI_API_KEY (for OpenAI) or OPENAI_BASE_URL (for "
                         "another server, e.g. http://localhost:11434/v1 for Ollama) in the environment, or pass "
                         "client=openai.OpenAI(...)")
    return openai.OpenAI(api_key=key or "unused")      # a local server asks for no key, the client insists on one


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
