"""Data that a model cannot have produced: log p = −∞, no component, and errors that say where."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import emissions as em

POISSON = em.Poisson([[2.0], [7.0]])
OUTSIDE = {
    "a category that was never seen": (em.Categorical([[[0.5, 0.5]], [[0.2, 0.8]]]), [[2]]),
    "a negative code": (em.Categorical([[[0.5, 0.5]], [[0.2, 0.8]]]), [[-1]]),
    "a bit of 2": (em.Bernoulli([[0.2], [0.7]]), [[2]]),
    "a negative count": (POISSON, [[-3]]),
    "half a count": (POISSON, [[1.5]]),
    "a negative duration": (em.Exponential([[2.0], [7.0]]), [[-1.0]]),
    "a vector of length 2": (em.VonMisesFisher([[1.0, 0.0], [0.0, 1.0]], [3.0, 3.0]), [[2.0, 0.0]]),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_outside_the_support_there_is_no_density(case):
    emission, x = OUTSIDE[case]
    mixture = jaxem.Mixture([0.5, 0.5], emission)
    x = jnp.asarray(x)
    assert mixture.log_prob(x) == -jnp.inf
    assert jnp.all(jnp.isnan(mixture.responsibilities(x)))
    assert mixture.predict(x) == -1
    hmm = jaxem.HMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], emission)
    assert hmm.log_prob(x[None]) == -jnp.inf
    path, log_prob = hmm.viterbi(x[None])
    assert path[0, 0] == -1 and log_prob[0] == -jnp.inf
    assert hmm.predict(x[None])[0, 0] == -1
    assert hmm.first_impossible(x[None]) == 0


def test_one_impossible_observation_leaves_the_others_alone():
    mixture = jaxem.Mixture([0.5, 0.5], POISSON)
    x = jnp.array([[3.0], [jnp.nan], [-1.0], [jnp.inf]])
    own = mixture.log_prob(x)
    np.testing.assert_array_equal(own[0], mixture.log_prob(x[:1])[0])
    np.testing.assert_array_equal(own[1:], [np.nan, -np.inf, -np.inf])
    np.testing.assert_array_equal(mixture.predict(x)[1:], -1)


def test_what_is_said_after_a_fit_says_where_data_are_impossible():
    mixture = jaxem.Mixture([0.5, 0.5], POISSON)
    x = jnp.array([[3.0], [6.0], [-1.0], [2.0]])
    with pytest.warns(UserWarning, match="1 of 4 observations, number 2"):
        assert jaxem.inference.bic(mixture, x) == jnp.inf
    for infer in (
        jaxem.inference.standard_errors,
        jaxem.inference.convergence_rate,
    ):
        with pytest.raises(ValueError, match="1 of 4 observations, number 2"):
            infer(mixture, x)
    weight = jnp.array([1.0, 1.0, 0.0, 1.0])
    assert jnp.isfinite(jaxem.inference.bic(mixture, x, sample_weight=weight))
