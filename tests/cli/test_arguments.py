"""Values of command-line flags."""

import os

import pytest

from vit_jax.cli.arguments import Parser, read_label_names
from vit_jax.errors import UserError


@pytest.mark.parametrize('bom', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('line_break', [b'\n', b'\r\n'])
def test_a_file_of_labels_may_start_with_a_byte_order_mark(tmp_path, bom, line_break):
  names = ['caf\u00e9', 'a\u2028b', 'c\x85d']
  text = line_break.join(name.encode() for name in [*names, ''])
  (tmp_path / 'names.txt').write_bytes(bom + text)
  assert read_label_names(str(tmp_path / 'names.txt')) == tuple(names)
  (tmp_path / 'names.txt').write_bytes(bom + text.removesuffix(line_break))
  assert read_label_names(str(tmp_path / 'names.txt')) == tuple(names)


def test_labels_from_something_that_is_not_a_file_are_an_error(tmp_path):
  os.mkfifo(tmp_path / 'fifo')
  for path in (tmp_path / 'fifo', tmp_path, '/dev/zero'):
    with pytest.raises(UserError, match='not a regular file'):
      read_label_names(str(path))


def test_two_dashes_are_not_a_value_of_a_flag():
  parser = Parser(prog='x')
  parser.add_argument('--name')
  parser.add_argument('rest', nargs='*')
  with pytest.raises(UserError, match='--name=--'):
    parser.parse_args(['--name=--', 'a'])
  assert parser.parse_args(['--name=-', '--', '--name=--']).rest == ['--name=--']
