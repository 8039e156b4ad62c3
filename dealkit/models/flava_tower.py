"""Where FLAVA's image encoder is cut, a CLS-pooled ViT of Hugging Face's transformers.

transformers is imported by whoever builds the model (`flava.py`); nothing here needs it.
"""

from __future__ import annotations

from torch import Tensor, nn

from dealkit.models.blocks import BlockKind, Projected
from dealkit.models.split import Family, merge_heads, per_head
from dealkit.models.stack import Stack, stack_cuts


class FlavaTower(nn.Module):
    """FLAVA's image encoder and its projection, as an image tower.

    Attributes:
        image_model: transformers' FlavaImageModel.
        image_projection: its linear map into the space that images and texts share.
        image_size: (H, W) in pixels.
        output_dim: D.
    """

    def __init__(self, image_model: nn.Module, image_projection: nn.Linear) -> None:
        super().__init__()
        self.image_model, self.image_projection = image_model, image_projection
        self.image_size = tuple(image_model.embeddings.patch_embeddings.image_size)
        self.output_dim = image_projection.out_features

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> embeddings `[B, D]`, not of unit norm: the projection of the last CLS token."""
        return self.image_projection(self.image_model(pixel_values=images).last_hidden_state[:, 0])


def find_flava_family(visual: FlavaTower) -> Family:
    """The cuts of FLAVA's image encoder, the same as those of CLIP's ViT."""
    return Family("FLAVA (CLS-pooled ViT)", _grid(visual), stack_cuts(_stack))


def _grid(visual: FlavaTower) -> tuple[int, int]:
    patches = visual.image_model.embeddings.patch_embeddings
    return tuple(size // patch for size, patch in zip(patches.image_size, patches.patch_size))


def _stack(visual: FlavaTower) -> Stack:
    model = visual.image_model
    return Stack(model.encoder.layer, KIND, lambda images: (model.embeddings(images), [{}] * len(model.encoder.layer)),
                 lambda x: visual.image_projection(model.layernorm(x)[:, 0]), _grid(visual))


def _project(attn: nn.Module, tokens: Tensor) -> Projected:
    inner = attn.attention
    stacked = inner.query(tokens), inner.key(tokens), inner.value(tokens)
    return *(per_head(x, inner.num_attention_heads) for x in stacked), None


def _merge(attn: nn.Module, context: Tensor, tokens: Tensor) -> Tensor:
    return attn.output(merge_heads(context), tokens)


def _leave(block: nn.Module, x: Tensor, read: Tensor) -> Tensor:
    x = read + x
    return block.output(block.intermediate(block.layernorm_after(x)), x)


def _run(block: nn.Module, x: Tensor) -> Tensor:
    """A stock block, which recomputes itself in the backward pass where gradient checkpointing is on."""
    output = block(x)
    return output[0] if isinstance(output, tuple) else output  # a tuple in transformers up to 5


KIND = BlockKind(lambda block, x: block.layernorm_before(x), _project, _merge, _leave, lambda block: block.attention,
                 _run)
