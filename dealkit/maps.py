"""Maps: where in an image a model sees a concept, differentiable with respect to every weight of the image tower.

A map answers: which parts of the explained variable raise the cosine between image and text? Every method starts from
the gradient of that cosine. With `create_graph=True` the gradient is itself a function of the weights, so a loss on the
maps can train the model: through the variable, and through the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from dealkit.models import VLM, Split, Tower
from dealkit.models.towers import METHODS
from dealkit.normalize import normalize_maps

__all__ = ["explain", "contributions", "to_maps", "choose_method", "embed_texts", "cosines", "normalize_maps"]

# method -> kind of the variable that it explains
VARIABLES = {method: kind for kind, methods in METHODS.items() for method in methods}
TOGETHER = 8  # texts in one backward pass: enough to fill the matrix products, few enough for the memory


def explain(vlm: VLM, images: Tensor, texts: Sequence[str] | Sequence[Sequence[str]] | Tensor,
            method: str | None = None, create_graph: bool = False, signed: bool = False) -> Tensor:
    """Explain the score of each image with each text as a map over the image.

    One pass through the trunk serves all texts. The result is not normalised; see `normalize_maps`.

    What each method computes, and what it can and cannot say; s is the cosine, g a gradient of it:

    - "relevance" (Chefer et al., 2021): ReLU(g * attention) in the row of the query that pools, mean over heads. It
      says what the last block reads for the text, not what earlier blocks had mixed into the tokens that it reads.
    - "gradcam" (Selvaraju et al., 2017): ReLU(sum over channels of mean g * feature). It says which places hold
      features that raise s wherever they are; it is blind to attention, and to what cancels in a channel's mean.
    - "gradeclip" (Zhao et al., 2024): ReLU(sum over channels of g * value) * closeness; g is taken at what the query
      has read, before the output projection; closeness is the cosine of query and key, stretched to 0..1 over the
      patches. It finds evidence in patches that are hardly attended to, and so may mark what the model hardly uses.
      Heads are the model's own. The released code runs the last block with a single one, which is another network, and
      sends query and key through the output projection before it compares them.
    - "legrad" (Bousselham et al., 2024): ReLU(g) at the row of the query that pools, in every block, s being the score
      of an exit from the tower right after that block; mean over heads and blocks. It says where attending more would
      raise s, attended to or not; exits of early blocks were never trained to meet a text. Other rows have no gradient,
      so that the paper's mean over rows would only divide all maps by their number, which is left out. The released
      code pools CLIP's exits by an average over tokens, SigLIP's without the LayerNorm before the pooling; it takes the
      last two blocks unless told otherwise, and blanks in SigLIP's maps what a text without content marks.
    - "every_exit" (ours): "relevance" in every block, s being the score of the exit right after that block, as in
      "legrad"; mean over heads and blocks. It says what each block reads for the text, so that what early blocks mix
      into CLS counts too; what they mix into patches is seen only once a later block reads it.

    Args:
        vlm: the model.
        images: `[B, 3, H, W]`, normalised for the model, as `vlm.preprocess` or a dataset returns them.
        texts: K texts for all images, or B lists of K texts, or embeddings `[K, D]` or `[B, K, D]` (any length).
        method: one of those above that the tower has (`vlm.tower.methods`). None takes the paper's for this tower.
        create_graph: True makes the maps differentiable; False leaves no trace in the model (no gradients, no flags; a
            BatchNorm in training mode counts the images, as in any pass).
        signed: True leaves the ReLU out, so that evidence against a text stays visible.

    Returns:
        `[B, K, h, w]`, with (h, w) = `vlm.grid`; non-negative unless signed. The unit is that of the cosine, for
        "legrad" per unit of attention.

    Raises:
        TypeError, ValueError: unusable images or texts, an unknown method or one that this tower does not have.
        NotImplementedError: an image tower without a cut.

    Source: DEAL (Li et al., ECCV 2024); relevance: Chefer, Gur and Wolf, ICCV 2021, eq. 5, last block;
    gradcam: Selvaraju et al., ICCV 2017, eqs. 1 and 2; gradeclip: "Gradient-based Visual Explanation for
    Transformer-based CLIP", ICML 2024; legrad: arXiv 2404.03214.

    Example:
        >>> explain(vlm, images, ["red head", "blue wing"]).shape
        torch.Size([8, 2, 10, 10])
    """
    tower = vlm.tower
    method = choose_method(tower, method)
    if create_graph and not torch.is_grad_enabled():
        raise ValueError("create_graph=True was asked for where gradients are switched off; leave torch.no_grad(), or "
                         "use create_graph=False.")
    images = vlm.check_images(images)
    with torch.inference_mode(False), torch.set_grad_enabled(create_graph):
        text_emb = embed_texts(vlm, texts, len(images))
        split = tower.split(images, kind=VARIABLES[method])
        return to_maps(contributions(split, text_emb, tower.grid, create_graph, method), signed)


def choose_method(tower: Tower, method: str | None = None) -> str:
    """The method that a tower is explained with: the paper's for None; ValueError for one that it does not have."""
    method = tower.methods[0] if method is None else method
    if method not in VARIABLES:
        raise ValueError(f"unknown method {method!r}; this tower, {tower.family}, has {', '.join(tower.methods)}.")
    if method not in tower.methods:
        raise ValueError(f"{method!r} does not apply to this tower, {tower.family}; it has {', '.join(tower.methods)}.")
    return method


