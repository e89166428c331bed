from jaxem.models.mixture import Mixture as Mixture
