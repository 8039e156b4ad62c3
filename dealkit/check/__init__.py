"""Checks of the exercises in notebooks/exercises: `dealkit.check.ex_NN_k(answer)` says what is right, or gives a hint.

A check returns a `Result`. It is true when the answer is right, and it never raises, so a notebook of exercises runs
from top to bottom while it is still empty, and a teacher can write `assert dealkit.check.ex_03_1(answer)`.
"""
from dealkit.check import ablations, concepts, diagnosis, finetuning, spurious, tour, trust
from dealkit.check.ablations import *
from dealkit.check.concepts import *
from dealkit.check.diagnosis import *
from dealkit.check.finetuning import *
from dealkit.check.result import Result
from dealkit.check.spurious import *
from dealkit.check.tour import *
from dealkit.check.trust import *

__all__ = ["Result"] + [name for module in (tour, concepts, diagnosis, finetuning, ablations, spurious, trust)
                        for name in module.__all__]
