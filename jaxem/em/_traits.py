"""What a slot of EM promises, as one value; an algorithm's traits are the product of its slots'."""

import abc
import dataclasses

import equinox as eqx
from jaxtyping import Array, Bool, Int, PyTree


@dataclasses.dataclass(frozen=True)
class Traits:
    """What holds for every step of a slot, or of a whole algorithm.

    **Arguments:**

    - `monotone`: the objective never falls, to rounding.
    - `deterministic`: statistics and objective are functions of model and data alone.
    - `full_data`: after a step, statistics and objective are those of all the data at the model
      after the step.
    - `stationary`: where a fit can converge, each step is the same map, so that changes shrink
      by EM's own rate of convergence.
    - `maximal`: the M-step goes to the maximum of Q, or of its quadratic, so that a small step is
      near it. Where it does not, a fit has converged if that step would be small as well.
    - `uses_objective`: the M-step evaluates the objective, beyond what the statistics hold.
    - `period`: how many steps it takes to see all the data.

    `a * b` holds for both together.
    """

    monotone: bool = True
    deterministic: bool = True
    full_data: bool = True
    stationary: bool = True
    maximal: bool = True
    uses_objective: bool = False
    period: int = 1

    def __mul__(self, other: "Traits") -> "Traits":
        return Traits(
            monotone=self.monotone and other.monotone,
            deterministic=self.deterministic and other.deterministic,
            full_data=self.full_data and other.full_data,
            stationary=self.stationary and other.stationary,
            maximal=self.maximal and other.maximal,
            uses_objective=self.uses_objective or other.uses_objective,
            period=self.period * other.period,
        )

    @property
    def exact(self) -> bool:
        """Whether statistics and objective are functions of the model, over all the data."""
        return self.deterministic and self.full_data


class AbstractSlot(eqx.Module):
    """One of the three parts of EM. It may remember arrays from step to step."""

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """What holds for every step."""

    @abc.abstractmethod
    def conclusive(self, memory: PyTree[Array], step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether `traits.period` small steps in a row can mean convergence."""
