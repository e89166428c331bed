"""Families of distributions for the components of a mixture and the states of a chain."""

from jaxem._core.moments import compressed as compressed
from jaxem._core.moments import from_moments as from_moments
from jaxem.emissions._axis_gaussian import DiagonalGaussian as DiagonalGaussian
from jaxem.emissions._axis_gaussian import SphericalGaussian as SphericalGaussian
from jaxem.emissions._base import AbstractEmission as AbstractEmission
from jaxem.emissions._bernoulli import Bernoulli as Bernoulli
from jaxem.emissions._categorical import Categorical as Categorical
from jaxem.emissions._exponential import Exponential as Exponential
from jaxem.emissions._factor_analysis import PPCA as PPCA
from jaxem.emissions._factor_analysis import FactorAnalysis as FactorAnalysis
from jaxem.emissions._gamma import Gamma as Gamma
from jaxem.emissions._gaussian import Gaussian as Gaussian
from jaxem.emissions._gaussian import TiedGaussian as TiedGaussian
from jaxem.emissions._gradient_emission import GradientEmission as GradientEmission
from jaxem.emissions._independent import Independent as Independent
from jaxem.emissions._labels import Labels as Labels
from jaxem.emissions._linear_regression import LinearRegression as LinearRegression
from jaxem.emissions._mixture_emission import MixtureEmission as MixtureEmission
from jaxem.emissions._multinomial import Multinomial as Multinomial
from jaxem.emissions._negative_binomial import NegativeBinomial as NegativeBinomial
from jaxem.emissions._parsimonious import ParsimoniousGaussian as ParsimoniousGaussian
from jaxem.emissions._poisson import Poisson as Poisson
from jaxem.emissions._regressions import LogisticRegression as LogisticRegression
from jaxem.emissions._regressions import PoissonRegression as PoissonRegression
from jaxem.emissions._student_t import StudentT as StudentT
from jaxem.emissions._von_mises_fisher import VonMisesFisher as VonMisesFisher
