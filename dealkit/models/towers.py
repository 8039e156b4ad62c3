"""Which image tower is cut where.

To add a family of towers, write its functions `cut(visual, images, block) -> Split` in a file of its own and name it in
`find_tower`. `stack.py` and `pooled.py` have all cuts of ViTs, pooled by CLS and by attention, that are taken apart.
Nothing here forks, patches or hooks open_clip: a cut calls the stock modules in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from dealkit.models.flava_tower import FlavaTower, find_flava_family
from dealkit.models.recompute import check_switches, grad_checkpointing
from dealkit.models.resnet import cut_resnet
from dealkit.models.split import Cut, Family, Split, unsupported
from dealkit.models.timm_towers import find_timm_family
from dealkit.models.vit import cut_vit_attention, cut_vit_context, cut_vit_exits, cut_vit_features
from dealkit.models.vit_families import find_vit_family

# kind of variable -> the methods of `dealkit.explain` that read it
METHODS = {"attention": ("relevance",), "features": ("gradcam",), "context": ("gradeclip",),
           "exits": ("legrad", "every_exit")}


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
    cuts: dict[str, Cut]

    @property
    def output_dim(self) -> int:
        """D, the length of an embedding."""
        if not isinstance(self.visual, TimmModel):
            return self.visual.output_dim
        layers = [layer for layer in self.visual.head.modules() if isinstance(layer, nn.Linear)]
        return layers[-1].out_features if layers else self.visual.trunk.num_classes or self.visual.trunk.num_features

    def split(self, images: Tensor, block: int = -1, kind: str | None = None, save_memory: bool = False) -> Split:
        """Run the trunk on a batch and return what is explained, with the head that follows it.

        Args:
            images: `[B, 3, H, W]`, as `vlm.preprocess` or a dataset returns them.
            block: transformer block to cut at; -1 is the last.
            kind: "attention", "features", "context" or "exits"; None is the paper's variable for this tower.
            save_memory: recompute the blocks of the trunk in the backward pass instead of keeping what they compute.

        Raises:
            ValueError: unusable images, a kind this tower does not have, or a block that does not exist; save_memory
                for a tower that cannot (FLAVA).

        Example:
            >>> split = vlm.tower.split(images)
            >>> embedding = split.head(split.variable)  # as of vlm.model.encode_image(images, normalize=False)
        """
        kind = next(iter(self.cuts)) if kind is None else kind
        if kind not in self.cuts:
            raise ValueError(f"this tower, {self.family}, has no variable of kind {kind!r}; choose one of "
                             f"{list(self.cuts)}.")
        images = check_images(images, self.image_size).to(next(self.visual.parameters()))  # its device and dtype
        cut = self.cuts[kind]
        if not save_memory:
            return cut(self.visual, images, block)
        check_switches(self.visual)
        with grad_checkpointing(self.visual):
            return cut(self.visual, images, block, **({"save_memory": True} if cut is cut_resnet else {}))


def find_tower(visual: nn.Module) -> Tower:
    """The cuts of an open_clip image tower.

    Raises:
        NotImplementedError: a family without a cut; the message names it and those that have one.
    """
    if isinstance(visual, ModifiedResNet):
        size = visual.image_size
        cuts = {"features": cut_resnet}
        return Tower(visual, "ModifiedResNet", (size, size), (size // 32, size // 32), _methods(cuts), cuts)
    if _is_clip_vit(visual):
        cuts = {"attention": cut_vit_attention, "features": cut_vit_features, "context": cut_vit_context,
                "exits": cut_vit_exits}
        return Tower(visual, "CLS-pooled ViT", tuple(visual.image_size), tuple(visual.grid_size), _methods(cuts), cuts)
    family = _find_family(visual)
    return Tower(visual, family.name, tuple(visual.image_size), family.grid, _methods(family.cuts), family.cuts)


def _methods(cuts: dict[str, Cut]) -> tuple[str, ...]:
    return tuple(method for kind in cuts for method in METHODS[kind])


def _is_clip_vit(visual: nn.Module) -> bool:
    """Whether a tower is a ViT as in CLIP: pooled by CLS, of open_clip's plain blocks."""
    return (isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok"
            and all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks))


def _find_family(visual: nn.Module) -> Family:
    if isinstance(visual, TimmModel):
        return find_timm_family(visual)
    if isinstance(visual, VisionTransformer):
        return find_vit_family(visual)
    if isinstance(visual, FlavaTower):
        return find_flava_family(visual)
    raise unsupported(f"a {type(visual).__name__}")


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
