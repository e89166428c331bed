"""Structures that are summed out, and posteriors over them."""

from jaxem.latents import chain as chain
from jaxem.latents import kalman as kalman
from jaxem.latents._chain import Chain as Chain
from jaxem.latents._finite import Finite as Finite
from jaxem.latents._infer import AbstractCustomPosterior as AbstractCustomPosterior
from jaxem.latents._infer import AbstractLatent as AbstractLatent
from jaxem.latents._infer import AbstractPosterior as AbstractPosterior
from jaxem.latents._infer import AbstractSequenceLatent as AbstractSequenceLatent
from jaxem.latents._infer import Drawn as Drawn
from jaxem.latents._infer import Exact as Exact
from jaxem.latents._infer import Hard as Hard
from jaxem.latents._infer import Tempered as Tempered
from jaxem.latents._infer import infer as infer
from jaxem.latents._segments import Segmented as Segmented
from jaxem.latents._segments import Segments as Segments
