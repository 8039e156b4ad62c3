"""`extract_concepts`: ask a language model for the concepts of every category, patiently, and never pay twice."""
from __future__ import annotations

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
from dealkit.concepts.server import CannotKeep, Server, client_from_environment


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
    categories = _checked(categories, model, n, concurrency)
    prompts = [concept_prompt(category, n, domain) for category in categories]
    ask = Server(client or client_from_environment(), model, cache, retries, timeout)
    found, asked_again, incomplete, failed, in_a_row, hopeless = {}, [], {}, {}, 0, False
    pool = ThreadPoolExecutor(concurrency)
    bar = tqdm(total=len(categories), desc=f"asking {model}", unit="category", disable=not progress)
    try:
        jobs = {pool.submit(_concepts_of, ask, category, prompt, n): category
                for category, prompt in zip(categories, prompts)}
        for job in as_completed(jobs):
            category = jobs[job]
            try:
                found[category], again, wrong = job.result()
            except CannotKeep:      # each further reply would be paid for and lost
                raise
            except Exception as error:      # whatever a server can do to a client: it costs one category, not the run
                failed[category] = ask.clean(str(error) or type(error).__name__)
                in_a_row = 0 if isinstance(error, _BadReply) else in_a_row + 1
                code = getattr(error, "status_code", None)
                # 403 may also be one category that a moderator refuses, so it takes three before anything was had
                hopeless = code in (401, 402) or (code in (403, 404) and not found and in_a_row >= min(3, len(jobs)))
            else:
                in_a_row = 0
                asked_again += [category] if again else []
                incomplete |= {category: wrong} if wrong else {}
            bar.set_postfix(requests=ask.requests, cached=ask.from_cache, failed=len(failed), refresh=False)
            bar.update()
            # Raised here and not where the error was caught: an error that may quote the key must not come along.
            if hopeless:
                raise ExtractionError(f"the server refuses every request: {failed[category]}. Check the key, the "
                                      f"model's name {model!r} and the address.")
            if in_a_row >= max(2 * concurrency, 8):
                raise ExtractionError(f"{in_a_row} categories in a row got no answer, the last: {failed[category]}. Is "
                                      f"the server up?{ask.resume_hint}")
    finally:      # also on Ctrl-C: no new question, but what is under way, with its retries, is waited for and kept
        ask.stopped = True
        pool.shutdown(cancel_futures=True)
        bar.close()
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
    """The model answered, but not with concepts."""


def _concepts_of(ask: Server, category: str, prompt: str, n: int) -> tuple[list[str], bool, str]:
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
        faults = check_concepts({category: trial}, count=len(trial))
        if len(concepts) < n and not faults["concept"].any():
            concepts = trial
    if len(concepts) < n:
        ask.forget(messages)      # of no use: a later call may ask again
    # Phrases that pass one by one may still be no English together.
    if not concepts or len(check_concepts({category: concepts}, count=len(concepts))):
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


def _checked(categories: Iterable[str], model: str | None, n: int, concurrency: int) -> list[str]:
    if isinstance(categories, str):
        raise ValueError(f"expected a list of categories, got one string; write [{categories!r}]")
    categories = list(categories)
    twice = sorted(category for category, times in Counter(categories).items() if times > 1)
    if not categories or twice:
        raise ValueError(f"expected each category once, got {_some(twice)} twice" if twice else "no categories given")
    if not isinstance(n, int):
        raise ValueError(f"n is the number of concepts of a category, a whole number; got {n!r}")
    if not model or concurrency < 1:
        raise ValueError("say which model to ask, e.g. model='gpt-4o-mini' or the name that the server lists, and a "
                         f"concurrency of at least 1; got {model!r} and {concurrency}")
    return categories


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
