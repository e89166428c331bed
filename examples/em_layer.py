"""EM as a layer: an embedding trained through the mixture that is fitted to it.

Each episode sees ten classes of digits with three labelled images of each and many without label.
A small network embeds all of them; ten spheres start at the labelled means and are fitted by EM to
the whole episode, inside the forward pass; the loss is how badly the fitted mixture then
classifies other images. Its gradient goes back through the fit, by the implicit function theorem,
into the network. Run `python examples/em_layer.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxem

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = images[order].astype(np.float32) / 16, labels[order]
LABELLED, UNLABELLED, QUERIES = 3, 20, 15


def episode(rng, start, stop):
    """Images of every class: labelled, without label, and to be classified; (10, …, 64)."""
    size = LABELLED + UNLABELLED + QUERIES
    rows = [
        start + rng.permutation(np.flatnonzero(labels[start:stop] == c))[:size] for c in range(10)
    ]
    return np.split(images[np.array(rows)], [LABELLED, LABELLED + UNLABELLED], axis=1)


def log_posteriors(network, labelled, unlabelled, queries):
    """log P(class | image) of the queries, under a mixture fitted to all embeddings."""
    embed = jax.vmap(network)
    known = embed(labelled.reshape(-1, 64)).reshape(10, LABELLED, -1)
    others = embed(jnp.concatenate([unlabelled, queries], axis=1).reshape(-1, 64))
    spheres = jaxem.emissions.SphericalGaussian(
        jnp.mean(known, axis=1), jnp.mean(jnp.var(others, axis=0))
    )
    start = jaxem.freeze(jaxem.Mixture(jnp.full(10, 0.1), spheres), "weights")
    observations = jnp.concatenate([known.reshape(30, -1), others])
    fitted = jaxem.fit(start, observations, max_steps=50, throw=False).model
    return jnp.log(1e-6 + fitted.responsibilities(embed(queries.reshape(-1, 64))))


truth = np.repeat(np.arange(10), QUERIES)


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss(network, batch):
    return -jnp.mean(log_posteriors(network, *batch)[np.arange(len(truth)), truth])


@eqx.filter_jit
def accuracy(network, batch):
    return jnp.mean(jnp.argmax(log_posteriors(network, *batch), axis=1) == truth)


def mean_accuracy(network):
    rng = np.random.default_rng(1)
    return np.mean([accuracy(network, episode(rng, 1200, len(labels))) for _ in range(10)])


network = eqx.nn.MLP(64, 8, 64, 1, key=jax.random.key(0))
optimiser = optax.adam(3e-3)
state = optimiser.init(eqx.filter(network, eqx.is_array))
print(f"accuracy on images never trained on: {mean_accuracy(network):.3f} before training")
rng = np.random.default_rng(0)
for i in range(151):
    value, gradient = loss(network, episode(rng, 0, 1200))
    updates, state = optimiser.update(gradient, state)
    network = eqx.apply_updates(network, updates)
    if i % 50 == 0:
        print(f"episode {i:4d}   loss {value:.4f}")
print(f"accuracy on images never trained on: {mean_accuracy(network):.3f} after it")
