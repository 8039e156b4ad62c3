"""Attention made visible in a stock model: the oracle that the cuts are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """While it is on, fused attention is computed in the open, and each call's parts are kept, on the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **{key: value for key, value in (kwargs or {}).items() if key == "attn_mask"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        attention = (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)
        context = torch.einsum("bhqk,bhkd->bhqd", attention, v)
        self.calls.append({"q": q, "k": k, "v": v, "attention": attention, "context": context})
        return context


class OpenMultihead(nn.Module):
    """torch's multi-head attention, head by head in the open; the mode above cannot see into torch's own."""

    def __init__(self, stock: nn.MultiheadAttention, watch: Watch) -> None:
        super().__init__()
        self.stock, self.watch = stock, watch

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, None]:
        stock, heads = self.stock, self.stock.num_heads
        weights = stock.in_proj_weight.split(stock.embed_dim) if stock.in_proj_weight is not None else (
            stock.q_proj_weight, stock.k_proj_weight, stock.v_proj_weight)
        q, k, v = ((x @ weight.T + bias).unflatten(-1, (heads, -1)).movedim(-2, 1)
                   for x, weight, bias in zip((query, key, value), weights, stock.in_proj_bias.split(stock.embed_dim)))
        context = self.watch.attend(q, k, v)
        return stock.out_proj(torch.cat([context[:, head] for head in range(heads)], dim=-1)), None


def watched(visual: nn.Module, images: Tensor, call: int = -1) -> tuple[Tensor, dict[str, Tensor]]:
    """The stock tower's embedding, and the parts of one of the attentions that it computed; -1 is the last."""
    watch, pool = Watch(), getattr(visual, "attn_pool", None)
    if pool is not None:  # CoCa's pooling attention is torch's own
        stock, pool.attn = pool.attn, OpenMultihead(pool.attn, watch)
    try:
        with watch:
            embedding = visual(images)
    finally:
        if pool is not None:
            pool.attn = stock
    return embedding[0] if isinstance(embedding, tuple) else embedding, watch.calls[call]
