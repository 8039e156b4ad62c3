"""Fine-tuning: the configuration, the objective as one module, the loop and its checkpoints."""
from dealkit.training.config import DealConfig
from dealkit.training.loop import draw_captions, finetune
from dealkit.training.objective import DealObjective

__all__ = ["DealConfig", "DealObjective", "draw_captions", "finetune"]
