"""The laws of CONTRIBUTING.md over every model of the registry, and that each law can fail."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, POINTS, cases

import jaxem
from jaxem import _laws
from jaxem._core.blocks import sum_over_observations
from jaxem.authoring import Framed
from jaxem.emissions._base import expanded_form

LAWS = [
    "additivity",
    "Fisher's identity",
    "ascent",
    "free leaves",
    "frozen is not updated",
    "float32 agrees",
    "honest results",
    "tolerance and derivatives",
    "compile once",
    "memory",
]


OF_FITS = {"float32 agrees", "honest results", "tolerance and derivatives", "compile once"}


@pytest.mark.parametrize("name", cases("mechanism"))
def test_laws_hold(name):
    case = CASES[name]()
    report = jaxem.testing.check_model(case.model, case.data)
    assert [verdict.law for verdict in report] == LAWS
    found = {verdict: set() for verdict in ("holds", "fails", "not applicable")}
    for verdict in report:
        found[verdict.verdict].add(verdict.law)
    assert found["fails"] <= case.may_break, f"\n{report}"
    assert found["not applicable"] == case.not_applicable, f"\n{report}"


@pytest.mark.parametrize("name", [name for name in CASES if name not in cases("mechanism")])
def test_laws_hold_that_need_no_fit(name):
    """Of what is built like one of the above: what it can break by itself."""
    case = CASES[name]()
    for law in LAWS:
        if law not in OF_FITS | case.may_break:
            _laws.LAWS[law](case.model, case.data, 1e-9)


# Laws that need to look inside an emission


@eqx.filter_jit
def pulled_back(emission, x, responsibilities):
    """The statistics of given responsibilities, straight from the protocol."""
    _, pullback = jax.vjp(lambda tilt: emission.log_prob(x, tilt), emission.tilt())
    return pullback(responsibilities)[0]


@eqx.filter_jit
def reframed(new, sums, old):
    return new.reframe(sums, old)


@eqx.filter_jit
def e_step(model, data, sample_weight=None):
    return model.e_step(data, sample_weight)


@eqx.filter_jit
def m_step(model, statistics):
    return model.m_step(statistics)


@eqx.filter_jit
def q(model, statistics):
    return model.expected_log_prob(statistics)


@eqx.filter_jit
def log_joint(model, data):
    components = model.components
    return jnp.log(model.weights) + components.log_prob(data, components.tilt())


@eqx.filter_jit
def gradient_of_q(model, statistics):
    return jax.grad(lambda m: m.expected_log_prob(statistics))(model)


@eqx.filter_jit
def map_step(state, data, prior):
    return jaxem.EM().step(state, jaxem.em.Problem(data, prior=prior))


def close(a, b, tol=1e-10):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.max(np.abs(right))))
        np.testing.assert_allclose(left, right, rtol=0, atol=tol * scale)


@pytest.mark.parametrize("name", cases("closed"))
def test_reframed_sums_are_those_computed_in_the_other_frame(name):
    case = CASES[name]()
    statistics, _ = e_step(case.model, case.data)
    other = m_step(case.model, statistics)
    r = case.model.responsibilities(case.data)
    here, there = case.model.components, other.components
    sums = pulled_back(here, case.data, r)
    close(statistics.sums, (jnp.sum(r, axis=0), sums))
    close(reframed(there, sums, here), pulled_back(there, case.data, r))


@pytest.mark.parametrize("name", cases("expanded"))
def test_cheaper_form_is_the_same_density(name):
    case = CASES[name]()
    emission = case.model.components
    safe, cheaper = expanded_form(emission)
    assert bool(safe)
    assert jax.tree.structure(cheaper) != jax.tree.structure(emission)
    r = case.model.responsibilities(case.data)
    close(pulled_back(cheaper, case.data, r), pulled_back(emission, case.data, r))
    density = eqx.filter_jit(lambda e: e.log_prob(case.data, e.tilt()))
    close(density(cheaper), density(emission))


@pytest.mark.parametrize("name", cases("closed"))
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


@pytest.mark.parametrize(
    "name", cases("closed", "mechanism") + cases("regression") + cases("nested")
)
def test_map_em_climbs_to_a_posterior_mode(name):
    case = CASES[name]()
    prior = case.model.prior(weights=4.0, components=case.prior)
    state = jaxem.EM().init(case.model, jaxem.em.Problem(case.data, prior=prior))
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


class Pair(jaxem.models.AbstractModel, jaxem.authoring.Parametrized):
    """½ N(shift − 2, 1) + ½ N(shift + 2, 1): a model in a few lines, and ways to break it."""

    parameters: ClassVar = {"shift": jaxem.authoring.real("shift", "")}
    shift: Any
    frozen: tuple = eqx.field(static=True)
    broken: str = eqx.field(static=True)
    setting: Any = eqx.field(static=True)

    def __init__(self, shift, broken="", setting=None):
        self.shift, self.frozen, self.broken, self.setting = shift, (), broken, setting

    def expected_sums(self, data, sample_weight, posterior, key):
        def block(x, w, _):
            return self._block(
                x[:, 0], jnp.ones(len(x), x.dtype) if w is None else w.astype(x.dtype)
            )

        if self.broken == "all at once":
            return block(data, sample_weight, None)
        sums, value = sum_over_observations(block, data, sample_weight, width=2)
        if self.broken == "average":
            sums = jax.tree.map(lambda leaf: leaf / len(data), sums)
        return sums, value

    def _block(self, x, w):
        spoilt = x
        if self.broken != "poisoned":
            x = jnp.where(w != 0, x, 0)
        if self.broken == "digits":
            x = jnp.mod(x + 3e7, 6e7) - 3e7
        gaps = (x - self.shift)[:, None] - jnp.array([-2.0, 2.0], x.dtype)
        joint = -0.5 * gaps**2 - jnp.log(2) - 0.5 * jnp.log(2 * jnp.pi)
        log_prob, r = jax.nn.logsumexp(joint, axis=1), jax.nn.softmax(joint, axis=1)
        r = w[:, None] * r
        if self.broken == "square weights":
            r = w[:, None] * r
        if self.broken == "constant weights":
            r = jax.lax.stop_gradient(r)
        value = jnp.sum(jnp.where(w != 0, w * log_prob, 0))
        if self.broken == "bound":
            value = value - 0.1 * jnp.sum(w) * self.shift**2
        sums = (jnp.sum(r), jnp.sum(r * gaps), jnp.sum(r * gaps**2))
        if self.broken == "late mask":  # hides a NaN from the value, not from the derivative
            value = value + 0 * jnp.sum(jnp.where(w != 0, spoilt * self.shift, 0))
        return sums, value

    def m_step(self, statistics):
        n, first, _ = statistics.at(self).sums
        if self.broken == "log of zero":
            return self._moved(jnp.log(jnp.zeros_like(n)))
        step = 3.0 if self.broken == "overshoots" else 1.0
        return self._moved(jnp.where(self._fixed(), 0, step * first / n))

    def _fixed(self):
        return any(name == "shift" for name, _ in self.frozen) and self.broken != "moves frozen"

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

    def prior(self):
        return Framed((jnp.asarray(0.0),) * 3, self)

    num_free_parameters = 1

    def log_prob(self, data):
        sides = self.shift + jnp.array([-2.0, 2.0])
        return jax.nn.logsumexp(jax.scipy.stats.norm.logpdf(data, sides), axis=1) - jnp.log(2)

    def sample(self, key, n):
        z_key, x_key = jax.random.split(key)
        z = jax.random.randint(z_key, (n,), 0, 2)
        return self.shift + 4.0 * z[:, None] - 2 + jax.random.normal(x_key, (n, 1)), z

    def check(self, data):
        pass

    def in_support(self, data):
        finite = jnp.isfinite(data[:, 0])
        return jnp.ones_like(finite) if self.broken == "anything goes" else finite

    def width(self, data):
        return 2

    def num_observed(self, data):
        return jnp.ones(len(data), int)

    def serial_steps(self, data):
        return 1

    def degenerate(self, statistics):
        return jnp.zeros(1, int)

    def representable(self):
        return jnp.isfinite(self.shift)


PAIR = jnp.asarray(np.random.default_rng(1).normal(size=(24, 1)) + np.array([[-1.0], [3.0]] * 12))


class Identity:
    """A setting that equals nothing but itself."""


def test_the_unbroken_pair_obeys_every_law():
    report = jaxem.testing.check_model(Pair(jnp.array(0.3)), PAIR)
    assert [verdict.verdict for verdict in report] == ["holds"] * 10, f"\n{report}"


def test_a_broken_law_is_reported():
    (verdict,) = (
        v
        for v in jaxem.testing.check_model(Pair(jnp.array(0.3), broken="overshoots"), PAIR)
        if v.law == "ascent"
    )
    assert verdict.verdict == "fails" and "lowered the objective" in verdict.detail


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        ("average", "additivity"),
        ("square weights", "additivity"),
        ("poisoned", "additivity"),
        ("reframe", "additivity"),
        ("bound", "Fisher's identity"),
        ("overshoots", "ascent"),
        ("log of zero", "free leaves"),
        ("moves frozen", "frozen is not updated"),
        ("digits", "float32 agrees"),
        ("anything goes", "honest results"),
        ("late mask", "tolerance and derivatives"),
        ("constant weights", "tolerance and derivatives"),
        ("identity", "compile once"),
        ("all at once", "memory"),
    ],
)
def test_each_law_can_fail(broken, law):
    setting = Identity() if broken == "identity" else None
    with pytest.raises(_laws.Broken):
        _laws.LAWS[law](Pair(jnp.array(0.3), broken=broken, setting=setting), PAIR, 1e-9)


class FaultyPoisson(jaxem.authoring.AbstractExponentialFamily):
    """A Poisson law that expects twice its statistic, or draws the next count."""

    parameters: ClassVar = jaxem.emissions.Poisson.parameters
    support: ClassVar = jaxem.emissions.Poisson.support
    log_rate: jax.Array
    fault: str = eqx.field(static=True)
    frozen: jaxem.authoring.Frozen = eqx.field(static=True)

    @property
    def rate(self):
        return jnp.exp(self.log_rate)

    @property
    def plain(self):
        return jaxem.emissions.Poisson(self.rate)

    def log_prob(self, x, tilt):
        return self.plain.log_prob(x, tilt)

    def canonical(self):
        return self.plain.canonical()

    def expected(self):
        count, *others = self.plain.expected()
        factor = 2.0 if self.fault == "expected" else 1.0
        return type(self.plain.expected())(count, *(factor * leaf for leaf in others))

    def maximize(self, sums):
        return self.plain.maximize(sums)

    def reframe(self, sums, old):
        return self.plain.reframe(sums, old.plain)

    def sample(self, key, z):
        return self.plain.sample(key, z) + (self.fault == "sample")


@pytest.mark.parametrize("fault", ["", "expected", "sample"])
def test_what_a_law_expects_and_draws_is_held_to_its_density(fault):
    model = jaxem.Mixture(
        [0.4, 0.6],
        FaultyPoisson(log_rate=jnp.log(jnp.array([[2.0], [7.0]])), fault=fault, frozen=()),
    )
    law, x = _laws.LAWS["Fisher's identity"], jnp.arange(12.0)[:, None]
    if not fault:
        law(model, x, 1e-9)
        return
    with pytest.raises(_laws.Broken, match=fault):
        law(model, x, 1e-9)


def test_an_exception_of_the_model_is_passed_on():
    def e_step(params, data):
        raise TypeError("a mistake of the author")

    model = jaxem.from_functions(e_step, lambda sums: sums, jnp.zeros(1))
    with pytest.raises(TypeError, match="a mistake of the author"):
        jaxem.testing.check_model(model, PAIR)


def test_one_emission_obeys_every_law():
    emission = jaxem.emissions.TiedGaussian([[0.3, 0.1]], [[1.0, 0.2], [0.2, 0.8]])
    report = jaxem.testing.check_model(emission, jnp.asarray(POINTS))
    assert [verdict.verdict for verdict in report] == ["holds"] * 10, f"\n{report}"
