"""The Hugging Face hub: is there a way to it, and what does open_clip take from it besides weights?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import open_clip
from huggingface_hub import try_to_load_from_cache


def reach_hub(repository: str, *files: str, seconds: float = 15) -> None:
    """Raise OSError at once where there is no way to the hub: its own library tries each file for half a minute.

    It goes by the same address (HF_ENDPOINT), proxies and wish to stay offline (HF_HUB_OFFLINE). If one of the files is
    in the hub's cache already, no way is needed.
    """
    if Path(repository).is_dir():  # a local copy in the place of a name
        return
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in files):
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    with suppress(HTTPError):  # an answer, whatever it says
        urlopen(Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=seconds).close()


def hub_name(name: str, part: str) -> str | None:
    """What a model takes from the Hugging Face hub besides its weights: its "model" (a text tower) or "tokenizer"."""
    return ((open_clip.get_model_config(name) or {}).get("text_cfg") or {}).get(f"hf_{part}_name")


@contextmanager
def from_hub(repository: str, what: str, remedy: str) -> Iterator[None]:
    """Say in a sentence what transformers could not bring; `what` names it, `remedy` is what to do without.

    Args:
        repository: name on the hub.

    Raises:
        ImportError: transformers is not installed.
        ConnectionError: it is not on this computer and cannot be fetched.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{what}, comes through Hugging Face's transformers, which is not installed. Install it with "
                          f"`pip install \"dealkit[hub]\"`, or {remedy}") from error
    try:
        reach_hub(repository, "config.json", "tokenizer_config.json")
        yield
    except OSError as error:  # what transformers raises for no network and for no such name
        raise ConnectionError(f"{what}, is not on this computer and could not be fetched: "
                              f"{str(error).splitlines()[0]} Connect once (it is kept), or {remedy}") from error
