"""From words to text embeddings: checks, tokens, and the text tower without its padding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


# Texts of up to 20 tokens (concepts, prompts), of up to 40, and longer ones (captions with many concepts).
GROUPS = (20, 40)


class WordTokenizer:
    """One token a word: the tokenizer of a model whose whole language fits on a page.

    Token 0 is padding, 1 the start, then come the words; the end has the highest number, because CLIP finds the end of
    a text with an argmax. Case, commas and full stops do not count.

    Args:
        vocab: the words it knows.
        context_length: tokens in a text, start and end included.

    Example:
        >>> WordTokenizer(["red", "head"], context_length=6)(["Red head."])
        tensor([[1, 2, 3, 4, 0, 0]])
    """

    def __init__(self, vocab: Sequence[str], context_length: int) -> None:
        self.vocab, self.context_length = list(vocab), context_length
        self.ids = {word: number for number, word in enumerate(self.vocab, start=2)}
        self.end = len(self.vocab) + 2

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts -> `[K, context_length]` long; what does not fit is cut off and the end kept, as in CLIP's tokenizer.

        Raises:
            ValueError: a word it does not know; the message lists those it does.
        """
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            words = re.sub(r"[.,]", " ", text).casefold().split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(f"the model has no word for {', '.join(map(repr, unknown))} (in {text!r}). "
                                 f"The words it knows: {', '.join(self.vocab)}.")
            ids = [1, *(self.ids[word] for word in words)][:length - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts as a list, or say what is wrong with them.

    Raises:
        TypeError: not a list, or an entry that is not a str.
        ValueError: no texts, or an empty one.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts are a single str, {texts!r}; put it in a list: [{texts!r}].")
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"texts are a {type(texts).__name__}; expected a list of str.")
    if len(texts) == 0:
        raise ValueError("texts are empty (K = 0); expected at least one str.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}] is a {type(text).__name__}; expected a str.")
        if not text.strip():
            raise ValueError(f"texts[{number}] is empty; expected words. Remove it from the list.")
    return list(texts)


def tokenize(tokenizer: Callable[..., Tensor], texts: Sequence[str], context_length: int) -> Tensor:
    """Texts -> tokens `[K, context_length]`, refusing what open_clip would cut off without a word.

    Raises:
        ValueError: a text longer than the context.
    """
    tokens = tokenizer(texts, context_length=context_length)
    longer = tokenizer(texts, context_length=context_length + 1)  # is there anything to put in one more place?
    pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", None)
    if pad is None:  # CLIP's tokenizer and ours pad with 0 and keep the end token in the last place
        too_long = longer[:, context_length] != 0
    else:  # tokenizers of Hugging Face; some pad with the end token, so count the others
        too_long = (longer != pad).sum(dim=1) > (tokens != pad).sum(dim=1)
    if too_long.any():
        text = texts[int(too_long.nonzero()[0])]
        raise ValueError(f"a text is longer than the model's context of {context_length} tokens (start and end "
                         f"included): {text[:80]!r}... Shorten it.")
    return tokens


class TokenCache:
    """Tokens of texts that come again and again, as the concepts of a category do at every step of a fine-tuning.

    CLIP's tokenizer takes a tenth of a millisecond a text, on the CPU; a GPU would wait for it.

    Args:
        most: texts to keep; where there are more, all are forgotten.
    """

    def __init__(self, most: int = 50_000) -> None:
        self.most, self.rows = most, {}

    def __call__(self, tokenizer: Callable[..., Tensor], texts: Sequence[str], context_length: int) -> Tensor:
        """As `tokenize`."""
        keys = [(tokenizer, context_length, text) for text in texts]
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if len(self.rows) + len(new) > self.most:
            self.rows.clear()
            new = list(dict.fromkeys(keys))
        if new:
            self.rows |= zip(new, tokenize(tokenizer, [text for *_, text in new], context_length))
        return torch.stack([self.rows[key] for key in keys])


def encode_tokens(model: nn.Module, tokens: Tensor, cut: bool = True) -> Tensor:
    """Tokens `[K, L]` -> text embeddings `[K, D]`, not of unit norm.

    In a causal tower that is pooled at the end token, nothing after that token can change the result: the columns
    behind the longest text are cut off (77 tokens to about 10 for a concept), and the attention mask with them. Short
    texts do not wait for long ones: they go through the tower in up to three groups, see GROUPS. Any other tower reads
    its padding, and goes through open_clip's own encoder with the full context.

    Args:
        model: open_clip model.
        tokens: `[K, context_length]`, long; best on the CPU, where asking for the longest text waits for nothing.
        cut: False always takes open_clip's encoder.
    """
    text = getattr(model, "text", model)  # a tower of its own, or parts that lie in the model itself
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    mask = getattr(text, "attn_mask", None)  # None where every token sees every other
    if not cut or mask is None or pool not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        return model.encode_text(tokens.to(next(text.parameters()).device), normalize=False)
    end_id = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
    ends = (tokens if pool == "argmax" else (tokens == end_id).int()).argmax(dim=-1)
    group = torch.bucketize(ends + 1, torch.tensor(GROUPS, device=ends.device))
    members = [(group == number).nonzero()[:, 0] for number in group.unique().tolist()]
    if len(members) == 1:
        return _encode_cut(text, tokens, ends)
    parts = torch.cat([_encode_cut(text, tokens[rows], ends[rows]) for rows in members])
    return parts[torch.cat(members).argsort().to(parts.device)]


def _encode_cut(text: nn.Module, tokens: Tensor, ends: Tensor) -> Tensor:
    """The causal tower `text` on the columns up to the last end token. ends: `[K]`, where each text has its own."""
    length = int(ends.max()) + 1
    dtype, device = text.transformer.get_cast_dtype(), text.positional_embedding.device
    x = text.token_embedding(tokens[:, :length].to(device)).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    x = text.ln_final(x)[torch.arange(len(x), device=device), ends.to(device)]
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection
