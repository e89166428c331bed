"""The maximization slot: how the next model follows from the statistics."""

import abc
from collections.abc import Callable

from jaxtyping import Array, Float, PyTree

from jaxem._core.statistics import Framed
from jaxem.em._traits import AbstractSlot, Traits
from jaxem.models._base import AbstractModel


class AbstractMaximization(AbstractSlot):
    """The M-step of an algorithm."""

    @abc.abstractmethod
    def init(self, model: AbstractModel) -> PyTree[Array]:
        """What is remembered before the first step (an optimiser's state, say)."""

    @abc.abstractmethod
    def __call__(
        self,
        statistics: Framed,
        memory: PyTree[Array],
        evaluate: Callable[[AbstractModel], tuple[Framed, Float[Array, ""]]],
        total: Float[Array, ""] | float,
    ) -> tuple[AbstractModel, PyTree[Array]]:
        """The next model; what is frozen in the frame of the statistics stays as it is there.

        `evaluate(model)` gives the statistics of this step's data about a model, without the
        prior, and its objective, with the log-prior; `total` is the weight of all the data.
        """


class ClosedForm(AbstractMaximization):
    """The model's own `m_step`."""

    @property
    def traits(self) -> Traits:
        return Traits()

    def init(self, model):
        return None

    def __call__(self, statistics, memory, evaluate, total):
        return statistics.frame.m_step(statistics), memory

    def conclusive(self, memory, step):
        return True
