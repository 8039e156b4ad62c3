"""Is an image tower cut right? Its cuts against the stock tower, its maps, and what a loss on them reaches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dealkit
from dealkit.models import VLM, find_tower


class ImageOnly(nn.Module):
    """As much of an open_clip model as maps of embeddings need."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """`[B, 3, H, W]` -> `[B, D]`; CoCa's towers return their tokens beside it."""
        embedding = self.visual(image)
        return embedding[0] if isinstance(embedding, tuple) else embedding


def blocks_of(visual: nn.Module) -> list[nn.Module]:
    """The blocks or stages of a tower, first to last."""
    if hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    if hasattr(visual, "layer4"):
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    if hasattr(visual, "image_model"):
        return list(visual.image_model.encoder.layer)
    return list(next(getattr(visual.trunk, name) for name in ("blocks", "stages", "layers")
                     if hasattr(visual.trunk, name)))


@torch.no_grad()
def wake(visual: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Give a tower weights with which nothing is 0, 1 or close to it: many start with layers that do nothing.

    Every weight is drawn anew: matrices and filters with variance 1 / fan-in, biases of size 0.1, norms around 1, the
    scales of residual branches around 0.5. BatchNorm takes its statistics from the images.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    for name, weight in visual.named_parameters():
        if weight.ndim == 0:  # a temperature
            continue
        weight.normal_(generator=generator)
        last = name.rsplit(".", 1)[-1]
        if "gamma" in last or "layer_scale" in name:
            weight.mul_(0.1).add_(0.5)
        elif last.endswith("bias"):
            weight.mul_(0.1)
        elif last == "weight" and weight.ndim == 1:
            weight.mul_(0.1).add_(1)
        else:  # matrices [out, in], filters [out, in, h, w], tokens and positions [..., width]
            weight.div_(weight[0].numel() ** 0.5 if last.endswith("weight") else weight.shape[-1] ** 0.5)
    if norms:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the plain mean of what was seen
        visual.train()
        visual(images)
        visual.eval()


def sample(visual: nn.Module, count: int = 2, seed: int = 1) -> Tensor:
    """Images for a tower: noise of two sizes, so that they differ from place to place as well."""
    height, width = find_tower(visual).image_size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return 2 * coarse + 0.5 * torch.randn(count, 3, height, width, generator=generator)


def measure(visual: nn.Module, every_gradient: bool = True) -> dict[str, float]:
    """Hold a tower's cuts against the stock tower, and look at its maps.

    Returns:
        difference: largest difference between an embedding through a cut and the stock tower's, in units of the root
            mean square of the latter.
        size: that root mean square.
        images, texts: least relative distance between the maps of two images, and of two texts, over the methods.
        first, last: least share of the parameters of the first and the last block that a loss on maps reaches, among
            those that a loss on the stock embedding reaches.
        finite: 1 if everything was.
        grid: 1 if all maps had the tower's grid.
    """
    vlm = VLM("walk", ImageOnly(visual))
    images, tower = sample(visual), vlm.tower
    texts = torch.randn(2, tower.output_dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = vlm.model.encode_image(images)
        splits = [tower.split(images, kind=kind) for kind in tower.cuts]
        size = expected.square().mean().sqrt()
        difference = max(float(((split.head(split.variable) - expected) / size).abs().max()) for split in splits)
    del splits
    result = {"difference": difference, "size": float(size), "images": float("inf"),
              "texts": float("inf"), "first": 1.0, "last": 1.0, "finite": float(expected.isfinite().all()), "grid": 1.0}
    blocks = blocks_of(visual)
    for number, method in enumerate(tower.methods):
        graph = every_gradient or number == 0
        maps = dealkit.explain(vlm, images, texts, method=method, create_graph=graph)
        result["grid"] *= tuple(maps.shape) == (2, 2, *tower.grid)
        result["finite"] *= float(maps.isfinite().all())
        for axis, name in ((0, "images"), (1, "texts")):
            one, other = maps.detach().unbind(axis)
            result[name] = min(result[name], float((one - other).norm() / maps.detach().norm()))
        if not graph:
            continue
        loss = (maps / maps.detach().norm()).square().sum()
        for name, block in (("first", blocks[0]), ("last", blocks[-1])):
            reached, finite = reach(loss, list(block.parameters()))
            if not all(reached):  # the stock tower may not use these weights either
                stock = (vlm.model.encode_image(images) * texts).sum()
                reached = [hit for hit, used in zip(reached, reach(stock, list(block.parameters()))[0]) if used]
            result["finite"] *= finite
            result[name] = min(result[name], sum(reached) / max(len(reached), 1))
    return result


def reach(loss: Tensor, weights: list[nn.Parameter]) -> tuple[list[bool], bool]:
    """Which weights have a gradient that is not 0, and whether all gradients are finite."""
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return ([g is not None and bool(g.abs().max() > 0) for g in gradients],
            all(g is None or bool(g.isfinite().all()) for g in gradients))


def problems(result: dict[str, float]) -> list[str]:
    """What is wrong with a measured tower; nothing for one that may be called supported."""
    rules = {"the embedding through a cut differs from the stock tower's": result["difference"] > 1e-4,
             "the stock embedding is too small for a comparison": result["size"] < 0.05,
             "the maps do not have the tower's grid": not result["grid"],
             "something is not finite": not result["finite"],
             "the maps of two images are alike": not result["images"] > 1e-3,
             "the maps of two texts are alike": not result["texts"] > 1e-3,
             "a loss on the maps does not reach the first block": not result["first"] > 0.9,
             "a loss on the maps does not reach the last block": not result["last"] > 0.9}
    return [text for text, wrong in rules.items() if wrong]
