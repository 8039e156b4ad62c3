"""Fine-tuning: the configuration, the objective as one module, the loop and its checkpoints."""
from dealkit.training.captions import draw_captions
from dealkit.training.config import DealConfig
from dealkit.training.loop import finetune
from dealkit.training.objective import DealObjective
from dealkit.training.step import OutOfMemory

__all__ = ["DealConfig", "DealObjective", "OutOfMemory", "draw_captions", "finetune"]
