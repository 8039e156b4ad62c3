"""One OpenAI-compatible server: messages in, text of the reply out, every reply kept on disk."""
from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

# An object around the list, because OpenAI's strict mode wants one. No minItems: older servers refuse the keyword, and
# a wrong count is asked again anyway.
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "concepts", "strict": True, "schema": {
    "type": "object", "properties": {"concepts": {"type": "array", "items": {"type": "string"}}},
    "required": ["concepts"], "additionalProperties": False}}}


class CannotKeep(OSError):
    """A reply could not be written into the cache."""


class Server:
    """One server, one model, one cache: messages in, text of the reply out. Used by several threads at once."""

    def __init__(self, client, model: str, cache: str | Path | None, retries: int, timeout: float):
        # A client of another make (a test's, a proxy's) may lack with_options: then its own retries hold.
        configure = getattr(client, "with_options", None)
        self.client = configure(max_retries=retries, timeout=timeout) if configure else client
        self.model, self.cache = model, None if cache is None else Path(cache)
        self.requests = self.from_cache = 0
        self.schema, self._counting = True, threading.Lock()
        self.stopped = False      # set by Ctrl-C: what is under way may end, nothing new is asked
        if self.cache:
            self.cache.mkdir(parents=True, exist_ok=True)

    @property
    def resume_hint(self) -> str:
        return (" Call again with the same cache: what was answered is not asked again." if self.cache else
                " With cache=<a folder> a second call asks only for what is missing.")

    def __call__(self, messages: list[dict]) -> str:
        path = self._path(messages)
        kept = _read_reply(path) if path else None
        if kept is not None:
            with self._counting:
                self.from_cache += 1
            return kept
        if self.stopped:
            raise InterruptedError("stopped before it was asked")
        reply = self.clean(self._request(messages))
        if path:
            temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
            try:
                temporary.write_text(json.dumps({"model": self.model, "messages": messages, "reply": reply},
                                                ensure_ascii=False, indent=1), encoding="utf-8")
                os.replace(temporary, path)
            except OSError as error:
                raise CannotKeep(f"a reply cannot be kept in {self.cache}: {error}. Free some space or choose another "
                                 "cache folder.") from error
            finally:
                temporary.unlink(missing_ok=True)
        return reply

    def forget(self, messages: list[dict]) -> None:
        """Drop a reply that is of no use, so that a later call may ask again."""
        if self.cache:
            self._path(messages).unlink(missing_ok=True)

    def _path(self, messages: list[dict]) -> Path | None:
        # The address belongs to it: many a local server calls whatever it has loaded by the same name.
        key = json.dumps([str(getattr(self.client, "base_url", "")), self.model, messages], sort_keys=True)
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
            raise ConnectionError("the server answered, but with no message in it")
        return completion.choices[0].message.content or ""

    def clean(self, text: str) -> str:
        """The text without the key, which a server may echo, and without half characters, which no file can hold."""
        key = getattr(self.client, "api_key", None)
        text = text.encode("utf-8", "ignore").decode("utf-8")
        return text.replace(key, "[key]") if isinstance(key, str) and len(key) > 7 else text


def _read_reply(path: Path) -> str | None:
    """A cached reply; None where there is none, or where something else than us has spoilt the file."""
    try:
        reply = json.loads(path.read_bytes())["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def client_from_environment():
    try:
        import openai
    except ImportError:
        raise ImportError("asking a language model needs the openai package: pip install 'dealkit[llm]'. The shipped "
                          "banks (dealkit.load_concepts) need nothing.") from None
    key, server = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"))
    if not key and not server:
        raise ValueError("no language model is configured: set OPENAI_API_KEY (for OpenAI) or OPENAI_BASE_URL (for "
                         "another server, e.g. http://localhost:11434/v1 for Ollama) in the environment, or pass "
                         "client=openai.OpenAI(...)")
    # a local server asks for no key, but the client insists on one
    return openai.OpenAI(api_key=key or "unused", base_url=server or None)
