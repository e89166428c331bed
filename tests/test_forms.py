"""The expanded and the residual form of one density, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxem
from jaxem._core.parameters import replace
from jaxem._core.statistics import distance
from jaxem.emissions._base import log_prob
from jaxem.models._finite import sums_of_joint

N, K = 256, 4
FAMILIES = ("full", "tied", "diagonal", "spherical", "one diagonal", "one sphere")


def emission(family: str, mean, rng):
    """Components of unit-order scales, no two alike."""
    k, d = mean.shape
    scales = np.exp(rng.uniform(-0.7, 0.7, (k, d)))
    if family == "full":
        factor = np.tril(0.3 * rng.normal(size=(k, d, d)) / np.sqrt(d), -1)
        factor = factor + scales[:, None] * np.eye(d)
        return jaxem.emissions.Gaussian(
            mean, jnp.asarray(factor @ factor.transpose(0, 2, 1), mean.dtype)
        )
    if family == "tied":
        factor = np.tril(0.3 * rng.normal(size=(d, d)) / np.sqrt(d), -1) + np.diag(scales[0])
        return jaxem.emissions.TiedGaussian(mean, jnp.asarray(factor @ factor.T, mean.dtype))
    variance = {
        "diagonal": scales,
        "one diagonal": scales[0],
        "spherical": scales[:, 0],
        "one sphere": scales[0, 0],
    }[family]
    kind = (
        jaxem.emissions.DiagonalGaussian
        if "diagonal" in family
        else jaxem.emissions.SphericalGaussian
    )
    return kind(mean, jnp.asarray(variance, mean.dtype))


@jax.jit
def stretched(components):
    """The same components with their means as far apart as the expanded form is allowed."""

    def at(log_factor):
        return replace(components, mean=components.mean * jnp.exp(log_factor))

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        safe, _ = at(middle).expanded()
        return jnp.where(safe, middle, low), jnp.where(safe, high, middle)

    ends = jnp.zeros((), components.mean.dtype), jnp.full((), 30.0, components.mean.dtype)
    low, _ = jax.lax.fori_loop(0, 30, halve, ends)
    return at(low - 1e-4)


def problem(family: str, d: int, seed: int, dtype, *, at_limit: bool):
    """A mixture and data from it; at the limit, means as far apart as the expanded form allows."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(K, d))
    mean = jnp.asarray(mean - mean.mean(0) + (0 if at_limit else 3.0), dtype)
    components = emission(family, mean, rng)
    if at_limit:
        components = stretched(components)
    z = rng.integers(0, K, N)
    x = np.asarray(components.sample(jax.random.key(seed), jnp.asarray(z)), float)
    return jaxem.Mixture(jnp.full(K, 1 / K, dtype), components), jnp.asarray(x, dtype)


@jax.jit
def both_forms(model, x):
    """log p(x | z), statistics and log-likelihood in the two forms, and whether it is safe."""
    safe, expanded = model.components.expanded()

    def one(components):
        frozen = replace(model, components=components)
        at, exact = frozen.tilt(), jaxem.em.Exact()
        (counts, sums), value = sums_of_joint(frozen, frozen.tilted, at, x, None, exact, None)
        return log_prob(components, x), (counts, sums), value

    return safe, one(model.components), one(expanded)


def gaps(one, other):
    """Largest differences: log-likelihood and statistics, both per observation."""
    _, sums, value = one
    _, other_sums, other_value = other
    flat, other_flat = ravel_pytree(sums)[0], ravel_pytree(other_sums)[0]
    return abs(float(value - other_value)) / N, float(jnp.max(jnp.abs(flat - other_flat))) / N


@pytest.mark.parametrize(
    ("family", "d"), [("full", 1), ("full", 32), *((family, 3) for family in FAMILIES)]
)
def test_the_forms_agree_in_float64(family, d):
    model, x = problem(family, d, 0, jnp.float64, at_limit=False)
    safe, residual, expanded = both_forms(model, x)
    assert bool(safe)
    np.testing.assert_allclose(expanded[0], residual[0], rtol=1e-10, atol=1e-10)
    objective, statistics = gaps(residual, expanded)
    assert objective < 1e-10
    assert statistics < 1e-10


