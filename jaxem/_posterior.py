"""The expectation slot: which posterior of the latent the E-step uses.

For a finite latent the variant of EM *is* the marginaliser of the log-joint: with
log p(x) = M(log p(x, z=1), …, log p(x, z=K)) the responsibilities are the gradient of M.
logsumexp gives EM, the maximum gives hard (classification) EM.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem import chain
from jaxem._checks import check_values
from jaxem._schedules import AbstractSchedule, Geometric
from jaxem._statistics import Framed


class AbstractExpectation(eqx.Module):
    """The E-step of an algorithm.

    `ascends` says whether, with full data and a maximising M-step, its objective never falls;
    `deterministic`, whether statistics and objective are functions of model and data alone.
    """

    ascends: eqx.AbstractVar[bool]
    deterministic: eqx.AbstractVar[bool]

    @property
    @abc.abstractmethod
    def closing(self) -> "AbstractExpectation":
        """What the exact pass that ends a fit uses: self, unless that is random or changes."""

    @abc.abstractmethod
    def __call__(
        self, model: Any, data: PyTree[Array], weights: Any, step: Int[Array, ""], key: Any
    ) -> tuple[Framed, Float[Array, ""]]:
        """Statistics of the data about `model`, and the objective they belong to."""

    @abc.abstractmethod
    def settles(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether a step that hardly moves can mean that the fit has converged."""


class AbstractPosterior(AbstractExpectation):
    """An expectation given by a posterior over a finite latent."""

    @abc.abstractmethod
    def marginalize(
        self, log_joint: Float[Array, "n k"], key: Any
    ) -> tuple[Float[Array, " n"], Float[Array, "n k"]]:
        """Log-probability and responsibilities of each unit from log p(x, z)."""

    @abc.abstractmethod
    def marginalize_chain(
        self,
        initial: Float[Array, " k"],
        transition: Array,
        log_prob: Float[Array, "t k"],
        length: Int[Array, ""] | None,
        key: Any,
        *,
        parallel: bool | None = None,
    ) -> chain.Smoothed:
        """Log-probability and responsibilities of the states of one chain, as in `jaxem.chain`."""


class Exact(AbstractPosterior):
    """The exact posterior p(z | x): expectation–maximisation proper.

    Dempster, Laird & Rubin (1977), JRSS B 39.
    """

    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    @property
    def closing(self):
        return self

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def settles(self, step):
        return True

    def marginalize(self, log_joint, key=None):
        # Components lead inside: reductions then run along units, which vectorises.
        log_joint = log_joint.T
        top = jax.lax.stop_gradient(jnp.max(log_joint, axis=0))
        top = jnp.where(jnp.isfinite(top), top, 0)
        scaled = jnp.exp(log_joint - top)
        total = jnp.sum(scaled, axis=0)
        return top + jnp.log(total), (scaled / total).T

    def marginalize_chain(self, initial, transition, log_prob, length, key, *, parallel=None):
        return chain.smoothing(initial, transition, log_prob, parallel=parallel)


class Hard(AbstractPosterior):
    """All mass on the most probable latent, the first one among equals.

    Classification EM (Celeux & Govaert 1992) and, on spheres of one held scale, Lloyd's
    k-means. The objective is the classification log-likelihood Σᵢ maxₖ log p(xᵢ, z=k).
    """

    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    @property
    def closing(self):
        return self

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def settles(self, step):
        return True

    def marginalize(self, log_joint, key=None):
        log_joint = log_joint.T
        first = jnp.argmax(log_joint, axis=0)
        components = jnp.arange(log_joint.shape[0], dtype=first.dtype)[:, None]
        return jnp.max(log_joint, axis=0), (components == first).astype(log_joint.dtype).T

    def marginalize_chain(self, initial, transition, log_prob, length, key, *, parallel=None):
        paths, value = chain.viterbi(initial, transition, log_prob, length=length)
        return chain.along(paths[0], value[0], transition)


class Tempered(AbstractPosterior):
    """The posterior at a temperature T, p(z | x)^(1/T): flatter where T > 1, sharper below.

    Its objective is the free energy T Σ log Σₖ p(x, z = k)^(1/T).

    **Arguments:** `temperature`, positive.

    **Raises:** `ValueError` for one that is not.
    """

    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    temperature: Float[Array, ""] | float

    def __check_init__(self):
        check_values(jnp.asarray(self.temperature) > 0, "a temperature must be positive.")

    @property
    def closing(self):
        return self

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def settles(self, step):
        return True

    def marginalize(self, log_joint, key=None):
        temperature = jnp.asarray(self.temperature, log_joint.dtype)
        log_prob, responsibilities = Exact().marginalize(log_joint / temperature)
        return temperature * log_prob, responsibilities

    def marginalize_chain(self, initial, transition, log_prob, length, key, *, parallel=None):
        # With its rows normalised the tempered chain is one, if what a row summed to goes to
        # the state that is left there.
        temperature = jnp.asarray(self.temperature, log_prob.dtype)
        start, moves = _root(initial, temperature), _root(transition, temperature)
        total, totals = jnp.sum(start), jnp.sum(moves, axis=-1)
        steps = jnp.arange(len(log_prob))
        left = (steps < (len(log_prob) if length is None else length) - 1)[:, None]
        tempered = log_prob / temperature + jnp.where(left, jnp.log(totals), 0)
        chances = moves / totals[..., None]
        found = chain.smoothing(start / total, chances, tempered, parallel=parallel)
        ratio = jnp.where(transition > 0, chances / jnp.where(transition > 0, transition, 1), 0)
        value = temperature * (found.log_likelihood + jnp.log(total))
        return found._replace(log_likelihood=value, ratio=ratio)


