"""Looking up tokens in a table that is split over a mesh, so that neither the table nor its gradient is gathered."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from etagent_jax.learner.mesh import ROWS, TABLE
from etagent_jax.model.transformer import look_up


@dataclass(frozen=True)
class ShardedLookup:
    """Rows of `table` [V, D] for `tokens` [B, T], as [B·T, D] of `dtype`.

    Each device looks up the tokens of all devices of its fsdp group, in the part of D that it holds; an
    all-to-all then brings every device the whole of D for its own tokens.  The gradient goes the same
    way back, and is summed into the device's own part of the table.
    """

    mesh: Mesh

    def __call__(self, table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
        def of_a_device(table: jax.Array, tokens: jax.Array) -> jax.Array:
            group = jax.lax.all_gather(tokens.reshape(-1), "fsdp", tiled=True)
            row = group - jax.lax.axis_index("tensor") * len(table)
            here = (row >= 0) & (row < len(table))
            found = jnp.where(here[:, None], table[jnp.where(here, row, 0)], 0)
            found = jax.lax.psum(found, "tensor").astype(dtype)
            return jax.lax.all_to_all(found, "fsdp", split_axis=0, concat_axis=1, tiled=True)

        if self.mesh.size == 1:
            return look_up(table, tokens, dtype)
        return jax.shard_map(
            of_a_device, mesh=self.mesh, in_specs=(TABLE, ROWS), out_specs=P(*ROWS, None), check_vma=False
        )(table, tokens)