@pytest.mark.parametrize(
    ("family", "d"), [("full", 1), ("tied", 2), *((family, 32) for family in FAMILIES)]
)
def test_the_forms_agree_in_float32_up_to_the_limit(family, d):
    for seed in range(10):
        model, x = problem(family, d, seed, jnp.float32, at_limit=True)
        safe, residual, expanded = both_forms(model, x)
        assert bool(safe)
        objective, statistics = gaps(residual, expanded)
        assert objective < 1e-3, seed
        assert statistics < 1e-3, seed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expanded_form_is_that_of_float64(family):
    """Not only do the forms agree: at the limit the cheaper one is right."""
    for seed in range(10):
        model, x = problem(family, 8, seed, jnp.float32, at_limit=True)
        _, _, expanded = both_forms(model, x)
        exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)
        _, reference, _ = both_forms(exact, x.astype(jnp.float64))
        objective, statistics = gaps(reference, expanded)
        assert objective < 1e-3, seed
        assert statistics < 1e-3, seed


@functools.cache
def _e_step():
    """One compiled E-step, and how far it is from each form."""

    @jax.jit
    def run(model, x):
        statistics, value = model.e_step(x)
        safe, residual, expanded = both_forms(model, x)
        chosen = [
            distance(statistics, jaxem.authoring.Framed(sums, model)) + jnp.abs(value - other)
            for _, sums, other in (residual, expanded)
        ]
        return safe, *chosen

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_data_choose_the_form_inside_one_program(family, monkeypatch):
    monkeypatch.setitem(jaxem._core.blocks._BUDGET, "cpu", 1024)  # two blocks: no choice in one
    jax.clear_caches()
    rng = np.random.default_rng(0)
    run = _e_step()
    before = run._cache_size()
    for apart, expected in ((3.0, True), (1e4, False), (3.0, True)):
        mean = apart * jnp.asarray(rng.normal(size=(K, 2)), jnp.float32)
        components = emission(family, mean, rng)
        x = components.sample(jax.random.key(1), jnp.arange(N, dtype=jnp.int32) % K)
        model = jaxem.Mixture(jnp.full(K, 1 / K, jnp.float32), components)
        safe, from_residual, from_expanded = run(model, x)
        assert bool(safe) == expected
        assert float(from_expanded if expected else from_residual) < 1e-2  # of a sum of 256
        if not expected:
            assert float(from_expanded) > 1
    assert run._cache_size() == before + 1


@pytest.mark.parametrize("scale", [1e15, 1e-15, 1e18, 1e-18])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unit_of_the_data_does_not_matter(family, scale):
    """Squares of the data may overflow in float32 where whitened ones do not."""
    rng = np.random.default_rng(0)
    components = emission(family, jnp.asarray(rng.normal(size=(K, 2)), jnp.float32), rng)
    x = components.sample(jax.random.key(0), jnp.arange(N, dtype=jnp.int32) % K)
    model = jaxem.Mixture(jnp.full(K, 1 / K, jnp.float32), components)
    factor = jnp.asarray(scale, jnp.float32)
    scaled = replace(
        components,
        mean=components.mean * factor,
        structure=replace(
            components.structure,
            log_scale=components.structure.log_scale + jnp.log(factor),
            **(
                {"below": components.structure.below * factor} if family in ("full", "tied") else {}
            ),
        ),
    )
    statistics, value = model.e_step(x)
    rescaled, moved = replace(model, components=scaled).e_step(x * factor)
    np.testing.assert_allclose(moved / N, value / N - 2 * np.log(scale), atol=1e-3)
    other = jaxem.authoring.Framed(rescaled.sums, model)
    assert float(distance(other, statistics)) / N < 1e-3
