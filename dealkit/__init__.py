"""dealkit: disentangle and localize the concept-level explanations of vision-language models (DEAL, ECCV 2024)."""
from dealkit import metrics
from dealkit.concepts import ConceptBank, check_concepts, extract_concepts, load_concepts
from dealkit.evaluation import evaluate
from dealkit.losses import contrastive_loss, disentangle_loss, guard_loss, localize_loss
from dealkit.maps import explain, normalize_maps
from dealkit.models import VLM, load_model
from dealkit.presets import preset
from dealkit.training import DealConfig, finetune

from dealkit import check  # last: the checks of the exercises use all the others

__version__ = "0.1.0"
__all__ = ["VLM", "ConceptBank", "DealConfig", "check", "check_concepts", "contrastive_loss", "disentangle_loss",
           "evaluate", "explain", "extract_concepts", "finetune", "guard_loss", "load_concepts", "load_model",
           "localize_loss", "metrics", "normalize_maps", "preset"]
