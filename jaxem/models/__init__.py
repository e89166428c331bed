from jaxem.models.hmm import HMM as HMM
from jaxem.models.mixture import Mixture as Mixture
from jaxem.models.transitions import AbstractTransition as AbstractTransition
from jaxem.models.transitions import LogisticTransition as LogisticTransition
from jaxem.models.transitions import Transition as Transition
