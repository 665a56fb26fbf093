"""Products that are rounded before they are added to anything, on every backend."""

import jax
import jax.numpy as jnp
from jax import lax


def rounded(product: jax.Array, zero: jax.Array) -> jax.Array:
    """Round a product to float32 before it is added to anything.

    Compilers contract a·b + c to one fused multiply-add, on some backends and in some loops only, which changes the
    last bit. An exclusive-or with a zero that the compiler cannot see keeps the two apart, at no measurable cost.
    """
    return lax.bitcast_convert_type(lax.bitcast_convert_type(product, jnp.int32) ^ zero, jnp.float32)
