"""What a factor is: one conditional of the complete-data density, with sums and an M-step.

The complete-data density of a model is a product of factors: mixing weights, first states,
transitions, durations, gates, emissions. Each has expected statistics, taken about itself, and
maximises the part of Q that is its own.
"""

import abc
from typing import Any, Self

from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from jaxem._core.parameters import Parametrized, replace
from jaxem._core.printing import describe
from jaxem._core.statistics import Framed


class AbstractFactor(Parametrized):
    """One conditional of the complete-data density.

    Fields are unconstrained leaves, so that any linear combination of two factors is one.
    `parameters` declares what users name, and which leaves stand behind it; `frozen` holds what
    `jaxem.freeze` has frozen. Sums are expected statistics about self.
    """

    def __repr__(self) -> str:
        return describe(self)

    @property
    @abc.abstractmethod
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves, as AIC and BIC count them."""

    @abc.abstractmethod
    def tilt(self) -> PyTree[Array]:
        """Zeros like the sums: the point at which log-potentials are differentiated."""

    @abc.abstractmethod
    def m_step(self, sums: PyTree[Array]) -> Self:
        """The maximiser of `expected_log_prob` over what is free, or one that does not lower it."""

    @abc.abstractmethod
    def reframe(self, sums: PyTree[Array], old: Self) -> PyTree[Array]:
        """Sums taken about `old`, taken about self instead; exact, linear in the sums."""

    @abc.abstractmethod
    def expected_log_prob(self, sums: PyTree[Array]) -> Float[Array, ""]:
        """Q(self; sums), the sums about self, up to a term in the data alone."""

    @abc.abstractmethod
    def prior(self, *args: Any, **law: Any) -> Framed:
        """A prior as pseudo-statistics; without arguments it is flat."""

    def with_parameters(self, **values: ArrayLike) -> Self:
        """Self with other values of parameters, which broadcast to the present ones.

        **Raises:** `ValueError` for another name, shape, or what is no such parameter.
        """
        leaves = {}
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters)
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; it has {known}."
                )
            parameter = self.parameters[name]
            leaves[parameter.leaf] = parameter.replaced(name, value, self)
        return replace(self, **leaves)
