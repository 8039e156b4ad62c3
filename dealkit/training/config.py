"""The settings of one fine-tuning run."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dealkit.normalize import OVERLAPS

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DealConfig:
    """Settings of one fine-tuning run. The defaults are the paper's form and released weights; `concept_captions`
    is ours.

    Args:
        lambda_disentangle, gamma_localize: weights of the two regularisers; both 0 is contrastive-only fine-tuning.
        overlap: "product" (the paper's), "cosine" or "soft_iou", see `disentangle_loss`.
        aggregate: "sum" (the paper's) or "max", see `localize_loss`.
        guard, guard_share: weight of `guard_loss` against dead maps, and the share of positive relevance it asks for.
        stop_text_gradient: the regularisers do not move the text tower.
        localize_moves: which maps the localizing term moves: "both" (the paper's), "concepts" (the category's map is a
            constant), or "category" (it is led to what its concepts' maps show, and these are constants).
        n_concepts: how many of a category's concepts the regularisers explain, the first ones; None for all.
        limit_disentangle, limit_localize: the paper's constrained form, "minimise L_contrastive subject to R <= limit".
            With a limit the weight of that term is a Lagrange multiplier: it starts at `lambda_disentangle` or
            `gamma_localize` and goes up while R is above the limit and down while it is below, see `Multipliers`.
        multiplier_rate: how fast.
        swap: chance in [0, 1] of each training image to have its surroundings exchanged for those of other images, see
            `swap_surroundings`; 0 leaves the images alone. Ours, not the paper's.
        swap_keep: share in [0, 1] of an image's places that stay, at least one. swap_method: maps that say which; None
            is "every_exit" where the tower has it; "centre", "random" and "uniform" are controls that look at nothing.
        detach_maps: cut the gradient of the maps, as the released code does; kept as a control.
        method: explanation method; None for the tower's own (see `explain`).
        concept_captions: share in [0, 1] of the training captions that mention concepts (drawn from the bank).
        category_prompt: the text of a category, the same in training and in evaluation.
        lr, weight_decay, betas, eps: Adam's settings.
        epochs, batch_size, seed: the seed fixes order and captions.
            `batch_size` is that of all processes together: each takes its share.
        freeze_text: do not train the text tower at all; the texts of the bank are then encoded once.
        precision: what towers compute in: "float32", or "bfloat16" or "float16" by autocast. The weights stay float32
            in any case, and so do maps and losses. Prefer bfloat16; float16 is for older GPUs (T4, V100), and leaves
            out a step whose gradients overflow, which the history counts.
        checkpoint_activations: recompute what lies inside the blocks of the towers in the backward pass instead of
            keeping it: much less memory for about a third more time, the same gradients.

    Raises:
        ValueError: for a negative or NaN weight, a non-positive learning rate, an unknown option.
    """

    lambda_disentangle: float = 0.1
    gamma_localize: float = 0.01
    overlap: str = "product"
    aggregate: str = "sum"
    guard: float = 0.0
    guard_share: float = 0.3
    stop_text_gradient: bool = False
    localize_moves: str = "both"
    n_concepts: int | None = None
    limit_disentangle: float | None = None
    limit_localize: float | None = None
    multiplier_rate: float = 0.02
    swap: float = 0.0
    swap_keep: float = 0.3
    swap_method: str | None = None
    detach_maps: bool = False
    method: str | None = None
    concept_captions: float = 0.6
    category_prompt: str = "a photo of a {}"
    lr: float = 5e-7
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    epochs: int = 1
    batch_size: int = 32
    freeze_text: bool = False
    seed: int = 0
    precision: str = "float32"
    checkpoint_activations: bool = False

    def __post_init__(self):
        for name in ("lambda_disentangle", "gamma_localize", "guard", "weight_decay"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; a weight is a finite number >= 0 (0 switches the term off)")
        for name in ("lr", "multiplier_rate", "limit_disentangle", "limit_localize"):
            value = getattr(self, name)
            if not (value is None and name.startswith("limit") or _is_finite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it is a finite number > 0"
                                 + (", or None for a fixed weight" if name.startswith("limit") else ""))
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0), ("n_concepts", 2)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least or name == "n_concepts" and value is None):
                raise ValueError(f"{name} is {value!r}; it must be a whole number >= {least}")
        for name in ("concept_captions", "guard_share", "swap", "swap_keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in [0, 1]")
        for name, known in (("overlap", OVERLAPS), ("aggregate", ("sum", "max")),
                            ("localize_moves", ("both", "concepts", "category")),
                            ("precision", PRECISIONS), ("checkpoint_activations", (False, True))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {known}")
        if self.category_prompt.count("{}") != 1:
            raise ValueError(f"category_prompt is {self.category_prompt!r}; it needs one {{}} for the category")

    @classmethod
    def recommended(cls, **changes) -> DealConfig:
        """The variant that this repository recommends, with the paper's optimiser and rate.

        DEAL in Birdworld's form, and the swap of surroundings, which is what lowers the reliance on the background.
        On held-out Birdworld seeds, with lr=1e-4 and batch_size=24, it halves the overlap of concept maps, keeps
        accuracy, raises the worst group, and costs one to two points of concept accuracy (data/birdworld/heldout.csv;
        notebook 05 has the controls). Its weights were chosen on validation birds, without masks, for a grid of
        10 x 10: on another one scale `gamma_localize`, the weight of a sum over patches, by 100 / (h * w). Nobody has
        run it on photographs.

        Args:
            changes: any other settings, such as lr=1e-4.
        """
        form = {"lambda_disentangle": 3.0, "gamma_localize": 0.04, "overlap": "cosine", "aggregate": "max",
                "guard": 2.0, "stop_text_gradient": True, "swap": 0.5}
        return cls(**(form | changes))

    @property
    def contrastive_only(self) -> DealConfig:
        """The control: the same data, captions, order and steps without any regulariser, and without a swap."""
        return replace(self, lambda_disentangle=0.0, gamma_localize=0.0, guard=0.0, limit_disentangle=None,
                       limit_localize=None, swap=0.0)

    @property
    def regularised(self) -> bool:
        """Whether any term but the contrastive one has a weight, now or later."""
        weights = self.lambda_disentangle, self.gamma_localize, self.guard
        return max(weights) > 0 or self.limit_disentangle is not None or self.limit_localize is not None


def _is_finite(value) -> bool:
    """A finite number, and not its text: settings that come from a file may be "1e-4"."""
    return isinstance(value, (int, float)) and math.isfinite(value)
