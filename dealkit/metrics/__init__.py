"""What is measured, each a function of plain tensors: entanglement, localization, faithfulness, stability, accuracy.

Every metric takes `reduction`: "mean" gives a float that leaves undefined entries (NaN) out, "none" one value per image
`[B]` or per image and concept `[B, K]`, for tables and for `bootstrap_interval`. No metric says enough on its own: maps
that have died do not overlap, so read `overlap` beside `dead_maps` and a localization.
"""

from dealkit.metrics.classification import accuracy, worst_group_accuracy
from dealkit.metrics.entanglement import (
    dead_maps,
    disentanglability,
    disentanglability_of,
    overlap,
)
from dealkit.metrics.faithfulness import (
    blur,
    deletion_auc,
    insertion_auc,
    insertion_fidelity,
    replacement_curve,
    without_content,
)
from dealkit.metrics.intervals import bootstrap_interval
from dealkit.metrics.localization import best_iou, iou, mass_in_mask, pointing_game
from dealkit.metrics.perturbation import infidelity, max_sensitivity
from dealkit.metrics.points import point_hits, point_masks, point_mass
from dealkit.metrics.retrieval import first_relevant, recall_at_k
from dealkit.metrics.similarity import rank_correlation

__all__ = [
    "accuracy", "best_iou", "blur", "bootstrap_interval", "dead_maps", "deletion_auc", "disentanglability",
    "disentanglability_of", "first_relevant", "infidelity", "insertion_auc", "insertion_fidelity", "iou",
    "mass_in_mask", "max_sensitivity", "overlap", "point_hits", "point_mass", "point_masks", "pointing_game",
    "rank_correlation", "recall_at_k", "replacement_curve", "without_content", "worst_group_accuracy",
]
