"""How strong should a prior be? Gradient descent on the validation likelihood.

Three Gaussians are fitted to 40 eruptions of Old Faithful, with a conjugate prior that pulls each
covariance towards that of the whole: worth as many observations as its strength says. The
derivative of the likelihood of held-out eruptions passes through the fit by the implicit function
theorem, at the cost of one linear solve. Run `python examples/prior_strength.py`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxem

jax.config.update("jax_enable_x64", True)
data = pathlib.Path(__file__).parent / "data" / "faithful.csv"
x = np.loadtxt(data, delimiter=",", skiprows=1)
x = np.random.default_rng(0).permutation((x - x.mean(axis=0)) / x.std(axis=0))
train, validation, test = jnp.asarray(x[:40]), jnp.asarray(x[40:140]), jnp.asarray(x[140:])
start = jaxem.Mixture.init(jax.random.key(0), train, 3, jaxem.emissions.Gaussian)


def fitted(log_strength):
    pull = start.components.prior(
        {"covariance": jnp.exp(log_strength)}, covariance=jnp.cov(train.T)
    )
    return jaxem.fit(start, train, prior=start.prior(components=pull), throw=False)


@jax.jit
@jax.value_and_grad
def loss(log_strength):
    return -jnp.mean(fitted(log_strength).model.log_prob(validation))


log_strength = jnp.asarray(0.0)
optimiser = optax.adam(0.1)
state = optimiser.init(log_strength)
print("iteration   strength (observations)   validation loss   slope")
for i in range(31):
    value, slope = loss(log_strength)
    if i % 5 == 0:
        print(f"{i:9d}{jnp.exp(log_strength):19.3f}{value:18.5f}{slope:8.4f}")
    update, state = optimiser.update(slope, state)
    log_strength = optax.apply_updates(log_strength, update)

h = 1e-4
difference = (loss(log_strength + h)[0] - loss(log_strength - h)[0]) / (2 * h)
print(f"\nslope there {loss(log_strength)[1]:.6f}, by refitting twice {difference:.6f}")

weak, chosen = (fitted(s).model.log_prob(test).mean() for s in (jnp.log(0.01), log_strength))
print(f"test log-likelihood per eruption: {weak:.4f} with hardly any prior, {chosen:.4f} with it")
