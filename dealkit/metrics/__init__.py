"""What is measured, each a function of plain tensors: entanglement, localization, faithfulness, accuracy, intervals.

Every metric takes `reduction`: "mean" gives a float that leaves undefined entries (NaN) out, "none" one value per image
`[B]` or per image and concept `[B, K]`, for tables and for `bootstrap_interval`. No metric says enough on its own: maps
that have died do not overlap, so read `overlap` beside `dead_maps` and a localization.
"""

from dealkit.metrics.classification import accuracy, worst_group_accuracy
from dealkit.metrics.entanglement import dead_maps, disentanglability, overlap
from dealkit.metrics.faithfulness import blur, deletion_auc, insertion_auc, insertion_fidelity, replacement_curve
from dealkit.metrics.intervals import bootstrap_interval
from dealkit.metrics.localization import iou, mass_in_mask, pointing_game

__all__ = [
    "accuracy", "blur", "bootstrap_interval", "dead_maps", "deletion_auc", "disentanglability", "insertion_auc",
    "insertion_fidelity", "iou", "mass_in_mask", "overlap", "pointing_game", "replacement_curve",
    "worst_group_accuracy",
]
