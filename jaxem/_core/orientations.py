"""M-steps of the orientations of covariances: axes of their own, or axes in common.

With own axes and one shape, each component's axes are the eigenvectors of its scatter, the largest
variance along the longest axis. Common axes R have no closed form: for scatters E for one
observation, with shares π of the observations and uₖ = meanⱼ log (RᵀEₖR)ⱼⱼ, they maximise

    −Σₖ πₖ uₖ,    or −log Σₖ πₖ exp uₖ where volumes are equal,

by Newton's method on rotations. There are several maxima: the climb starts at the best of the
present axes, those of the pooled scatter and those of each component.

Flury & Gautschi (1986), SIAM J. Sci. Stat. Comput. 7 (common axes); Browne & McNicholas (2014),
Adv. Data Anal. Classif. 8 (equal volumes).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxem._core import linalg as la
from jaxem._core.ascent import Function, ascend
from jaxem._core.covariance_steps import diagonal, log_pool, mean
from jaxem._core.orthogonal import eigen, rotation, skew


def own_axes(
    log_shape: Float[Array, "1 d"], each: Float[Array, "k d d"]
) -> tuple[Float[Array, "k d d"], Float[Array, "k d"]]:
    """Rotations to the components' own axes, and logs of variances relative to the shape.

    The largest variance goes with the largest of the present shape, and so on.
    """
    stretched, log_size = _stretched(log_shape, each)
    values, vectors = eigen(stretched)
    order = jax.vmap(jnp.lexsort)((jnp.broadcast_to(log_shape, values.shape), values))
    place = jnp.argsort(jnp.argsort(log_shape[0]))
    index = jnp.take(order, place, axis=1)
    values = jnp.take_along_axis(values, index, axis=1)
    vectors = jnp.take_along_axis(vectors, index[:, None, :], axis=2)
    return vectors, la.floored_log(values) + log_size[:, None] - 2 * log_shape


def common_axes(
    equal_volumes: bool,
    log_shape: Float[Array, "k d"],
    each: Float[Array, "k d d"],
    share: Float[Array, " k"],
) -> tuple[Float[Array, "d d"], Float[Array, "k d"]]:
    """The rotation to common axes, and the logs of variances relative to the shapes."""
    stretched, log_size = _stretched(log_shape, each)
    relative = log_size - lax.stop_gradient(jnp.max(log_size))
    function = _common_axes(equal_volumes, each.shape[-1])
    args = stretched, relative, share
    start = _best_start(function.value, lax.stop_gradient(args))
    free = _distinct(lax.stop_gradient(_turned(stretched, start)), share)
    turn = ascend(function, start, args, free)
    logs = la.floored_log(diagonal(_turned(stretched, turn)))
    return turn, logs + log_size[:, None] - 2 * log_shape


def _common_axes(equal_volumes: bool, d: int) -> Function:
    """What common axes maximise, with respect to angles of rotations R exp A."""
    rows, columns = np.tril_indices(d, -1)

    def sizes(turned: Array, args: Any) -> tuple[Array, Array]:
        logs = jnp.mean(la.floored_log(diagonal(turned)), axis=1)
        _, log_size, share = args
        if equal_volumes:
            total = log_pool((logs + log_size)[:, None], share)[0]
            return total, share * jnp.exp(logs + log_size - total)
        return jnp.sum(share * logs), share

    def value(turn: Array, args: Any) -> Array:
        return -sizes(_turned(args[0], turn), args)[0]

    def slope(turned: Array, args: Any) -> Array:
        weight = (2 / d) * sizes(turned, args)[1]
        precision = 1 / jnp.maximum(diagonal(turned), jnp.finfo(turned.dtype).tiny)
        contrast = precision[:, :, None] - precision[:, None, :]
        return jnp.sum(weight[:, None, None] * turned * contrast, axis=0)[rows, columns]

    def gradient(turn: Array, args: Any) -> Array:
        return slope(_turned(args[0], turn), args)

    def hessian(turn: Array, args: Any) -> Array:
        turned = _turned(args[0], turn)

        def along(angles: Array) -> Array:
            right = la.matmul(turned, skew(angles, d))
            change = right + la.transpose(right)
            return jax.jvp(lambda turned: slope(turned, args), (turned,), (change,))[1]

        columns_of = jax.vmap(along)(jnp.eye(len(rows), dtype=turned.dtype))
        return 0.5 * (columns_of + columns_of.T)

    def move(turn: Array, angles: Array) -> Array:
        return la.matmul(turn, rotation(angles, d))

    return Function(value, gradient, hessian, move)


def _best_start(
    value: Callable[[Array, Any], Array], known: tuple[Array, Array, Array]
) -> Float[Array, "d d"]:
    stretched, _, share = known
    candidates = jnp.concatenate([mean(stretched, share), stretched])
    turns = eigen(candidates)[1]
    eye = jnp.eye(turns.shape[-1], dtype=turns.dtype)
    values = jax.vmap(lambda turn: value(turn, known))(turns)
    present = value(eye, known)
    better = jnp.max(values) > present + 64 * jnp.finfo(eye.dtype).eps * (1 + jnp.abs(present))
    return jnp.where(better, turns[jnp.argmax(values)], eye)


def _distinct(turned: Float[Array, "k d d"], share: Float[Array, " k"]) -> Bool[Array, " p"]:
    """Pairs of axes that some scatter tells apart: to turn the others changes nothing."""
    d = turned.shape[-1]
    left, right = diagonal(turned)[:, :, None], diagonal(turned)[:, None, :]
    noise = 2 * jnp.sqrt(jnp.finfo(turned.dtype).eps)
    apart = jnp.abs(left - right) > noise * jnp.maximum(left, right)
    apart = apart | (jnp.abs(turned) > noise * jnp.sqrt(left) * jnp.sqrt(right))
    rows, columns = np.tril_indices(d, -1)
    return jnp.any(apart & (share > 0)[:, None, None], axis=0)[rows, columns]


def _stretched(log_shape: Array, each: Array) -> tuple[Array, Array]:
    """Scatters in the present axes, of largest entry about one, and the logs of their sizes."""
    top = lax.stop_gradient(jnp.max(log_shape, axis=1, keepdims=True))
    size = lax.stop_gradient(jnp.max(jnp.abs(each), axis=(1, 2)))
    size = jnp.maximum(size, jnp.finfo(size.dtype).tiny)
    scale = jnp.exp(log_shape - top)
    stretched = la.outer(scale, scale) * (each / size[:, None, None])
    return stretched, jnp.log(size) + 2 * top[:, 0]


def _turned(each: Float[Array, "k d d"], turn: Float[Array, "d d"]) -> Float[Array, "k d d"]:
    return la.matmul(la.matmul(turn.T, each), turn)
