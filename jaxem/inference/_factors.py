"""How many factors: the test of sufficiency, and parallel analysis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxem._core.blocks import weighted_mean, weighted_second_moments
from jaxem._core.checks import check_continuous, checked_key
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import as_float
from jaxem.em._solution import Solution
from jaxem.emissions._factor_base import AbstractFactorModel
from jaxem.inference._fitted import possible_problem
from jaxem.models._alone import Alone, shown


class FactorTest(NamedTuple):
    """The test of q factors against any covariance.

    - `discrepancy` F = log|Σ| + tr S Σ⁻¹ − log|S| − d, at the maximum of the likelihood.
    - `statistic`: (n − 1 − (2 d + 5)/6 − 2 q/3) F, about χ² of `dof` degrees of freedom where q
      factors suffice (Bartlett's correction).
    - `p_value`: the probability of a larger one; NaN without degrees of freedom.
    - `rmsea`: √max(F/dof − 1/(n − 1), 0); 0.05 or less is a close fit.
    """

    discrepancy: Float[Array, ""]
    statistic: Float[Array, ""]
    dof: int
    p_value: Float[Array, ""]
    rmsea: Float[Array, ""]


def factor_test(
    fitted: Solution | Any, x: Float[Array, "n d"], *, sample_weight: Array | None = None
) -> FactorTest:
    """Whether the factors of a fitted `FactorAnalysis` suffice.

    **Arguments:** a solution or an emission of one component; the data and weights that it was
    fitted to, those of `emissions.from_moments` for example.

    **Raises:** `ValueError` for another model.

    Bartlett (1950), Br. J. Psychol. Stat. 3; Steiger (1990), Multivar. Behav. Res. 25.
    """
    model, problem = possible_problem(fitted, x, sample_weight, None)
    if not isinstance(model, Alone) or not isinstance(shown(model), AbstractFactorModel):
        raise ValueError(
            "factor_test expects a FactorAnalysis or PPCA of one component, got "
            f"{type(shown(model)).__name__}."
        )
    emission, x = model.emission, problem.data
    weight = problem.sample_weight
    weight = jnp.ones(len(x), x.dtype) if weight is None else weight
    n, (d, q) = jnp.sum(weight), emission.loadings.shape[1:]
    log_likelihood = weight @ model.log_prob(x)
    unit, second = weighted_second_moments(x, weighted_mean(x, weight), weight)
    log_det = jnp.linalg.slogdet(second)[1] + 2 * jnp.sum(jnp.log(unit))
    saturated = -0.5 * n * (d * jnp.log(2 * jnp.pi) + log_det + d)
    discrepancy = 2 * (saturated - log_likelihood) / n
    statistic = (n - 1 - (2 * d + 5) / 6 - 2 * q / 3) * discrepancy
    total = d * (d + 1) // 2
    dof = total - (emission.num_free_parameters - d)
    known = dof > 0
    p_value = (
        jax.scipy.stats.chi2.sf(statistic, dof) if known else jnp.full_like(statistic, jnp.nan)
    )
    excess = discrepancy / dof - 1 / (n - 1) if known else jnp.full_like(statistic, jnp.nan)
    return FactorTest(discrepancy, statistic, dof, p_value, jnp.sqrt(jnp.maximum(excess, 0)))


class ParallelAnalysis(NamedTuple):
    """Eigenvalues of the correlations of data, and those that data without factors would have.

    - `eigenvalues` (d,), largest first.
    - `thresholds` (d,): the quantile of each among independent normal data of the same size.
    - `num_factors`: how many of the first eigenvalues are above their thresholds.
    """

    eigenvalues: Float[Array, " d"]
    thresholds: Float[Array, " d"]
    num_factors: Int[Array, ""]


def parallel_analysis(
    key: Array, x: Float[Array, "n d"], *, num_draws: int = 100, quantile: float = 0.95
) -> ParallelAnalysis:
    """The number of factors, by comparison with data that have none.

    **Arguments:** `num_draws` data sets of independent normal numbers; `quantile` of their
    eigenvalues, between 0 and 1.

    Horn (1965), Psychometrika 30.
    """
    key, x = checked_key(key), as_float(as_arrays(x))
    check_continuous(x, x.shape[-1], x.dtype, "parallel_analysis")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie strictly between 0 and 1, got {quantile!r}.")

    def draw(key: Array) -> Array:
        return _eigenvalues(jax.random.normal(key, x.shape, x.dtype))

    eigenvalues = _eigenvalues(x)
    thresholds = jnp.quantile(lax.map(draw, jax.random.split(key, num_draws)), quantile, axis=0)
    above = jnp.cumprod((eigenvalues > thresholds).astype(int))
    return ParallelAnalysis(eigenvalues, thresholds, jnp.sum(above))


def _eigenvalues(x: Float[Array, "n d"]) -> Float[Array, " d"]:
    return jnp.linalg.eigvalsh(jnp.corrcoef(x, rowvar=False))[::-1]
