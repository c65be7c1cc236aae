"""Names of TPU slices, and what each has."""

import pytest

from vit_jax.errors import UserError
from vit_jax.tpu.topologies import GENERATIONS, parse_topology


@pytest.mark.parametrize(
  ('name', 'slices', 'chips', 'devices', 'hosts'),
  [
    ('v5e:2x2', 1, 4, 4, 1), ('v5e:16x16', 1, 256, 256, 64), ('v5e:4x4', 2, 32, 32, 8), ('v4:2x2x1', 1, 4, 4, 1),
    ('v5p:8x8x8', 1, 512, 512, 128), ('tpu7x:2x2x1', 1, 4, 8, 1), ('v6e:1x1', 1, 1, 1, 1),
  ],
)  # fmt: skip
def test_a_name_says_how_many_chips_devices_and_hosts_there_are(
  name, slices, chips, devices, hosts
):
  found = parse_topology(name, slices)
  assert (found.chips, found.devices, found.hosts) == (chips, devices, hosts)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v5:4x4', "Did you mean 'v5"),
    ('v5e:4x4x4', 'a slice of v5e has 2 sides: v5e:1x1, v5e:2x2'),
    ('v5p:4x4', 'a slice of v5p has 3 sides: v5p:2x2x1'),
    ('v5e', 'a slice of v5e has 2 sides'),
    ('v5e:0x4', 'a slice of v5e has 2 sides'),
  ],
)
def test_a_wrong_name_lists_the_right_ones(name, message):
  with pytest.raises(UserError, match=message):
    parse_topology(name)


def test_every_listed_slice_has_its_generations_sides():
  for kind, generation in GENERATIONS.items():
    for shape in generation.shapes:
      assert parse_topology(f'{kind}:{shape}').generation is generation


def test_the_clock_is_what_the_rate_and_the_matrix_units_leave():
  """Units of 128 x 128 multiply-adds (four in each of v4's and v5p's two cores and v5e's one), 256 x 256 from v6e on."""
  units = {'v4': (8, 128), 'v5e': (4, 128), 'v5p': (8, 128), 'v6e': (4, 256), 'tpu7x': (8, 256)}
  for kind, (count, side) in units.items():
    generation = GENERATIONS[kind]
    assert generation.flops / (2 * count * side * side) / 1e9 == pytest.approx(
      generation.ghz, rel=0.01
    )
