"""The weights of the regularisers: fixed, or multipliers that look for the weight at which a constraint holds."""
from __future__ import annotations

from dealkit.training.config import DealConfig

WEIGHTS = {"disentangle": "lambda_disentangle", "localize": "gamma_localize"}        # term -> its weight in the config


class Multipliers:
    """lambda and gamma, step by step.

    DEAL is stated as a constrained problem, "minimise L_contrastive subject to R_disentangle <= a, R_localize <= b",
    and its Lagrangian is what is trained. Where the config has a limit, the weight w of that term ascends the
    Lagrangian: with the constraint R / limit <= 1 and its multiplier mu = w * limit, after each step

        mu <- max(0, mu + rate * (R / limit - 1)),

    R being the term's value in that step, averaged over the batch. Dividing by the limit gives both constraints one
    unit, so that one rate serves both. Weights without a limit stay as they are.

    They depend on the history alone, so that a resumed run has those of an uninterrupted one.

    Source: DEAL, the relaxation of its constrained form; one step of ascent on the multipliers for each step of
    descent on the weights (Arrow, Hurwicz and Uzawa, 1958); compare dual ascent, Boyd et al., 2011, section 2.1.
    """

    def __init__(self, config: DealConfig):
        self._rate = config.multiplier_rate
        self._limits = {term: limit for term, limit in (("disentangle", config.limit_disentangle),
                                                        ("localize", config.limit_localize)) if limit is not None}
        self.weights = {term: getattr(config, name) for term, name in WEIGHTS.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """What they add to the history: the weights that move."""
        return tuple(WEIGHTS[term] for term in self._limits)

    def record(self) -> dict[str, float]:
        """The weights that move, as they are now: for the row of the step that uses them."""
        return {WEIGHTS[term]: self.weights[term] for term in self._limits}

    def update(self, values: dict[str, float]) -> None:
        """Move on, after a step with these terms."""
        for term, limit in self._limits.items():
            mu = self.weights[term] * limit + self._rate * (values[term] / limit - 1)
            self.weights[term] = max(0.0, mu) / limit
