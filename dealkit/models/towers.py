"""Which image tower is cut where.

To add a family of towers, write one function `cut(visual, images, block) -> Split` in a file of its own and name it in
`find_tower`. Nothing here forks, patches or hooks open_clip: a cut calls the stock modules in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from dealkit.models.resnet import cut_resnet
from dealkit.models.split import Split
from dealkit.models.vit import cut_vit_attention, cut_vit_features


@dataclass(frozen=True, eq=False)
class Tower:
    """An image tower and the places where it can be cut.

    Attributes:
        visual: the stock open_clip module.
        family: what kind of tower it is, in words.
        image_size: (H, W) in pixels of the images it takes.
        grid: (h, w) of the maps.
        methods: the methods of `dealkit.explain` that it supports; the first is the paper's.
        cuts: kind of variable -> function that cuts; the first kind is the paper's.
    """

    visual: nn.Module
    family: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    methods: tuple[str, ...]
    cuts: dict[str, Callable[[nn.Module, Tensor, int], Split]]

    def split(self, images: Tensor, block: int = -1, kind: str | None = None) -> Split:
        """Run the trunk on a batch and return what is explained, with the head that follows it.

        Args:
            images: `[B, 3, H, W]`, as `vlm.preprocess` or a dataset returns them.
            block: transformer block to cut at; -1 is the last.
            kind: "attention" or "features"; None is the paper's variable for this tower.

        Raises:
            ValueError: unusable images, a kind this tower does not have, or a block that does not exist.

        Example:
            >>> split = vlm.tower.split(images)
            >>> embedding = split.head(split.variable)  # what vlm.model.encode_image(images) returns
        """
        kind = next(iter(self.cuts)) if kind is None else kind
        if kind not in self.cuts:
            raise ValueError(f"a {self.family} has no variable of kind {kind!r}; choose one of {list(self.cuts)}.")
        images = check_images(images, self.image_size).to(next(self.visual.parameters()))  # its device and dtype
        return self.cuts[kind](self.visual, images, block)


def find_tower(visual: nn.Module) -> Tower:
    """The cuts of an open_clip image tower.

    Raises:
        NotImplementedError: a family without a cut; the message names it and those that have one.
    """
    if isinstance(visual, ModifiedResNet):
        size = visual.image_size
        return Tower(visual, "ModifiedResNet", (size, size), (size // 32, size // 32), ("gradcam",),
                     {"features": cut_resnet})
    family = _family(visual)
    if family == "CLS-pooled ViT":
        return Tower(visual, family, tuple(visual.image_size), tuple(visual.grid_size), ("relevance", "gradcam"),
                     {"attention": cut_vit_attention, "features": cut_vit_features})
    raise NotImplementedError(f"this image tower is a {family}, which has no cut for explanations yet. Supported: "
                              "CLS-pooled ViT (ViT-B-32-quickgelu, ViT-L-14, ...) and ModifiedResNet (RN50, ...). "
                              "Its embeddings work: use vlm.encode_image and vlm.encode_text.")


def _family(visual: nn.Module) -> str:
    """What kind of tower this is, in the words of an error message."""
    if isinstance(visual, TimmModel):
        return f"timm tower ({type(visual.trunk).__name__})"
    if not isinstance(visual, VisionTransformer):
        return type(visual).__name__
    if visual.attn_pool is not None:
        return "attention-pooled ViT"
    if not all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks):
        return "ViT with custom attention blocks"
    return {"tok": "CLS-pooled ViT", "avg": "average-pooled ViT"}.get(visual.pool_type, "ViT without pooling")


def check_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `images` if a tower of input size (H, W) can take them, else say what is wrong and what to do.

    Values outside 0..1 are fine: images arrive normalised for the model.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: wrong rank, channels or size, an empty batch, NaN or infinity.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images are a {type(images).__name__}; expected a tensor [B, 3, {size[0]}, {size[1]}]. "
                        "Apply vlm.preprocess to each picture and torch.stack the results.")
    expected = f"expected [B, 3, {size[0]}, {size[1]}]"
    if images.ndim != 4:
        remedy = "Add the batch axis with images[None]." if images.ndim == 3 else "torch.stack single images."
        raise ValueError(f"images have shape {tuple(images.shape)}; {expected}. {remedy}")
    if len(images) == 0:
        raise ValueError(f"images are an empty batch, {tuple(images.shape)}; {expected} with at least one image.")
    if tuple(images.shape[1:]) != (3, *size):
        raise ValueError(f"images have shape {tuple(images.shape)}; {expected}. vlm.preprocess resizes a picture and "
                         "puts the colour channels first.")
    if not images.is_floating_point():
        raise TypeError(f"images have dtype {images.dtype}; expected floating point, normalised for the model. "
                        "Use vlm.preprocess instead of raw 0..255 pixels.")
    if not images.isfinite().all():
        bad = (~images.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"images {bad[:8]} of the batch contain NaN or infinite values. Look at how they were loaded.")
    return images
