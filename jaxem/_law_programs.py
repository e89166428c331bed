"""What the laws compute, each a compiled program that cases of equal shapes share."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxem._core.freezing import freeze
from jaxem._core.parameters import estimates, named_parameters
from jaxem._core.statistics import Framed
from jaxem.em._em import EM
from jaxem.latents import Exact
from jaxem.models._alone import as_model, shown
from jaxem.models._base import all_finite, expected_sums

step = eqx.filter_jit(EM().step)
estimates_of = eqx.filter_jit(estimates)
is_finite = eqx.filter_jit(all_finite)
m_step = eqx.filter_jit(lambda model, statistics: model.m_step(statistics))
gradient_of_q = eqx.filter_jit(jax.grad(lambda m, statistics: m.expected_log_prob(statistics)))
score = eqx.filter_jit(jax.grad(lambda m, x, w: expected_sums(m, x, w, Exact(), None)[1]))


@eqx.filter_jit
def em_map(model: Any, data: Any, weight: Array, direction: Array) -> tuple[Array, Array]:
    """The next model's estimates, and their derivative along a direction of the weights."""

    def following(weight: Array) -> Array:
        sums, _ = expected_sums(model, data, weight, Exact(), None)
        return ravel_pytree(estimates(model.m_step(Framed(sums, model))))[0]

    return jax.jvp(following, (weight,), (direction,))


@eqx.filter_jit
def sums_of(
    model: Any, other: Any, whole: Any, first: Any, second: Any
) -> dict[str, tuple[Any, Any]]:
    """Pairs of sums that are the same, of sums of all the data and of their parts."""
    whole, first, second = (Framed(sums, model) for sums in (whole, first, second))
    there = whole.at(other)
    return {
        "of a union and of its parts": ((first + second).sums, whole.sums),
        "there and back": (there.at(model).sums, whole.sums),
        "doubled, then reframed": ((2.0 * whole).at(other).sums, (2.0 * there).sums),
    }


@eqx.filter_jit
def blend(model: Any, other: Any, share: Array) -> tuple[Any, Array]:
    """A linear combination of two models, and whether its parameters are finite."""
    between = jax.tree.map(lambda a, b: (1 - share) * a + share * b, model, other)
    return between, all_finite(named_parameters(between))


@eqx.filter_jit
def frozen_parameters(model: Any, sums: Any, names: list[str]) -> list[tuple[Any, Any]]:
    """Each parameter before and after an M-step in which it alone is frozen."""

    def of(name: str) -> tuple[Any, Any]:
        frozen = as_model(freeze(shown(model), name), "check_model")
        moved = frozen.m_step(Framed(sums, frozen))
        pair = named_parameters(shown(frozen)), named_parameters(shown(moved))
        for part in name.split("."):
            pair = pair[0][part], pair[1][part]
        return pair

    return [of(name) for name in names]


@eqx.filter_jit
def scores_of_law(family: Any, key: Array, z: Array) -> tuple[Any, Array, Any]:
    """The slope of Q at what is expected, whether draws are possible, moments of their score."""
    expected, x = family.expected(), family.sample(key, z)
    slope = jax.grad(lambda f: f.expected_log_prob(f.reframe(expected, family)))(family)

    def log_prob(family: Any, x: Array, z: Array) -> Array:
        return family.log_prob(x[None], family.tilt())[0, z]

    scores = jax.vmap(jax.grad(log_prob), in_axes=(None, 0, 0))(family, x, z)
    moments = [(jnp.mean(s, axis=0), jnp.std(s, axis=0)) for s in jax.tree.leaves(scores)]
    return slope, jnp.all(family.in_support(x)), moments
