"""Models whose complete-data density is a product of factors: what follows from those, once."""

from typing import Any, ClassVar, Self

import equinox as eqx
from jaxtyping import Array, Bool, Float

from jaxem._core.parameters import Frozen, Parametrized, inline, named_parameters, replace
from jaxem._core.statistics import Framed
from jaxem.models._base import AbstractModel, all_finite


class AbstractComposite(AbstractModel, Parametrized):
    """A model whose log p(x, z) is a sum over factors.

    `factors` names the fields that hold them, and statistics are a tuple of each factor's sums in
    that order. A field whose name begins with an underscore is a factor behind one parameter of
    the model, of the same name without it.
    """

    parameters: ClassVar = {}
    frozen: ClassVar[Frozen] = ()
    factors: eqx.AbstractClassVar[tuple[str, ...]]

    @property
    def num_free_parameters(self) -> int:
        return sum(getattr(self, name).num_free_parameters for name in self.factors)

    def tilt(self) -> tuple[Any, ...]:
        """Zeros like the sums: the point at which log-potentials are differentiated."""
        return tuple(getattr(self, name).tilt() for name in self.factors)

    def reframe(self, sums: Any, old: Self) -> Any:
        return tuple(
            getattr(self, name).reframe(own, getattr(old, name))
            for name, own in zip(self.factors, sums, strict=True)
        )

    def prior(self, **given: Any) -> Framed:
        """The prior as pseudo-statistics: those of each factor, flat for what is not given.

        **Arguments:** by the names of the factors, what their own `prior` returns, as in
        `model.prior(components=model.components.prior(…))`. Probabilities that are parameters of
        the model itself (`weights`, `initial`) take pseudo-counts instead: a number, of
        observations in all that are spread evenly, or an array (k,), one for each value. A
        Dirichlet prior of concentration α is a count of k (α − 1), or of α − 1 for each value.

        **Raises:** `ValueError` for a name that is no factor, for something else, or for a
        negative count.
        """
        known = {name.removeprefix("_"): name for name in self.factors}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"prior: {unknown[0]!r} is no factor of {type(self).__name__}, which has "
                f"{', '.join(known)}."
            )
        own = {field: _prior(self, name, given.get(name)) for name, field in known.items()}
        frame = replace(self, **{field: prior.frame for field, prior in own.items()})
        return Framed(tuple(prior.sums for prior in own.values()), frame)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(named_parameters(self))


class AbstractSeparable(AbstractComposite):
    """A composite model whose factors share no parameters: each has an M-step of its own."""

    def m_step(self, statistics: Framed) -> Self:
        """The constrained maximum of each factor."""
        return replace(self, **maxima(self, statistics))

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), up to a term in the data alone: the sum of those of the factors."""
        sums = statistics.at(self).sums
        parts = (
            getattr(self, name).expected_log_prob(own)
            for name, own in zip(self.factors, sums, strict=True)
        )
        return sum(parts, start=0.0)  # pyright: ignore[reportReturnType]


def maxima(model: AbstractComposite, statistics: Framed) -> dict[str, Any]:
    """The M-step of each factor, by the name of its field."""
    sums = statistics.at(model).sums
    return {
        name: getattr(model, name).m_step(own)
        for name, own in zip(model.factors, sums, strict=True)
    }


def check_one_model(model: AbstractModel, what: str, leaf: Array) -> None:
    """Raises `ValueError` for models that are stacked along a leading axis."""
    if leaf.ndim != 1:
        raise ValueError(
            f"{type(model).__name__} has {what} of shape (k,), got {leaf.shape}: fit takes one "
            "model; fit_restarts and jax.vmap take models stacked along a leading axis, as "
            "jax.vmap over init gives."
        )


def _prior(model: AbstractComposite, name: str, given: Any) -> Framed:
    """The prior of one factor."""
    behind = inline(model).get(name)
    if isinstance(given, Framed):
        return given
    if behind is not None:
        return behind.prior(0.0 if given is None else given, name=name)
    if given is None:
        return getattr(model, name).prior()
    raise ValueError(
        f"prior: {name} must come from its own prior(…), as in model.prior({name}="
        f"model.{name}.prior(…)); got {type(given).__name__}."
    )
