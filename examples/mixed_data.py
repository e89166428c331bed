"""Counts, categories and a continuous score in one mixture: 915 doctoral students of biochemistry.

A latent class model in which each group of columns has a family of its own. Priors keep the
probabilities off 0 and 1, weights hold students out, and freezing tests a hypothesis.
Run `python examples/mixed_data.py`. The data are those of Long (1990), Social Forces 68.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxem
from jaxem.emissions import Categorical, Gaussian, Independent, Poisson

jax.config.update("jax_enable_x64", True)
path = pathlib.Path(__file__).parent / "data" / "bioChemists.csv"
table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
prestige = jnp.asarray(table["phd"])[:, None]  # of the department, 0.75 to 4.62
counts = jnp.stack([jnp.asarray(table[name]) for name in ("art", "ment", "kid5")], axis=1)
codes = jnp.asarray(np.stack([table["fem"] == "Women", table["mar"] == "Married"], 1).astype(int))
students = (prestige, counts, codes)
n = len(prestige)
fitted = jnp.ones(n).at[::5].set(0)  # every fifth student is held out: weight 0 is absence

binary = functools.partial(Categorical, num_categories=2)
family = functools.partial(Independent, families=(Gaussian, Poisson, binary))
init, key = jaxem.Mixture.init, jax.random.key(0)
model = init(key, students, 3, family, sample_weight=fitted)
gaussian, poisson, categorical = model.components.parts
prior = model.prior(
    weights=3.0,
    components=model.components.prior(
        gaussian.prior({"covariance": 4.0}, covariance=[[1.0]]),
        poisson.prior(0.5, rate=1.0),
        categorical.prior(2.0, probability=0.5),
    ),
)
free = jaxem.fit_best(
    init, key, students, 3, family, num_starts=20, sample_weight=fitted, prior=prior
)
gaussian, poisson, categorical = free.model.components.parts

print("class   share   prestige   articles   by the mentor   young children   women   married")
for k in jnp.argsort(poisson.rate[:, 0]):
    articles, mentor, children = poisson.rate[k]
    women, married = categorical.probability[k, :, 1]
    print(
        f"{k:5d}{free.model.weights[k]:8.0%}{gaussian.mean[k, 0]:11.2f}{articles:11.2f}"
        f"{mentor:16.2f}{children:17.2f}{women:8.0%}{married:10.0%}"
    )

# Do the classes differ in sex and marriage at all? Hold these at what they are for everybody.
share = jnp.average(jax.nn.one_hot(codes, 2), axis=0, weights=fitted)
alike = Independent((gaussian, poisson, Categorical(jnp.broadcast_to(share, (3, 2, 2)))))
null = jaxem.freeze(jaxem.Mixture(free.model.weights, alike), "components.parts.2.probability")
frozen = jaxem.fit(null, students, sample_weight=fitted, prior=prior)

print("\nclasses differ in sex and marriage   log-likelihood      BIC   held-out students, each")
for answer, fit in (("yes", free), ("no", frozen)):
    outside = fit.model.log_prob(students)[fitted == 0].mean()
    bic = jaxem.inference.bic(fit, students, sample_weight=fitted)
    print(f"{answer:>34s}{fit.log_likelihood:17.2f}{bic:9.1f}{outside:26.4f}")
