"""Conditionals that are no emissions: transitions, durations, gates."""

from jaxem.factors._duration import AbstractDuration as AbstractDuration
from jaxem.factors._duration import CategoricalDuration as CategoricalDuration
from jaxem.factors._duration import NegativeBinomialDuration as NegativeBinomialDuration
from jaxem.factors._duration import PoissonDuration as PoissonDuration
from jaxem.factors._logistic import LogisticGate as LogisticGate
from jaxem.factors._logistic_transition import LogisticTransition as LogisticTransition
from jaxem.factors._simplex import Simplex as Simplex
from jaxem.factors._transition import AbstractTransition as AbstractTransition
from jaxem.factors._transition import Transition as Transition