def contributions(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool = False,
                  method: str | None = None) -> Tensor:
    """The maps' ingredients, before any ReLU: what each patch says for (+) or against (-) each text.

    `explain` is this plus `to_maps`; training calls the two itself, because it has already cut the tower and needs the
    signed values too.

    Args:
        split: from `vlm.tower.split(images)`; its kind decides which methods there are.
        text_emb: `[K, D]` or `[B, K, D]`; normalised inside.
        grid: (h, w) of the maps.
        create_graph: False makes the result a constant.
        method: one that reads variables of this kind; None is the first of them ("legrad" for exits).

    Returns:
        `[B, K, heads, h, w]`. Grad-CAM and Grad-ECLIP, which add up all channels, count as one head; LeGrad and
        every_exit have those of every block.
    """
    rule = RULES[METHODS[split.kind][0] if method is None else method]
    with torch.set_grad_enabled(True):
        values = rule(split, text_emb, grid, create_graph)
    return values if create_graph else values.detach()


def to_maps(values: Tensor, signed: bool = False) -> Tensor:
    """`[B, K, heads, h, w]` contributions -> maps `[B, K, h, w]`.

    The ReLU acts head by head: a head that argues against a text does not silence one that argues for it.
    """
    return (values if signed else values.relu()).mean(dim=2)


def cosines(embedding: Tensor, text_emb: Tensor) -> Tensor:
    """The explained scores: `[B, D]` and `[K, D]` or `[B, K, D]` -> cosines `[B, K]`."""
    return (F.normalize(text_emb, dim=-1) @ F.normalize(embedding, dim=-1)[..., None])[..., 0]


def embed_texts(vlm: VLM, texts: Sequence[str] | Sequence[Sequence[str]] | Tensor, batch: int) -> Tensor:
    """Texts in any of the forms that `explain` takes -> `[K, D]` or, one set per image, `[batch, K, D]`.

    A text that several images share is encoded once. Embeddings are checked and passed on.

    Raises:
        TypeError, ValueError: as `explain`.
    """
    if isinstance(texts, Tensor):
        _check_embeddings(texts, batch, vlm.tower.output_dim)
        return texts.to(vlm.device, vlm.dtype).clone()
    nested = isinstance(texts, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in texts)
    if not nested:
        return vlm.encode_text(texts)
    if len(texts) != batch:
        raise ValueError(f"texts are {len(texts)} lists for {batch} images; expected one list for each image, or a "
                         "single list of str for all of them.")
    for number, row in enumerate(texts):
        if not isinstance(row, (list, tuple)):
            raise TypeError(f"texts[{number}] is a {type(row).__name__} among lists; expected all str or all lists.")
    counts = sorted({len(row) for row in texts})
    if len(counts) > 1 or counts[0] == 0:
        raise ValueError(f"the images have {counts} texts; expected the same number, at least one, for every image.")
    distinct = list(dict.fromkeys(chain.from_iterable(texts)))
    place = {text: number for number, text in enumerate(distinct)}
    index = torch.tensor([[place[text] for text in row] for row in texts], device=vlm.device)
    # embedding, not [index]: the backward of indexing adds up in any order when several threads share the work
    return F.embedding(index, vlm.encode_text(distinct))


def _relevance(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool) -> Tensor:
    """Gradient times attention for the pooling query and the patches, per head: `[B, K, heads, h, w]`."""
    attention = _explained(split, create_graph)
    scores = cosines(split.head(attention), text_emb)
    gradients = _gradients(scores, attention, create_graph, split.gain)
    products = gradients * attention[:, None]
    if products.ndim == 5:  # a cut before the last block keeps all queries; CLS is the first
        products = products[:, :, :, 0]
    return products[..., split.prefix:].unflatten(-1, grid)