def _root(probability: Array, order: Any) -> Array:
    """probability^(1/order), with zeros that have a finite derivative."""
    positive = probability > 0
    return jnp.where(positive, jnp.where(positive, probability, 1) ** (1 / order), 0)


class Annealed(AbstractExpectation):
    """Deterministic annealing: the posterior at a temperature that falls to 1.

    A fit converges at temperature 1 only. Where it is hot enough, components fall together, and
    when it cools they part again by what is left of their differences: begin a little above the
    temperature at which they part, not far above it, where nothing is left. Between Gaussians
    whose scales are held that is the largest variance of the data in units of theirs. Components
    that still coincide at the end are at a saddle, which `convergence_rate` finds.

    **Arguments:** `temperature`, a schedule that ends at 1; default: from 5 by a factor of 0.9.

    **Raises:** `ValueError` for something else than such a schedule.

    Ueda & Nakano (1998), Neural Networks 11.
    """

    ascends: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    temperature: AbstractSchedule = Geometric(5.0, 0.9)

    def __check_init__(self):
        schedule = self.temperature
        if not isinstance(schedule, AbstractSchedule) or schedule.known_at(2**30) != 1:
            raise ValueError(
                f"Annealed takes a schedule that ends at 1, such as Geometric(5.0, 0.9), got "
                f"{schedule!r}; for one temperature throughout, write EM(Tempered(2.0))."
            )

    @property
    def closing(self):
        return Exact()

    def __call__(self, model, data, weights, step, key):
        posterior = Tempered(self.temperature(step))
        return model.e_step(data, weights, posterior=posterior, key=key)

    def settles(self, step):
        return self.temperature(step) == 1


class _OneDraw(AbstractPosterior):
    """All mass on one latent that is drawn from the exact posterior."""

    ascends: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False

    @property
    def closing(self):
        return Exact()

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def settles(self, step):
        return False

    def marginalize(self, log_joint, key):
        log_prob, _ = Exact().marginalize(log_joint)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_joint), axis=1)
        return log_prob, jax.nn.one_hot(drawn, log_joint.shape[1], dtype=log_joint.dtype)

    def marginalize_chain(self, initial, transition, log_prob, length, key, *, parallel=None):
        forward = chain.filtering(initial, transition, log_prob, parallel=parallel)
        path = chain.sample_path(key, jax.lax.stop_gradient(forward.filtered), transition)
        return chain.along(path, forward.log_likelihood, transition)


class Sampled(AbstractExpectation):
    """Draws of the latent in place of its posterior: stochastic and Monte-Carlo EM.

    With one draw this is SEM; with a number that grows it is Monte-Carlo EM; with `Running` as
    accumulation, SAEM. The objective is the log-likelihood of the model that was drawn from.

    **Arguments:** `num_draws`, averaged at each step, a number or a schedule that is rounded up.
    Each draw costs an E-step. Needs the `key` of `fit`.

    **Raises:** `ValueError` for less than one draw, or without a key.

    Celeux & Diebolt (1985), Comp. Stat. Quarterly 2; Wei & Tanner (1990), JASA 85; Delyon, Lavielle
    & Moulines (1999), Ann. Stat. 27.
    """

    ascends: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False
    num_draws: int | AbstractSchedule = eqx.field(static=True, default=1)

    def __check_init__(self):
        draws = self.num_draws
        counted = isinstance(draws, int) and not isinstance(draws, bool) and draws >= 1
        grows = isinstance(draws, AbstractSchedule) and draws.known_at(1) > 0
        if not (counted or grows):
            raise ValueError(
                f"Sampled takes a number of draws ≥ 1, or a schedule of them; got {draws!r}."
            )

    @property
    def closing(self):
        return Exact()

    def __call__(self, model, data, weights, step, key):
        if key is None:
            raise ValueError("Sampled draws at random: give fit (or init and step) a key.")
        posterior = _OneDraw()

        def draw(number: Any) -> tuple[Framed, Array]:
            own = jax.random.fold_in(key, number)
            return model.e_step(data, weights, posterior=posterior, key=own)

        if self.num_draws == 1:
            return draw(0)
        draws = self.num_draws
        most = draws if isinstance(draws, int) else jnp.ceil(draws(step)).astype(jnp.int32)
        first, objective = draw(0)
        add = lambda number, total: jax.tree.map(jnp.add, total, draw(number)[0].sums)  # noqa: E731
        sums = jax.lax.fori_loop(1, most, add, first.sums)
        return Framed(jax.tree.map(lambda leaf: leaf / most, sums), first.frame), objective

    def settles(self, step):
        return False
