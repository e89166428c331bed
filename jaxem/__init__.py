"""Expectation–maximisation in JAX."""

from jaxem import authoring as authoring
from jaxem import em as em
from jaxem import emissions as emissions
from jaxem import factors as factors
from jaxem import inference as inference
from jaxem import latents as latents
from jaxem import models as models
from jaxem import testing as testing
from jaxem._core.freezing import freeze as freeze
from jaxem._core.freezing import unfreeze as unfreeze
from jaxem._core.sequences import Sequences as Sequences
from jaxem._kmeans import KMeans as KMeans
from jaxem._kmeans import kmeans as kmeans
from jaxem.em._acceleration import SQUAREM as SQUAREM
from jaxem.em._anderson import Anderson as Anderson
from jaxem.em._em import EM as EM
from jaxem.em._fit import fit as fit
from jaxem.em._restarts import fit_best as fit_best
from jaxem.em._restarts import fit_restarts as fit_restarts
from jaxem.em._solution import RESULTS as RESULTS
from jaxem.em._solution import Solution as Solution
from jaxem.em._solution import best as best
from jaxem.models._experts import MixtureOfExperts as MixtureOfExperts
from jaxem.models._functions import from_functions as from_functions
from jaxem.models._hmm import HMM as HMM
from jaxem.models._hsmm import HSMM as HSMM
from jaxem.models._log_joint import from_log_joint as from_log_joint
from jaxem.models._mixture import Mixture as Mixture

__version__ = "0.1.0"
