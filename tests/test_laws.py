"""The laws of CONTRIBUTING.md over every model of the registry, and that each law can fail."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, EMISSIONS, FAMILIES

import jaxem
from jaxem import Framed

LAWS = [
    "additivity over units",
    "weights count units",
    "reframing is exact",
    "Fisher's identity",
    "ascent",
    "free leaves",
    "held is not updated",
    "float32 agrees",
    "results are honest",
    "gradients are finite",
]


@pytest.mark.parametrize("name", CASES)
def test_laws_hold(name):
    case = CASES[name]()
    report = jaxem.check_model(case.model, case.data)
    assert [verdict.law for verdict in report] == LAWS
    assert report.ok, f"\n{report}"
    skipped = {verdict.law for verdict in report if verdict.verdict == "not applicable"}
    assert skipped == case.not_applicable, f"\n{report}"


# Laws that need to look inside an emission


@eqx.filter_jit
def pulled_back(emission, x, responsibilities):
    """The statistics of given responsibilities, straight from the protocol."""
    _, pullback = jax.vjp(lambda c: emission.log_prob_at(c, x), emission.coordinates())
    return emission.statistics(pullback(responsibilities)[0])


@eqx.filter_jit
def reframed(new, sums, old):
    return new.reframe(sums, old)


@eqx.filter_jit
def e_step(model, data, weights=None):
    return model.e_step(data, weights)


@eqx.filter_jit
def m_step(model, statistics):
    return model.m_step(statistics)


@eqx.filter_jit
def q(model, statistics):
    return model.expected_log_prob(statistics)


@eqx.filter_jit
def log_joint(model, data):
    at = model.components.coordinates()
    return jnp.log(model.weights) + model.components.log_prob_at(at, data)


@eqx.filter_jit
def gradient_of_q(model, statistics):
    return jax.grad(lambda m: m.expected_log_prob(statistics))(model)


@eqx.filter_jit
def map_step(state, data, prior):
    return jaxem.EM().step(state, data, prior=prior)


def close(a, b, tol=1e-10):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.max(np.abs(right))))
        np.testing.assert_allclose(left, right, rtol=0, atol=tol * scale)


@pytest.mark.parametrize("name", EMISSIONS)
def test_reframed_sums_are_those_computed_in_the_other_frame(name):
    case = CASES[name]()
    statistics, _ = e_step(case.model, case.data)
    other = m_step(case.model, statistics)
    r = case.model.responsibilities(case.data)
    here, there = case.model.components, other.components
    sums = pulled_back(here, case.data, r)
    close(statistics.sums, (jnp.sum(r, axis=0), sums))
    close(reframed(there, sums, here), pulled_back(there, case.data, r))


@pytest.mark.parametrize("name", EMISSIONS)
def test_cheaper_form_is_the_same_density(name):
    case = CASES[name]()
    emission = case.model.components
    shortcut = emission.shortcut()
    if shortcut is None:
        pytest.skip("the family has one form only")
    safe, cheaper = shortcut
    assert bool(safe)
    assert jax.tree.structure(cheaper) != jax.tree.structure(emission)
    r = case.model.responsibilities(case.data)
    close(pulled_back(cheaper, case.data, r), pulled_back(emission, case.data, r))
    density = eqx.filter_jit(lambda e: e.log_prob_at(e.coordinates(), case.data))
    close(density(cheaper), density(emission))


@pytest.mark.parametrize("name", EMISSIONS)
def test_q_is_the_expected_log_joint_in_any_frame(name):
    case = CASES[name]()
    statistics, _ = e_step(case.model, case.data)
    other = m_step(case.model, statistics)
    r = case.model.responsibilities(case.data)
    direct = jnp.sum(r * (log_joint(other, case.data) - log_joint(case.model, case.data)))
    rise = q(other, statistics) - q(case.model, statistics)
    close(rise, direct)
    assert rise > 1e-3
    elsewhere = statistics.at(other)
    assert elsewhere.frame is other
    close(q(case.model, elsewhere), q(case.model, statistics))
    close(q(other, elsewhere), q(other, statistics))
    close(q(other, 3.0 * statistics + elsewhere), 4 * q(other, statistics))


@pytest.mark.parametrize("name", FAMILIES)
def test_map_em_climbs_to_a_posterior_mode(name):
    case = CASES[name]()
    prior = case.model.prior(weights=3.0, components=case.prior)
    state = jaxem.EM().init(case.model, case.data, prior=prior)
    start = state
    for _ in range(8):
        after = map_step(state, case.data, prior)
        close(after.objective, after.log_likelihood + q(after.model, prior), 1e-12)
        assert after.objective >= state.objective - 1e-9
        state = after
    assert state.objective > start.objective + 1e-3
    # The M-step with a prior is a stationary point of Q + log-prior, and no saddle: it is above
    # the start and above what the data alone would give.
    combined = state.statistics + prior
    mode = m_step(state.model, combined)
    close(gradient_of_q(mode, combined), jax.tree.map(jnp.zeros_like, mode), 1e-9)
    ml = m_step(state.model, state.statistics)
    assert q(mode, combined) > q(ml, combined) + 1e-6


# Each law can fail


class Pair(jaxem.AbstractModel):
    """½ N(shift − 2, 1) + ½ N(shift + 2, 1): a model in a few lines, and ways to break it."""

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"shift": ("shift",)}
    shift: Any
    held: tuple = eqx.field(static=True, default=())
    broken: str = eqx.field(static=True, default="")

    def e_step(self, data, weights=None, *, posterior=jaxem.Exact(), key=None):
        w = jnp.ones(len(data), self.shift.dtype) if weights is None else weights
        x = data[:, 0]
        if self.broken != "poisoned":
            x = jnp.where(w != 0, x, 0)
        if self.broken == "digits":
            x = jnp.mod(x + 3e7, 6e7) - 3e7
        y = x - self.shift
        sides = jnp.array([-2.0, 2.0], y.dtype)
        gaps = y[:, None] - sides
        log_prob, r = posterior.marginalize(
            -0.5 * gaps**2 - jnp.log(2) - 0.5 * jnp.log(2 * jnp.pi), key
        )
        r = w[:, None] * r
        if self.broken == "average":
            r = r / len(x)
        if self.broken == "square weights":
            r = w[:, None] * r
        log_prob = jnp.where(w != 0, w * log_prob, 0)
        value = jnp.sum(log_prob)
        if self.broken == "bound":
            value = value - 0.1 * jnp.sum(w) * self.shift**2
        sums = (jnp.sum(r), jnp.sum(r * gaps), jnp.sum(r * gaps**2))
        if self.broken == "late mask":  # hides a NaN from the value, not from the derivative
            value = value + 0 * jnp.sum(jnp.where(w != 0, data[:, 0] * self.shift, 0))
        return Framed(sums, self), value

    def m_step(self, statistics):
        n, first, _ = statistics.at(self).sums
        if self.broken == "log of zero":
            return self._moved(jnp.log(jnp.zeros_like(n)))
        step = 3.0 if self.broken == "overshoots" else 1.0
        return self._moved(jnp.where(self._fixed(), 0, step * first / n))

    def _fixed(self):
        return any(name == "shift" for name, _ in self.held) and self.broken != "moves held"

    def _moved(self, step):
        return eqx.tree_at(lambda m: m.shift, self, self.shift + step)

    def reframe(self, sums, old):
        n, first, second = sums
        d = old.shift - self.shift
        if self.broken == "reframe":
            return n, first + 1.1 * n * d + first * d, second
        return n, first + n * d, second + 2 * d * first + n * d * d

    def expected_log_prob(self, statistics):
        second = statistics.at(self).sums[2]
        return -0.5 * second

    def check(self, data):
        pass

    def in_support(self, data):
        finite = jnp.isfinite(data[:, 0])
        return jnp.ones_like(finite) if self.broken == "anything goes" else finite

    def width(self, data):
        return 2

    def degenerate(self, statistics, min_variance):
        return jnp.zeros(1, bool)

    def representable(self):
        return jnp.isfinite(self.shift)


PAIR = jnp.asarray(np.random.default_rng(1).normal(size=(24, 1)) + np.array([[-1.0], [3.0]] * 12))


def verdicts(broken):
    report = jaxem.check_model(Pair(jnp.array(0.3), broken=broken), PAIR)
    return {verdict.law: verdict.verdict for verdict in report}


def test_the_unbroken_pair_obeys_every_law():
    assert verdicts("") == dict.fromkeys(LAWS, "holds")


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        ("average", "additivity over units"),
        ("square weights", "weights count units"),
        ("poisoned", "weights count units"),
        ("reframe", "reframing is exact"),
        ("bound", "Fisher's identity"),
        ("overshoots", "ascent"),
        ("log of zero", "free leaves"),
        ("moves held", "held is not updated"),
        ("digits", "float32 agrees"),
        ("anything goes", "results are honest"),
        ("late mask", "gradients are finite"),
    ],
)
def test_each_law_can_fail(broken, law):
    assert verdicts(broken)[law] == "fails"
