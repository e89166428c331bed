"""Models: mixtures, hidden Markov models, one emission alone, and models from functions."""

from jaxem.models._alone import Alone as Alone
from jaxem.models._base import AbstractModel as AbstractModel
from jaxem.models._experts import MixtureOfExperts as MixtureOfExperts
from jaxem.models._functions import from_functions as from_functions
from jaxem.models._hmm import HMM as HMM
from jaxem.models._hsmm import HSMM as HSMM
from jaxem.models._log_joint import from_log_joint as from_log_joint
from jaxem.models._mixture import Mixture as Mixture
from jaxem.models._order import align as align
from jaxem.models._order import reorder as reorder
from jaxem.models._state_space import LinearGaussianSSM as LinearGaussianSSM
from jaxem.models._structural import Component as Component
from jaxem.models._structural import autoregressive as autoregressive
from jaxem.models._structural import components as components
from jaxem.models._structural import dynamic_factors as dynamic_factors
from jaxem.models._structural import local_level as local_level
from jaxem.models._structural import local_linear_trend as local_linear_trend
from jaxem.models._structural import seasonal as seasonal
from jaxem.models._structural import sum_of as sum_of
