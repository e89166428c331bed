"""Data that are spread over devices: each device sums its own units, then one all-reduce.

A scan over blocks of sharded data would silently gather them all first. Statistics are sums over
units, so any expectation can run shard by shard instead, for every model alike.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxem._em import EM, AbstractAlgorithm
from jaxem._hold import replace
from jaxem._posterior import AbstractExpectation
from jaxem._statistics import Framed
from jaxem._units import num_units


class Sharded(AbstractExpectation):
    """An expectation done where the data lie.

    `fit` puts it around the algorithm's own when the data it is given are sharded along their
    leading axis; in a loop of one's own, write `EM(Sharded(Exact(), mesh, axis))`.

    **Arguments:** `expectation`; `mesh`; `axis`, the name or names of
    the mesh axes along which units are spread.
    """

    expectation: AbstractExpectation
    mesh: Mesh = eqx.field(static=True)
    axis: Any = eqx.field(static=True)

    @property
    def ascends(self) -> bool:
        return self.expectation.ascends

    @property
    def deterministic(self) -> bool:
        return self.expectation.deterministic

    @property
    def closing(self) -> AbstractExpectation:
        return Sharded(self.expectation.closing, self.mesh, self.axis)  # pyright: ignore

    def settles(self, step):
        return self.expectation.settles(step)

    def __call__(self, model, data, weights, step, key):
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        devices = math.prod(self.mesh.shape[name] for name in names)
        if num_units(data) % devices:
            raise ValueError(
                f"a batch of {num_units(data)} units cannot be spread evenly over {devices} "
                "devices: choose its size, or the number of blocks, to suit."
            )
        units, whole = PartitionSpec(self.axis), PartitionSpec()

        def shard(model: Any, data: Any, weights: Any, step: Array, key: Any) -> Any:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(self.axis))
            new, objective = self.expectation(model, data, weights, step, key)
            flat, unravel = ravel_pytree((new.sums, objective))
            return unravel(jax.lax.psum(flat, self.axis))

        sums, objective = jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=(whole, units, units, whole, whole),
            out_specs=whole,
            check_vma=False,
        )(model, data, weights, step, key)
        return Framed(sums, model), objective


def on_shards(algorithm: AbstractAlgorithm, data: PyTree[Array]) -> AbstractAlgorithm:
    """The algorithm, with its E-step done shard by shard if the data are sharded."""
    where = [_units_sharding(leaf) for leaf in jax.tree.leaves(data)]
    where = {found for found in where if found is not None}
    if len(where) > 1:
        raise ValueError(f"the leaves of data are sharded differently along their units: {where}.")
    return _spread(algorithm, *where.pop()) if where else algorithm


def _spread(algorithm: Any, mesh: Mesh, axis: Any) -> Any:
    if isinstance(inner := getattr(algorithm, "em", None), AbstractAlgorithm):
        return replace(algorithm, em=_spread(inner, mesh, axis))
    if not isinstance(algorithm, EM) or isinstance(algorithm.expectation, Sharded):
        return algorithm
    # pyright takes the abstract variables of an expectation for fields.
    sharded = Sharded(algorithm.expectation, mesh, axis)  # pyright: ignore
    return replace(algorithm, expectation=sharded)


def _units_sharding(leaf: Any) -> tuple[Any, Any] | None:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return sharding.mesh, sharding.spec[0]
