"""EM as one class with three slots: expectation, accumulation, maximization.

    data ──expectation──► statistics ──accumulation──► statistics ──maximization──► model

Each classical variant is a choice of slots, not a loop of its own.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem._hold import with_held
from jaxem._model import AbstractModel
from jaxem._posterior import AbstractExpectation, Exact
from jaxem._statistics import Framed


class AbstractAccumulation(eqx.Module):
    """How new statistics combine with remembered ones, and which units a step looks at.

    `ascends` says whether an exact step's objective never falls; `exact` whether statistics
    and objective after a step are those of all the data at the model after the step.
    """

    ascends: eqx.AbstractVar[bool]
    exact: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def init(self, model: AbstractModel, data: PyTree[Array], weights: Any) -> PyTree[Array]:
        """What is remembered before the first step."""

    @abc.abstractmethod
    def select(
        self, memory: PyTree[Array], data: PyTree[Array], weights: Any, step: Array, key: Any
    ) -> tuple[PyTree[Array], Any]:
        """The units and unit weights of this step."""

    @abc.abstractmethod
    def __call__(
        self, memory: PyTree[Array], new: Framed, objective: Float[Array, ""], step: Array
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics (framed at the newest model) and objective after this step."""


class AbstractMaximization(eqx.Module):
    """The M-step of an algorithm. `ascends` says whether it never lowers Q."""

    ascends: eqx.AbstractVar[bool]

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
        """The next model; what is held in the frame of the statistics stays as it is there.

        `evaluate(model)` gives the statistics of this step's data about a model, without the
        prior, and its objective, with the log-prior.
        """


class Full(AbstractAccumulation):
    """All the data in every step; nothing is remembered."""

    ascends: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def init(self, model, data, weights):
        return None

    def select(self, memory, data, weights, step, key):
        return data, weights

    def __call__(self, memory, new, objective, step):
        return memory, new, objective


class ClosedForm(AbstractMaximization):
    """The model's own `m_step`."""

    ascends: ClassVar[bool] = True

    def init(self, model):
        return None

    def __call__(self, statistics, memory, evaluate):
        return statistics.frame.m_step(statistics), memory


class State(eqx.Module):
    """Where an algorithm stands: statistics about a model, and their objective.

    `objective` is the log-likelihood (or the bound that the expectation gives) plus the
    log-prior up to a constant. The model *is* the frame of the statistics.
    """

    statistics: Framed
    log_likelihood: Float[Array, ""]
    objective: Float[Array, ""]
    step: Int[Array, ""]
    accumulation: PyTree[Array]
    maximization: PyTree[Array]

    @property
    def model(self) -> Any:
        return self.statistics.frame


class AbstractAlgorithm(eqx.Module):
    """A pure pair `init`, `step`; the loop is left to `fit`, or to whoever wants one."""

    @property
    @abc.abstractmethod
    def ascends(self) -> bool:
        """Whether the objective never falls, to rounding."""

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether a state's statistics and objective are those of all the data at its model."""

    @abc.abstractmethod
    def init(
        self,
        model: AbstractModel,
        data: PyTree[Array],
        *,
        weights: Float[Array, " n"] | None = None,
        prior: Framed | None = None,
        key: Array | None = None,
    ) -> State:
        """The state at `model`: one E-step, on the first batch if data come in batches."""

    @abc.abstractmethod
    def step(
        self,
        state: State,
        data: PyTree[Array],
        *,
        weights: Float[Array, " n"] | None = None,
        prior: Framed | None = None,
        key: Array | None = None,
    ) -> State:
        """An M-step, then an E-step: nothing in the new state is one step behind."""


class EM(AbstractAlgorithm):
    """Expectation–maximisation.

    **Arguments:** `expectation`, such as `Exact()` or `Hard()`; `accumulation`, such as `Full()`;
    `maximization`, such as `ClosedForm()`. A prior is added to the statistics before the M-step,
    which gives the posterior mode (MAP-EM).

    Dempster, Laird & Rubin (1977), JRSS B 39.
    """

    expectation: AbstractExpectation = Exact()
    accumulation: AbstractAccumulation = Full()
    maximization: AbstractMaximization = ClosedForm()

    def __check_init__(self):
        for slot, kind, example in (
            ("expectation", AbstractExpectation, "Exact()"),
            ("accumulation", AbstractAccumulation, "Full()"),
            ("maximization", AbstractMaximization, "ClosedForm()"),
        ):
            value = getattr(self, slot)
            if not isinstance(value, kind):
                raise ValueError(f"EM takes an {slot} such as {example}, got {value!r}.")

    @property
    def ascends(self) -> bool:
        slots = (self.expectation, self.accumulation, self.maximization)
        return all(slot.ascends for slot in slots)

    @property
    def exact(self) -> bool:
        return self.accumulation.exact and self.expectation.deterministic

    def init(self, model, data, *, weights=None, prior=None, key=None):
        select_key, key = (None, None) if key is None else jax.random.split(key)
        step = jnp.zeros((), jnp.int32)
        memory = self.accumulation.init(model, data, weights)
        batch, batch_weights = self.accumulation.select(memory, data, weights, step, select_key)
        new, log_likelihood = self.expectation(model, batch, batch_weights, step, key)
        memory, statistics, log_likelihood = self.accumulation(memory, new, log_likelihood, step)
        objective = log_likelihood + _log_prior(model, prior)
        start = self.maximization.init(model)
        return State(statistics, log_likelihood, objective, step, memory, start)

    def step(self, state, data, *, weights=None, prior=None, key=None):
        select_key, key = (None, None) if key is None else jax.random.split(key)
        step = state.step + 1
        memory = state.accumulation
        batch, batch_weights = self.accumulation.select(memory, data, weights, step, select_key)

        def evaluate(model: AbstractModel) -> tuple[Framed, Float[Array, ""]]:
            new, log_likelihood = self.expectation(model, batch, batch_weights, step, key)
            return new, log_likelihood + _log_prior(model, prior)

        statistics = state.statistics if prior is None else state.statistics + prior
        model, optimiser = self.maximization(statistics, state.maximization, evaluate)
        model = with_held(model, state.model)
        new, log_likelihood = self.expectation(model, batch, batch_weights, step, key)
        memory, statistics, log_likelihood = self.accumulation(memory, new, log_likelihood, step)
        objective = log_likelihood + _log_prior(statistics.frame, prior)
        return State(statistics, log_likelihood, objective, step, memory, optimiser)


def _log_prior(model: Any, prior: Framed | None) -> Float[Array, ""] | float:
    return 0.0 if prior is None else model.expected_log_prob(prior)