def _gradcam(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool) -> Tensor:
    """Channels of the feature map, weighted by their mean gradient: `[B, K, 1, h, w]`.

    The gradients at all pixels of a channel add up to the gradient of one offset that moves the whole channel.
    """
    features = split.variable if create_graph else split.variable.detach()
    offset = features.new_zeros(features.shape[:2]).requires_grad_()
    scores = cosines(split.shifted(offset), text_emb)
    weights = _gradients(scores, offset, create_graph, split.gain) / (grid[0] * grid[1])
    return torch.einsum("bkc,bchw->bkhw", weights, features)[:, :, None]


def _gradeclip(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool) -> Tensor:
    """Values, weighted by the gradient at what was read and by the closeness of their keys: `[B, K, 1, h, w]`.

    The first two factors, summed over channels, are the gradient with respect to the attention, summed over heads.
    """
    context = _explained(split, create_graph)
    weights = _gradients(cosines(split.head(context), text_emb), context, create_graph, split.gain)  # [B, K, heads, d]
    evidence = torch.einsum("bknd,bnpd->bkp", weights, split.values[:, :, split.prefix:]).unflatten(-1, grid)
    closeness = split.closeness[:, split.prefix:].unflatten(-1, grid)
    return (evidence * normalize_maps(closeness)[:, None])[:, :, None]


def _legrad(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool) -> Tensor:
    """The gradient of each exit's score with respect to its attention: `[B, K, blocks * heads, h, w]`."""
    rows = []
    for stop in split.exits:
        attention = _explained(stop, create_graph)
        rows.append(_gradients(cosines(stop.head(attention), text_emb), attention, create_graph, stop.gain))
    return torch.cat(rows, dim=2)[..., split.prefix:].unflatten(-1, grid)


def _every_exit(split: Split, text_emb: Tensor, grid: tuple[int, int], create_graph: bool) -> Tensor:
    """Relevance at each exit: `[B, K, blocks * heads, h, w]`."""
    return torch.cat([_relevance(stop, text_emb, grid, create_graph) for stop in split.exits], dim=2)


RULES = {"relevance": _relevance, "gradcam": _gradcam, "gradeclip": _gradeclip, "legrad": _legrad,
         "every_exit": _every_exit}


def _explained(split: Split, create_graph: bool) -> Tensor:
    """The variable, ready for a gradient: without its history where a constant is wanted, or the trunk is frozen."""
    variable = split.variable
    return variable if create_graph and variable.requires_grad else variable.detach().requires_grad_()


def _gradients(scores: Tensor, variable: Tensor, create_graph: bool, gain: float = 1.0) -> Tensor:
    """The gradient of every score `[B, K]` with respect to its own image's variable `[B, ...]`: `[B, K, ...]`.

    Images do not meet inside the head, so the sum over the batch has each image's own gradient. `gain` lifts what
    passes through a head of float16 off the bottom of its range, and is taken back from the result.
    """
    if gain != 1.0:
        return _gradients(scores * gain, variable, create_graph) / gain
    picks = torch.eye(scores.shape[1]).to(scores)[:, None].expand(-1, *scores.shape)  # one text each, of all images
    return torch.cat([torch.autograd.grad(scores, variable, pick, retain_graph=True, create_graph=create_graph,
                                          is_grads_batched=True)[0] for pick in picks.split(TOGETHER)]).transpose(0, 1)


def _check_embeddings(text_emb: Tensor, batch: int, size: int) -> None:
    shape = tuple(text_emb.shape)
    if text_emb.ndim not in (2, 3):
        raise ValueError(f"text embeddings have shape {shape}; expected [K, D] or [B, K, D].")
    if text_emb.ndim == 3 and len(text_emb) != batch:
        raise ValueError(f"text embeddings {shape} are for {len(text_emb)} images, but there are {batch}.")
    if 0 in shape:
        raise ValueError(f"text embeddings {shape} are empty (K = 0); expected at least one text.")
    if shape[-1] != size:
        raise ValueError(f"text embeddings {shape} embed texts in {shape[-1]} dimensions; this model has {size}. "
                         "Encode the texts with this model.")
    if not text_emb.is_floating_point():
        raise TypeError(f"text embeddings have dtype {text_emb.dtype}; expected floating point, from vlm.encode_text. "
                        "Tokens are no embeddings.")
    if not text_emb.isfinite().all():
        raise ValueError("text embeddings contain NaN or infinite values.")
