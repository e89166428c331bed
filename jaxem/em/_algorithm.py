"""What an algorithm is: pure `init`, `step` and `finish`, over a state."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.statistics import Framed
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractModel


class State(eqx.Module):
    """Where an algorithm stands: statistics about a model, and their objective.

    - `statistics`: framed at the present model, which is `state.model`.
    - `log_likelihood`: of the data, or the bound that the expectation gives.
    - `objective`: `log_likelihood` plus the log-prior up to a constant.
    - `step`: how many steps were taken; −1 before the first E-step.
    - `expectation`, `accumulation`, `maximization`: what each slot remembers.
    """

    statistics: Framed
    log_likelihood: Float[Array, ""]
    objective: Float[Array, ""]
    step: Int[Array, ""]
    expectation: PyTree[Array]
    accumulation: PyTree[Array]
    maximization: PyTree[Array]

    @property
    def model(self) -> Any:
        return self.statistics.frame


class AbstractAlgorithm(eqx.Module):
    """Pure `init`, `step` and `finish`; `fit` is the loop around them, or a user writes one."""

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """What holds for every step."""

    @abc.abstractmethod
    def init(self, model: AbstractModel, problem: Any, *, key: Array | None = None) -> State:
        """The state at `model`: one E-step, on the first batch if data come in batches.

        **Arguments:** `problem`, a `Problem` or plain data; `key`, for algorithms that draw
        random numbers.
        """

    @abc.abstractmethod
    def unstarted(
        self, model: AbstractModel, problem: Any, *, key: Array | None = None
    ) -> State | None:
        """A state from which `step` leads to that of `init`; None where there is none.

        A loop that begins with it holds one E-step, not two, and compiles sooner.
        """

    @abc.abstractmethod
    def step(self, state: State, problem: Any, *, key: Array | None = None) -> State:
        """An M-step, then an E-step: all of the new state belongs to its model."""

    @abc.abstractmethod
    def finish(self, state: State, problem: Any, *, key: Array | None = None) -> State:
        """The state that a fit returns: its model, with statistics and objective of all the data.

        The model is that of `state`, or one of averages.
        """

    @abc.abstractmethod
    def conclusive(self, state: State) -> Bool[Array, ""] | bool:
        """Whether `traits.period` small steps in a row mean convergence."""

    @abc.abstractmethod
    def plain(self) -> Any:
        """The `EM` with the same fixed points whose `whole_step` gives implicit derivatives."""
