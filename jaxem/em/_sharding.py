"""Data spread over devices: each device sums its own observations, then one all-reduce.

A scan over blocks of sharded data would silently gather them all first. Statistics are sums over
observations, so any expectation can run shard by shard instead, for every model alike.
"""

import math
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxem._core.statistics import Framed
from jaxem.em._algorithm import AbstractAlgorithm
from jaxem.em._expectation import AbstractExpectation, as_expectation
from jaxem.em._problem import Problem
from jaxem.em._traits import Traits


class Sharded(AbstractExpectation):
    """An expectation done where the data lie.

    `fit` puts it around the algorithm's own when the data it is given are sharded along their
    leading axis; in a loop of one's own, write `EM(Sharded(Exact(), mesh, axis))`.

    **Arguments:** `expectation`; `mesh`; `axis`, the name or names of
    the mesh axes along which observations are spread.
    """

    expectation: AbstractExpectation = eqx.field(converter=as_expectation)
    mesh: Mesh = eqx.field(static=True)
    axis: Any = eqx.field(static=True)

    @property
    def traits(self) -> Traits:
        return self.expectation.traits

    @property
    def final(self) -> AbstractExpectation:
        return Sharded(self.expectation.final, self.mesh, self.axis)  # pyright: ignore

    def init(self, model, problem):
        return self.expectation.init(model, problem)

    def conclusive(self, memory, step):
        return self.expectation.conclusive(memory, step)

    def __call__(self, model, problem, memory, step, key):
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        devices = math.prod(self.mesh.shape[name] for name in names)
        if problem.num_observations % devices:
            raise ValueError(
                f"a batch of {problem.num_observations} observations cannot be spread evenly over "
                f"{devices} devices: choose its size, or the number of blocks, to suit."
            )
        observations, whole = PartitionSpec(self.axis), PartitionSpec()

        def shard(model: Any, part: Any, memory: Any, step: Array, key: Any) -> Any:
            if key is not None:
                key = jax.random.fold_in(key, jax.lax.axis_index(self.axis))
            own = Problem(*part, checked=True)
            new, objective, memory = self.expectation(model, own, memory, step, key)
            flat, unravel = ravel_pytree((new.sums, objective))
            return unravel(jax.lax.psum(flat, self.axis)), memory

        (sums, objective), memory = jax.shard_map(
            shard,
            mesh=self.mesh,
            in_specs=(whole, observations, observations, whole, whole),
            out_specs=(whole, observations),
            check_vma=False,
        )(model, (problem.data, problem.sample_weight), memory, step, key)
        return Framed(sums, model), objective, memory


def on_shards(algorithm: AbstractAlgorithm, data: PyTree[Array]) -> AbstractAlgorithm:
    """The algorithm, with its E-step done shard by shard if the data are sharded."""
    where = [_observation_sharding(leaf) for leaf in jax.tree.leaves(data)]
    where = {found for found in where if found is not None}
    if len(where) > 1:
        raise ValueError(
            f"the leaves of data are sharded differently along their observations: {where}."
        )
    if not where:
        return algorithm
    mesh, axis = where.pop()

    def sharded(expectation: AbstractExpectation) -> AbstractExpectation:
        if isinstance(expectation, Sharded):
            return expectation
        # pyright takes the abstract variables of an expectation for fields
        return Sharded(expectation, mesh, axis)  # pyright: ignore

    return algorithm.with_expectation(sharded)


def _observation_sharding(leaf: Any) -> tuple[Any, Any] | None:
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return sharding.mesh, sharding.spec[0]
