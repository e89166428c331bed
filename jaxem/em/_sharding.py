"""Data spread over devices: each device sums its own observations, then one all-reduce.

A scan over blocks of sharded data would silently gather them all first. Statistics are sums over
observations, so that the E-step of every model can run shard by shard instead.
"""

import math
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxem.latents import AbstractPosterior
from jaxem.models._base import AbstractModel, expected_sums

# A mesh, and the name or names of its axes along which observations are spread.
Shards = tuple[Mesh | AbstractMesh, Any]


def sums_on_shards(
    shards: Shards,
    model: AbstractModel,
    data: PyTree[Array],
    sample_weight: Float[Array, " n"] | None,
    posterior: AbstractPosterior,
    key: Array | None,
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """`expected_sums`, done where the data lie.

    **Raises:** `ValueError` for observations that cannot be spread evenly.
    """
    mesh, axis = shards
    devices = math.prod(mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))
    num_observations = jax.tree.leaves(data)[0].shape[0]
    if num_observations % devices:
        raise ValueError(
            f"a batch of {num_observations} observations cannot be spread evenly over "
            f"{devices} devices: choose its size, or the number of blocks, to suit."
        )
    observations, whole = PartitionSpec(axis), PartitionSpec()
    temperature, settings = eqx.partition(posterior, eqx.is_array)

    def shard(model: Any, data: Any, weight: Any, temperature: Any, key: Any) -> Any:
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        posterior = eqx.combine(temperature, settings)
        flat, unravel = ravel_pytree(expected_sums(model, data, weight, posterior, key))
        return unravel(jax.lax.psum(flat, axis))

    return jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(whole, observations, observations, whole, whole),
        out_specs=whole,
        check_vma=False,
    )(model, data, sample_weight, temperature, key)


def shards_of(data: PyTree[Array]) -> Shards | None:
    """How data are spread over devices along their observations, where that is known.

    **Raises:** `ValueError` for leaves that are spread differently.
    """
    where = {found for leaf in jax.tree.leaves(data) if (found := _shards_of_leaf(leaf))}
    if len(where) > 1:
        raise ValueError(
            f"the leaves of data are sharded differently along their observations: {where}."
        )
    return where.pop() if where else None


def _shards_of_leaf(leaf: Any) -> Shards | None:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return sharding.mesh, sharding.spec[0]
