"""What authors of emissions, factors and models need; see docs/authors.md.

Constraints of parameters, supports of data, base classes, and the numerical pieces that keep
float32 right.
"""

from jaxem._core.blocks import map_over_observations as map_over_observations
from jaxem._core.blocks import substitute as substitute
from jaxem._core.blocks import sum_over_observations as sum_over_observations
from jaxem._core.causes import caused as caused
from jaxem._core.causes import either as either
from jaxem._core.checks import check_shape as check_shape
from jaxem._core.checks import check_values as check_values
from jaxem._core.constraints import Parameter as Parameter
from jaxem._core.constraints import leaves_of as leaves_of
from jaxem._core.constraints import positive as positive
from jaxem._core.constraints import probability as probability
from jaxem._core.constraints import real as real
from jaxem._core.constraints import simplex as simplex
from jaxem._core.linalg import floored_log as floored_log
from jaxem._core.linalg import matmul as matmul
from jaxem._core.linalg import repeat as repeat
from jaxem._core.newton import maximize_by_newton as maximize_by_newton
from jaxem._core.numerics import divide as divide
from jaxem._core.parameters import Frozen as Frozen
from jaxem._core.parameters import Parametrized as Parametrized
from jaxem._core.parameters import free as free
from jaxem._core.parameters import replace as replace
from jaxem._core.parameters import update as update
from jaxem._core.quadratic import AbstractLocal as AbstractLocal
from jaxem._core.quadratic import LocalQuadratic as LocalQuadratic
from jaxem._core.quadratic import linear_tilt as linear_tilt
from jaxem._core.statistics import Framed as Framed
from jaxem._core.supports import Support as Support
from jaxem._core.supports import bits as bits
from jaxem._core.supports import codes as codes
from jaxem._core.supports import counts as counts
from jaxem._core.supports import positives as positives
from jaxem._core.supports import reals as reals
from jaxem.emissions._base import AbstractEmission as AbstractEmission
from jaxem.emissions._base import AbstractNested as AbstractNested
from jaxem.emissions._base import AbstractStarting as AbstractStarting
from jaxem.emissions._base import sums_of as sums_of
from jaxem.emissions._base import width as width
from jaxem.emissions._family import AbstractConjugateFamily as AbstractConjugateFamily
from jaxem.emissions._family import AbstractExponentialFamily as AbstractExponentialFamily
from jaxem.emissions._family import AbstractFamily as AbstractFamily
from jaxem.emissions._family import AbstractSpread as AbstractSpread
from jaxem.emissions._natural import AbstractNaturalFamily as AbstractNaturalFamily
from jaxem.factors._base import AbstractFactor as AbstractFactor
from jaxem.factors._simplex import Simplex as Simplex
from jaxem.models._base import AbstractModel as AbstractModel
from jaxem.models._composite import AbstractComposite as AbstractComposite
from jaxem.models._composite import AbstractSeparable as AbstractSeparable
from jaxem.models._finite import AbstractJointModel as AbstractJointModel
from jaxem.models._finite import AbstractMixture as AbstractMixture
from jaxem.models._finite import sums_of_joint as sums_of_joint
