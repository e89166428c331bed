"""What to ask of a fitted model: criteria, standard errors, influence, rates."""

from jaxem.inference._criteria import aic as aic
from jaxem.inference._criteria import bic as bic
from jaxem.inference._criteria import icl as icl
from jaxem.inference._factors import FactorTest as FactorTest
from jaxem.inference._factors import ParallelAnalysis as ParallelAnalysis
from jaxem.inference._factors import factor_test as factor_test
from jaxem.inference._factors import parallel_analysis as parallel_analysis
from jaxem.inference._influence import influence as influence
from jaxem.inference._information import Covariance as Covariance
from jaxem.inference._information import Information as Information
from jaxem.inference._information import confidence_interval as confidence_interval
from jaxem.inference._information import observed_information as observed_information
from jaxem.inference._information import sandwich as sandwich
from jaxem.inference._information import standard_errors as standard_errors
from jaxem.inference._rates import ConvergenceRate as ConvergenceRate
from jaxem.inference._rates import convergence_rate as convergence_rate
from jaxem.inference._rotation import Rotation as Rotation
from jaxem.inference._rotation import rotate as rotate
