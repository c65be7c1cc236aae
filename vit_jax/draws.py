"""Keys with which a device draws the rows that are its own of what one device would draw for all rows.

So dropout is the same on any number of devices, and no device draws for another. What is drawn must have the rows, and as
many on each device, as its first axis.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry2x32_p


def own_rows(data: jax.Array, place: jax.Array) -> jax.Array:
  """A Threefry key's data [2] and the number of a device's rows among those of all -> its key."""
  return jax.random.wrap_key_data(jnp.append(data, place.astype(jnp.uint32)), impl=ROWS)


def threefry(key: jax.Array) -> jax.Array:
  """The key without the place."""
  return jax.random.wrap_key_data(key[:2], impl='threefry2x32')


def with_place(keys: jax.Array, key: jax.Array) -> jax.Array:
  """Threefry keys, at the place of `key`."""
  data = jax.random.key_data(keys)
  return jnp.concatenate([data, jnp.broadcast_to(key[2:], (*data.shape[:-1], 1))], axis=-1)


def row_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
  """Threefry of each element's number in the array of all rows, as JAX itself numbers them: 64 bits, in two halves."""
  if width > 32:
    raise NotImplementedError(f'{width} random bits an element: here are 32')
  size, place = int(np.prod(shape)), key[2]
  # place * size, in halves of 16 bits, so that nothing runs over.
  high, low = place * np.uint32(size >> 16), place * np.uint32(size & 0xFFFF)
  first = (high << 16) + low
  carry = (high >> 16) + (first < low).astype(jnp.uint32)
  number = first + jax.lax.iota(jnp.uint32, size)
  over = carry + (number < first).astype(jnp.uint32)
  bits = jax.lax.bitwise_xor(*threefry2x32_p.bind(key[0], key[1], over, number)).reshape(shape)
  return bits.astype(f'uint{width}')


# A Threefry key, and the place.
ROWS = define_prng_impl(
  key_shape=(3,),
  seed=lambda seed: jnp.append(jax.random.key_data(jax.random.key(seed, impl='threefry2x32')), jnp.uint32(0)),
  split=lambda key, shape: with_place(jax.random.split(threefry(key), shape), key),
  fold_in=lambda key, data: with_place(jax.random.fold_in(threefry(key), data), key),
  random_bits=row_bits,
  name='rows',
  tag='rows',
)
