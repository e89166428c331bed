"""The expectation slot: under which posterior, step by step, an algorithm infers the latent.

A posterior, such as `Exact()` or `Hard()`, is the same at every step; a temperature that falls, or
a number of draws that grows, depends on the step.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.checks import is_integer
from jaxem._core.schedules import AbstractSchedule, Geometric
from jaxem._core.statistics import Framed
from jaxem.em._problem import Problem
from jaxem.em._sharding import sums_on_shards
from jaxem.em._traits import AbstractSlot, Traits
from jaxem.latents import AbstractPosterior, Drawn, Exact, Tempered
from jaxem.models._base import AbstractModel, expected_sums


class AbstractExpectation(AbstractSlot):
    """The E-step of an algorithm."""

    @property
    @abc.abstractmethod
    def final(self) -> "AbstractExpectation":
        """The E-step of the full pass that ends a fit: self, unless that is random or changes."""

    @abc.abstractmethod
    def init(self, model: AbstractModel, problem: Problem) -> PyTree[Array]:
        """The memory before the first step: arrays with one row for each observation, or None."""

    @abc.abstractmethod
    def __call__(
        self,
        model: AbstractModel,
        problem: Problem,
        memory: PyTree[Array],
        step: Int[Array, ""],
        key: Array | None,
    ) -> tuple[Framed, Float[Array, ""], PyTree[Array]]:
        """Statistics about `model`, the objective they belong to, and the memory after this step.

        `problem` and `memory` hold the observations of this step.
        """


class Infer(AbstractExpectation):
    """The E-step under one posterior, the same at every step; `EM(Hard())` is `EM(Infer(Hard()))`.

    **Arguments:** `posterior`, such as `Exact()`, `Hard()` or `Tempered(2.0)`.
    """

    posterior: AbstractPosterior = Exact()

    @property
    def traits(self) -> Traits:
        fixed = not isinstance(self.posterior, Drawn)
        return Traits(monotone=fixed, deterministic=fixed, stationary=fixed)

    @property
    def final(self) -> AbstractExpectation:
        return self if self.traits.deterministic else Infer(Exact())

    def init(self, model, problem):
        return None

    def __call__(self, model, problem, memory, step, key):
        return *infer(model, problem, self.posterior, key), memory

    def conclusive(self, memory, step):
        return self.traits.deterministic


def infer(
    model: AbstractModel, problem: Problem, posterior: AbstractPosterior, key: Array | None
) -> tuple[Framed, Float[Array, ""]]:
    """The model's E-step on a problem: statistics about the model, and the log-likelihood."""
    given = model, problem.data, problem.sample_weight, posterior, key
    shards = problem.shards
    sums, value = expected_sums(*given) if shards is None else sums_on_shards(shards, *given)
    return Framed(sums, model), value


def as_expectation(value: Any) -> Any:
    """A posterior as the E-step under it; all else as it is."""
    return Infer(value) if isinstance(value, AbstractPosterior) else value


class Annealed(AbstractExpectation):
    """Deterministic annealing: the posterior at a temperature that falls to 1.

    A fit converges at temperature 1 only. Where the temperature is high, components coincide, and
    as it falls they separate by what is left of their differences: begin a little above the
    temperature at which they separate, not far above it, where no difference is left. Between
    Gaussians whose scales are frozen that is the largest variance of the data in units of theirs.
    Components that still coincide at the end are at a saddle, which `convergence_rate` finds.

    **Arguments:** `temperature`, a schedule that ends at 1; default: from 5 by a factor of 0.9.

    **Raises:** `ValueError` for something else than such a schedule.

    Ueda & Nakano (1998), Neural Networks 11.
    """

    temperature: AbstractSchedule = Geometric(5.0, 0.9)

    def __check_init__(self):
        schedule = self.temperature
        if not isinstance(schedule, AbstractSchedule) or schedule.known_at(2**30) != 1:
            raise ValueError(
                f"Annealed takes a schedule that ends at 1, such as Geometric(5.0, 0.9), got "
                f"{schedule!r}; for one temperature throughout, write EM(Tempered(2.0))."
            )

    @property
    def traits(self) -> Traits:
        return Traits(monotone=False)

    @property
    def final(self):
        return Infer(Exact())

    def init(self, model, problem):
        return None

    def __call__(self, model, problem, memory, step, key):
        return *infer(model, problem, Tempered(self.temperature(step)), key), memory

    def conclusive(self, memory, step):
        return self.temperature(step) == 1


class Sampled(AbstractExpectation):
    """Draws of the latent in place of its posterior: stochastic and Monte-Carlo EM.

    With one draw this is SEM; with a number that grows it is Monte-Carlo EM; with `Online` as
    accumulation, SAEM. The objective is the log-likelihood of the model that was drawn from.

    **Arguments:** `num_draws`, averaged at each step, a number or a schedule that is rounded up.
    Each draw costs an E-step. Needs the `key` of `fit`.

    **Raises:** `ValueError` for less than one draw, or without a key.

    Celeux & Diebolt (1985), Comp. Stat. Quarterly 2; Wei & Tanner (1990), JASA 85; Delyon, Lavielle
    & Moulines (1999), Ann. Stat. 27.
    """

    num_draws: int | AbstractSchedule = eqx.field(static=True, default=1)

    def __check_init__(self):
        draws = self.num_draws
        counted = is_integer(draws) and draws >= 1
        grows = isinstance(draws, AbstractSchedule) and draws.known_at(1) > 0
        if not (counted or grows):
            raise ValueError(
                f"Sampled takes a number of draws ≥ 1, or a schedule of them; got {draws!r}."
            )

    @property
    def traits(self) -> Traits:
        return Traits(monotone=False, deterministic=False, stationary=False)

    @property
    def final(self):
        return Infer(Exact())

    def init(self, model, problem):
        return None

    def __call__(self, model, problem, memory, step, key):
        if key is None:
            raise ValueError("Sampled draws at random: give fit (or init and step) a key.")

        def draw(number: Any) -> tuple[Framed, Array]:
            return infer(model, problem, Drawn(), jax.random.fold_in(key, number))

        first, objective = draw(0)
        if self.num_draws == 1:
            return first, objective, memory
        draws = self.num_draws
        fixed = not isinstance(draws, AbstractSchedule)
        most = draws if fixed else jnp.ceil(draws(step)).astype(jnp.int32)

        def add(number: Any, total: PyTree[Array]) -> PyTree[Array]:
            return jax.tree.map(jnp.add, total, draw(number)[0].sums)

        sums = jax.lax.fori_loop(1, most, add, first.sums)
        mean = jax.tree.map(lambda leaf: leaf / most, sums)
        return Framed(mean, first.frame), objective, memory

    def conclusive(self, memory, step):
        return False
