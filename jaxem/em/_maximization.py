"""The maximization slot: how the next model follows from the statistics."""

import abc
from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.statistics import Framed
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractModel


class AbstractMaximization(eqx.Module):
    """The M-step of an algorithm."""

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """What holds for every step."""

    @abc.abstractmethod
    def init(self, model: AbstractModel) -> PyTree[Array]:
        """What is remembered before the first step (an optimiser's state, say)."""

    @abc.abstractmethod
    def __call__(
        self,
        statistics: Framed,
        memory: PyTree[Array],
        evaluate: Callable[[AbstractModel], tuple[Framed, Float[Array, ""]]],
    ) -> tuple[AbstractModel, PyTree[Array]]:
        """The next model; what is frozen in the frame of the statistics stays as it is there.

        `evaluate(model)` gives the statistics of this step's data about a model, without the
        prior, and its objective, with the log-prior.
        """

    @abc.abstractmethod
    def conclusive(self, memory: PyTree[Array], step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether a small step can mean convergence."""


class ClosedForm(AbstractMaximization):
    """The model's own `m_step`."""

    @property
    def traits(self) -> Traits:
        return Traits()

    def init(self, model):
        return None

    def __call__(self, statistics, memory, evaluate):
        return statistics.frame.m_step(statistics), memory

    def conclusive(self, memory, step):
        return True
