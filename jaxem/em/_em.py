"""EM as one class with three slots: expectation, accumulation, maximization.

    data ──expectation──► statistics ──accumulation──► statistics ──maximization──► model

Each classical variant is a choice of slots, not a loop of its own.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxem._core.checks import name_of
from jaxem._core.parameters import replace, with_frozen
from jaxem._core.statistics import Framed
from jaxem.em._accumulation import AbstractAccumulation, Batch, Full
from jaxem.em._algorithm import AbstractAlgorithm, State
from jaxem.em._expectation import AbstractExpectation, Infer, as_expectation
from jaxem.em._guard import no_worse
from jaxem.em._maximization import AbstractMaximization, ClosedForm
from jaxem.em._problem import Problem, as_problem
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractModel, local_part, slope_part


class EM(AbstractAlgorithm):
    """Expectation–maximisation.

    **Arguments:** `expectation`, such as `Exact()` or `Hard()`; `accumulation`, such as `Full()`;
    `maximization`, such as `ClosedForm()`. A prior is added to the statistics before the M-step,
    which gives the posterior mode (MAP-EM).

    **Raises:** `ValueError` for something else in a slot, and for slots that exclude each other.

    Dempster, Laird & Rubin (1977), JRSS B 39.
    """

    expectation: AbstractExpectation = eqx.field(converter=as_expectation, default=Infer())
    accumulation: AbstractAccumulation = Full()
    maximization: AbstractMaximization = ClosedForm()

    def __check_init__(self):
        for (slot, (kind, example)), value in zip(_SLOTS.items(), self._slots(), strict=True):
            if not isinstance(value, kind):
                got = f"{name_of(value)}{_place(value)}"
                raise ValueError(f"the {slot} of EM is one such as {example}, got {got}.")
        if self.maximization.traits.uses_objective and not self.accumulation.traits.full_data:
            raise ValueError(
                f"{type(self.accumulation).__name__} gives an M-step a part of the data, whose "
                "objective is not that of all: climb Q, with objective=False, or use Full()."
            )

    def _slots(self) -> tuple[Any, Any, Any]:
        return self.expectation, self.accumulation, self.maximization

    @property
    def traits(self) -> Traits:
        return self.expectation.traits * self.accumulation.traits * self.maximization.traits

    def init(self, model, problem, *, key=None):
        problem = as_problem(problem, model)
        step = jnp.zeros((), jnp.int32)
        if not self.accumulation.traits.full_data and (part := local_part(model)):
            raise ValueError(
                f"{type(self.accumulation).__name__} remembers statistics of earlier models, but "
                f"those of {part} hold only near the model that they were taken about; use Full()."
            )
        if not self.expectation.traits.deterministic and (part := slope_part(model)):
            raise ValueError(
                f"{part} has the slope of Q alone, so that a step along it must be judged by "
                f"the objective, and {type(self.expectation).__name__} has none that two models "
                "share; use Exact()."
            )

        def evaluate(batch: Batch, rows: PyTree[Array], key: Any) -> Any:
            return self._evaluate(model, batch, rows, step, key)

        rows = self.expectation.init(model, problem)
        memory, statistics, log_likelihood, rows = self.accumulation.init(
            model, evaluate, problem, rows, key
        )
        objective = log_likelihood + problem.log_prior(model)
        start = self.maximization.init(model)
        return State(statistics, log_likelihood, objective, step, rows, memory, start)

    @property
    def _can_be_unstarted(self) -> bool:
        """Whether a first step differs from all others in its M-step alone."""
        plain = isinstance(self.expectation, Infer) and isinstance(self.accumulation, Full)
        return plain and isinstance(self.maximization, ClosedForm) and self.traits.exact

    def unstarted(self, model, problem, *, key=None):
        if not self._can_be_unstarted:
            return None
        problem = as_problem(problem, model)
        state = jax.eval_shape(lambda: self.init(model, problem, key=key))
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        statistics = Framed(state.statistics.sums, model)
        return replace(state, statistics=statistics, step=jnp.full((), -1, jnp.int32))

    def step(self, state, problem, *, key=None):
        if not isinstance(state, State):
            raise ValueError(f"step takes the State that init gave, got {type(state).__name__}.")
        problem = as_problem(problem, state.model)
        traits = self.traits
        if not (traits.exact and local_part(state.model)):
            return self.whole_step(state, problem, key)
        model, memory = self.maximize(state, problem, key)
        given = replace(state, maximization=memory), problem, key
        # Where the objective changes from step to step, this step's judges both ends.
        old = state if traits.monotone else self.expect(state.model, *given)
        return no_worse(self.expect, old, model, *given)

    def whole_step(self, state: State, problem: Problem, key: Array | None = None) -> State:
        """A step that is never halved: the map whose fixed points are sought."""
        model, memory = self.maximize(state, problem, key)
        return self.expect(model, replace(state, maximization=memory), problem, key)

    def finish(self, state, problem, *, key=None):
        problem = as_problem(problem, state.model)
        traits = self.traits
        if traits.exact and traits.monotone:
            return state
        model, final = state.model, self.expectation.final
        averaged = self.accumulation.averaged(state.accumulation, state.step)
        if averaged is not None:
            mean, begun = averaged
            at_mean, _ = self.maximize(replace(state, statistics=mean), problem, key)
            model = jax.tree.map(lambda a, b: jnp.where(begun, a, b), at_mean, model)
        statistics, log_likelihood, rows = final(
            model, problem, final.init(model, problem), state.step, None
        )
        objective = log_likelihood + problem.log_prior(model)
        return replace(
            state,
            statistics=statistics,
            log_likelihood=log_likelihood,
            objective=objective,
            expectation=rows,
        )

    def conclusive(self, state):
        step = state.step
        memories = (state.expectation, state.accumulation, state.maximization)
        each = [slot.conclusive(m, step) for slot, m in zip(self._slots(), memories, strict=True)]
        return each[0] & each[1] & each[2]

    def plain(self):
        return EM(self.expectation, self.accumulation, ClosedForm())

    def maximize(
        self, state: State, problem: Problem, key: Array | None = None
    ) -> tuple[AbstractModel, PyTree[Array]]:
        """The M-step alone: the next model, and what the maximization remembers."""
        _, e_step = self._batch(state, problem, key)

        def evaluate(model: AbstractModel) -> tuple[Framed, Float[Array, ""]]:
            new, log_likelihood, _ = e_step(model)
            return new, log_likelihood + problem.log_prior(model)

        statistics = problem.with_prior(state.statistics)
        model, memory = self.maximization(
            statistics, state.maximization, evaluate, problem.total_weight
        )
        model = with_frozen(model, state.model)
        if self._can_be_unstarted:
            started = state.step >= 0
            model = jax.tree.map(lambda new, old: jnp.where(started, new, old), model, state.model)
        return model, memory

    def expect(
        self, model: AbstractModel, state: State, problem: Problem, key: Array | None = None
    ) -> State:
        """The E-step alone: the state that follows `state` with this model."""
        step, e_step = self._batch(state, problem, key)
        new, log_likelihood, rows = e_step(model)
        memory, statistics, log_likelihood = self.accumulation(
            state.accumulation, new, log_likelihood, step
        )
        objective = log_likelihood + problem.log_prior(statistics.frame)
        return State(statistics, log_likelihood, objective, step, rows, memory, state.maximization)

    def _batch(
        self, state: State, problem: Problem, key: Array | None
    ) -> tuple[Array, Callable[[AbstractModel], Any]]:
        """The number of the step that follows, and the E-step on its observations."""
        select_key, key = (None, None) if key is None else jax.random.split(key)
        step = state.step + 1
        batch = self.accumulation.select(state.accumulation, problem, step, select_key)
        return step, lambda model: self._evaluate(model, batch, state.expectation, step, key)

    def _evaluate(
        self, model: AbstractModel, batch: Batch, rows: PyTree[Array], step: Array, key: Any
    ) -> tuple[Framed, Float[Array, ""], PyTree[Array]]:
        """Statistics and objective of what a batch stands for, and all rows after it."""
        at = batch.rows
        own = rows if at is None else jax.tree.map(lambda leaf: leaf[at], rows)
        new, objective, own = self.expectation(model, batch.problem, own, step, key)
        new, objective = batch.scaled(new, objective)
        if at is not None:
            own = jax.tree.map(lambda leaf, part: leaf.at[at].set(part), rows, own)
        return new, objective, own


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
    if isinstance(value, optax.GradientTransformation):
        return ": an Optax optimiser goes into maximization=Gradient(optimiser)"
    for slot, (kind, _) in _SLOTS.items():
        if isinstance(value, kind):
            return f": write {slot}={type(value).__name__}(…)"
    return ""
