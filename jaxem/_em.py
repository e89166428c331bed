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
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._accumulation import AbstractAccumulation, Full, scaled
from jaxem._checks import name_of
from jaxem._guard import is_local, knows_slope_alone, no_worse
from jaxem._hold import with_held
from jaxem._model import AbstractModel
from jaxem._posterior import AbstractExpectation, Exact
from jaxem._statistics import Framed
from jaxem._units import as_arrays, total_weight


class AbstractMaximization(eqx.Module):
    """The M-step of an algorithm.

    `ascends` says whether it never lowers Q; `objective`, whether it asks for the objective
    itself, beyond what the statistics say; `steady`, whether it is the same function of the
    statistics at every step.
    """

    ascends: eqx.AbstractVar[bool]
    objective: eqx.AbstractVar[bool]
    steady: eqx.AbstractVar[bool]

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

    @abc.abstractmethod
    def settles(self, memory: PyTree[Array]) -> Bool[Array, ""] | bool:
        """Whether an M-step that hardly moved can mean that the fit has converged."""


class ClosedForm(AbstractMaximization):
    """The model's own `m_step`."""

    ascends: ClassVar[bool] = True
    objective: ClassVar[bool] = False
    steady: ClassVar[bool] = True

    def init(self, model):
        return None

    def settles(self, memory):
        return True

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
    """Pure `init`, `step` and `finish`; the loop is left to `fit`, or to whoever wants one."""

    @property
    @abc.abstractmethod
    def ascends(self) -> bool:
        """Whether the objective never falls, to rounding."""

    @property
    @abc.abstractmethod
    def exact(self) -> bool:
        """Whether a state's statistics and objective are those of all the data at its model."""

    @property
    @abc.abstractmethod
    def steady(self) -> bool:
        """Whether changes shrink from step to step by EM's own rate of convergence."""

    @property
    @abc.abstractmethod
    def period(self) -> int:
        """How many steps it takes to look at all the data."""

    @abc.abstractmethod
    def settles(self, state: State) -> Bool[Array, ""] | bool:
        """Whether `period` steps that hardly moved can mean that the fit has converged."""

    @abc.abstractmethod
    def em_map(self) -> Any:
        """Plain EM with the same fixed points: implicit derivatives are those of its `map`."""

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

    @abc.abstractmethod
    def finish(
        self,
        state: State,
        data: PyTree[Array],
        *,
        weights: Float[Array, " n"] | None = None,
        prior: Framed | None = None,
        key: Array | None = None,
    ) -> Any:
        """The model that a fit returns after its last step: the state's, or one of averages."""

    @property
    @abc.abstractmethod
    def closing(self) -> AbstractExpectation:
        """The E-step over all the data that a fit ends with, where a state's is not that."""


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
        for slot, (kind, example) in _SLOTS.items():
            value = getattr(self, slot)
            if not isinstance(value, kind):
                got = f"{name_of(value)}{_place(value)}"
                raise ValueError(f"the {slot} of EM is one such as {example}, got {got}.")
        if self.maximization.objective and not self.accumulation.exact:
            raise ValueError(
                f"{type(self.accumulation).__name__} shows an M-step a part of the data, whose "
                "objective is not that of all: climb Q, with objective=False, or use Full()."
            )

    @property
    def ascends(self) -> bool:
        slots = (self.expectation, self.accumulation, self.maximization)
        return all(slot.ascends for slot in slots)

    @property
    def exact(self) -> bool:
        return self.accumulation.exact and self.expectation.deterministic

    @property
    def steady(self) -> bool:
        return self.exact and self.maximization.steady

    @property
    def period(self) -> int:
        return self.accumulation.period

    def settles(self, state):
        settled = self.expectation.settles(state.step) & self.accumulation.settles(state.step)
        return settled & self.maximization.settles(state.maximization)

    def em_map(self):
        return EM(self.expectation, self.accumulation, ClosedForm())

    def init(self, model, data, *, weights=None, prior=None, key=None):
        step = jnp.zeros((), jnp.int32)
        data, weights = as_arrays(data), as_arrays(weights)
        if not self.accumulation.exact and (part := is_local(model)):
            raise ValueError(
                f"{type(self.accumulation).__name__} remembers statistics of earlier models, but "
                f"those of {part} hold only near the model that they were taken about; use Full()."
            )
        if not self.expectation.deterministic and (part := knows_slope_alone(model)):
            raise ValueError(
                f"{part} knows the slope of Q alone, so that a step along it must be judged by "
                f"the objective, and {type(self.expectation).__name__} has none that two models "
                "share; use Exact()."
            )

        def evaluate(data: Any, weights: Any, key: Any) -> tuple[Framed, Float[Array, ""]]:
            return self.expectation(model, data, weights, step, key)

        memory, statistics, log_likelihood = self.accumulation.init(
            model, evaluate, data, weights, key
        )
        objective = log_likelihood + _log_prior(model, prior)
        start = self.maximization.init(model)
        return State(statistics, log_likelihood, objective, step, memory, start)

    def step(self, state, data, *, weights=None, prior=None, key=None):
        if not isinstance(state, State):
            raise ValueError(f"step takes the State that init gave, got {type(state).__name__}.")
        data, weights = as_arrays(data), as_arrays(weights)
        new = self.map(state, data, weights=weights, prior=prior, key=key)
        if not (self.exact and is_local(state.model)):
            return new
        remembering = with_memory(state, new.maximization)

        def expect(model: AbstractModel) -> State:
            return self.expect(model, remembering, data, weights=weights, prior=prior, key=key)

        # Where the objective changes from step to step, this step's judges both ends.
        old = state if self.ascends else expect(state.model)
        return no_worse(expect, old, new, prior, total_weight(data, weights))

    def map(self, state: State, data: PyTree[Array], **given: Any) -> State:
        """A whole step, even where `step` takes less: the map whose fixed points are sought.

        Weights, prior and key are given as to `step`.
        """
        model, memory = self.maximize(state, data, **given)
        return self.expect(model, with_memory(state, memory), data, **given)

    def finish(self, state, data, *, weights=None, prior=None, key=None):
        data, weights = as_arrays(data), as_arrays(weights)
        found = self.accumulation.last(state.accumulation, state.step)
        if found is None:
            return state.model
        last, begun = found
        at_mean = eqx.tree_at(lambda s: s.statistics, state, last)
        model, _ = self.maximize(at_mean, data, weights=weights, prior=prior, key=key)
        return jax.tree.map(lambda a, b: jnp.where(begun, a, b), model, state.model)

    @property
    def closing(self) -> AbstractExpectation:
        return self.expectation.closing

    def maximize(
        self,
        state: State,
        data: PyTree[Array],
        *,
        weights: Float[Array, " n"] | None = None,
        prior: Framed | None = None,
        key: Array | None = None,
    ) -> tuple[AbstractModel, PyTree[Array]]:
        """The M-step alone: the next model, and what the maximization remembers."""
        _, e_step = self._batch(state, data, weights, key)

        def evaluate(model: AbstractModel) -> tuple[Framed, Float[Array, ""]]:
            new, log_likelihood = e_step(model)
            return new, log_likelihood + _log_prior(model, prior)

        statistics = state.statistics if prior is None else state.statistics + prior
        model, optimiser = self.maximization(statistics, state.maximization, evaluate)
        return with_held(model, state.model), optimiser

    def expect(
        self,
        model: AbstractModel,
        state: State,
        data: PyTree[Array],
        *,
        weights: Float[Array, " n"] | None = None,
        prior: Framed | None = None,
        key: Array | None = None,
    ) -> State:
        """The E-step alone: the state that follows `state` with this model."""
        step, e_step = self._batch(state, data, weights, key)
        new, log_likelihood = e_step(model)
        memory, statistics, log_likelihood = self.accumulation(
            state.accumulation, new, log_likelihood, step
        )
        objective = log_likelihood + _log_prior(statistics.frame, prior)
        return State(statistics, log_likelihood, objective, step, memory, state.maximization)

    def _batch(self, state: State, data: Any, weights: Any, key: Any) -> tuple[Any, Any]:
        """The number of the step that follows, and the E-step on its units."""
        select_key, key = (None, None) if key is None else jax.random.split(key)
        step = state.step + 1
        data, weights, times = self.accumulation.select(
            state.accumulation, data, weights, step, select_key
        )

        def e_step(model: AbstractModel) -> tuple[Framed, Float[Array, ""]]:
            return scaled(times, *self.expectation(model, data, weights, step, key))

        return step, e_step


_SLOTS = {
    "expectation": (AbstractExpectation, "Exact()"),
    "accumulation": (AbstractAccumulation, "Full()"),
    "maximization": (AbstractMaximization, "ClosedForm()"),
}


def _place(value: Any) -> str:
    """Where something belongs that was given in another place."""
    if isinstance(value, type) and issubclass(value, eqx.Module):
        return f", a class: write {value.__name__}(…)"
    if isinstance(value, AbstractAlgorithm):
        return ", which goes around an EM, not into one"
    if hasattr(value, "init") and hasattr(value, "update"):
        return ": an Optax optimiser goes into maximization=Gradient(optimiser)"
    for slot, (kind, _) in _SLOTS.items():
        if isinstance(value, kind):
            return f": write {slot}={type(value).__name__}(…)"
    return ""


def with_memory(state: State, memory: PyTree[Array]) -> State:
    """The state, with something else remembered by the maximization."""
    return eqx.tree_at(lambda s: s.maximization, state, memory, is_leaf=lambda leaf: leaf is None)


def _log_prior(model: Any, prior: Framed | None) -> Float[Array, ""] | float:
    return 0.0 if prior is None else model.expected_log_prob(prior)
