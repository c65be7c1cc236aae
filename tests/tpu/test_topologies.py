"""Names of TPU slices, and the chips, devices and hosts of each."""

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
def test_a_name_determines_the_number_of_chips_devices_and_hosts(
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
def test_a_wrong_name_is_an_error_that_lists_the_valid_names(name, message):
  with pytest.raises(UserError, match=message):
    parse_topology(name)


def test_every_listed_slice_has_its_generations_sides():
  for kind, generation in GENERATIONS.items():
    for shape in generation.shapes:
      assert parse_topology(f'{kind}:{shape}').generation is generation


def test_the_clock_is_the_peak_rate_divided_by_the_matrix_units():
  """The clock follows from the peak FLOP/s and the matrix units of a chip.

  v4 and v5p have two cores with four units of 128 x 128 multiply-adds each, and v5e has one such
  core. From v6e on, units have 256 x 256 multiply-adds.
  """
  units = {'v4': (8, 128), 'v5e': (4, 128), 'v5p': (8, 128), 'v6e': (4, 256), 'tpu7x': (8, 256)}
  for kind, (count, side) in units.items():
    generation = GENERATIONS[kind]
    assert generation.flops / (2 * count * side * side) / 1e9 == pytest.approx(
      generation.ghz, rel=0.01
    )
