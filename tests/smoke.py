"""An installation without extras fits a mixture and an HMM: run by .ci/run, not by pytest."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxem

rng = np.random.default_rng(0)
states = np.repeat(rng.integers(0, 2, 200), 10)
counts = jnp.asarray(rng.poisson(np.array([2.0, 9.0])[states])[:, None])

poisson = jaxem.emissions.Poisson([[1.0], [5.0]])
mixture = jaxem.fit(jaxem.Mixture([0.5, 0.5], poisson), counts).model
hmm = jaxem.fit(
    jaxem.HMM([0.5, 0.5], [[0.7, 0.3], [0.3, 0.7]], poisson), counts.reshape(20, 100, 1)
).model
np.testing.assert_allclose(mixture.components.rate[:, 0], [2, 9], rtol=0.1)
np.testing.assert_allclose(hmm.emission.rate[:, 0], [2, 9], rtol=0.1)
np.testing.assert_allclose(np.diag(hmm.transition.matrix), 0.95, atol=0.02)
print(f"jaxem {jaxem.__version__} on jax {jax.__version__}, {jaxem.__file__}: fine")
