"""Listing and reading image files: links, loops, and files that are not regular."""

import os
import socket
from pathlib import Path

import pytest

from vit_jax.data.decode import BadImageError
from vit_jax.data.image_files import list_images, read_image_file
from vit_jax.data.sources import open_source, open_unlabelled
from vit_jax.errors import UserError
from vit_jax.evaluate.predict import ImageFiles, find_image_files


def names_in(source, root: Path) -> list[str]:
  return [os.path.relpath(source[i][2], root) for i in range(len(source))]


@pytest.fixture
def linked(tmp_path, touch) -> Path:
  """Create two classes with links to folders and files, loops, and a broken link."""
  root, other = tmp_path / 'root', tmp_path / 'other'
  touch(root / 'cat' / '1.jpg', root / 'cat' / 'sub' / '2.png', root / 'dog' / '3.jpg')
  touch(other / '4.jpg', other / 'deep' / '5.tif')
  (root / 'cat' / 'link').symlink_to(other)
  (root / 'cat' / 'again').symlink_to(root / 'cat' / 'sub')
  (root / 'cat' / 'sub' / 'loop').symlink_to(root / 'cat')
  (other / 'deep' / 'loop').symlink_to(other)
  (root / 'cat' / 'self').symlink_to('self')
  (root / 'cat' / 'broken.jpg').symlink_to(tmp_path / 'gone.jpg')
  (root / 'dog' / 'one.jpg').symlink_to(other / '4.jpg')
  return root


def test_training_prediction_and_unlabelled_folders_list_the_same_images(linked):
  cat = ['cat/1.jpg', 'cat/link/4.jpg', 'cat/link/deep/5.tif', 'cat/sub/2.png']
  expected = [*cat, 'dog/3.jpg', 'dog/one.jpg']
  assert sorted(names_in(open_source(f'folder:{linked}', 'all'), linked)) == expected
  assert names_in(open_unlabelled(f'images:{linked}', 'train'), linked) == expected
  assert [os.path.relpath(path, linked) for path in find_image_files([str(linked)])] == expected


def test_many_links_between_folders_end(tmp_path, touch):
  """Each of 12 folders links to all others: without a check there are 12! paths."""
  folders = [tmp_path / f'{i}' for i in range(12)]
  for folder in folders:
    touch(folder / 'a.jpg')
  for folder in folders:
    for other in folders:
      (folder / f'to {other.name}').symlink_to(other)
  assert list_images(tmp_path)[0] == sorted(f'{i}/a.jpg' for i in range(12))
  assert len(list_images(folders[0])[0]) == 12


def test_a_link_to_a_class_folder_is_a_class(tmp_path, touch):
  touch(tmp_path / 'store' / 'a.jpg', tmp_path / 'root' / 'dog' / 'b.jpg')
  (tmp_path / 'root' / 'cat').symlink_to(tmp_path / 'store')
  assert open_source(f'folder:{tmp_path / "root"}', 'train').label_names == ('cat', 'dog')


@pytest.fixture
def odd_files(tmp_path, touch) -> dict[str, Path]:
  """Create things that are named like images, but are not regular files."""
  out = {kind: tmp_path / 'cat' / f'{kind}.jpg' for kind in ('fifo', 'folder', 'device', 'socket')}
  touch(tmp_path / 'cat' / 'a.jpg', tmp_path / 'dog' / 'b.jpg')
  os.mkfifo(out['fifo'])
  out['folder'].mkdir()
  out['device'].symlink_to('/dev/zero')
  with socket.socket(socket.AF_UNIX) as server:
    here = Path.cwd()
    os.chdir(tmp_path / 'cat')  # The path of a socket has at most 107 bytes.
    try:
      server.bind('socket.jpg')
    finally:
      os.chdir(here)
  return out


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'device', 'socket'])
def test_only_regular_files_are_read(odd_files, kind):
  with pytest.raises(BadImageError, match=f'{kind}.jpg: '):
    read_image_file(odd_files[kind])
  with pytest.raises(BadImageError, match=f'{kind}.jpg: '):
    ImageFiles((str(odd_files[kind]),))[0]


def test_a_missing_file_and_a_name_with_a_zero_byte_are_bad_images(tmp_path):
  for name in ('gone.jpg', 'a\0b.jpg', 'x' * 300 + '.jpg'):
    with pytest.raises(BadImageError):
      read_image_file(tmp_path / name)


def test_files_that_are_not_regular_are_passed_over_in_folders(odd_files, tmp_path, capsys):
  source = open_source(f'folder:{tmp_path}', 'train')
  assert names_in(source, tmp_path) == ['cat/a.jpg', 'dog/b.jpg']
  assert '3 not a regular file' in capsys.readouterr().err
  expected = [str(tmp_path / name) for name in ('cat/a.jpg', 'dog/b.jpg')]
  assert find_image_files([str(tmp_path)]) == expected


def test_a_csv_that_names_other_things_than_files_gives_bad_images(odd_files, tmp_path):
  rows = ['dog/b.jpg,x', 'cat/a.jpg,y', *(f'cat/{kind}.jpg,x' for kind in odd_files)]
  (tmp_path / 'labels.csv').write_text('\n'.join(rows), encoding='utf-8')
  source = open_source(f'csv:{tmp_path / "labels.csv"}', 'all')
  bad = []
  for i in range(len(source)):
    try:
      source[i]
    except BadImageError as error:
      bad.append(Path(error.args[0]).stem)
  assert sorted(bad) == sorted(odd_files)


def test_a_csv_that_is_not_a_regular_file_is_an_error(odd_files):
  for path in (odd_files['fifo'], '/dev/zero'):
    with pytest.raises(UserError, match='not a regular file'):
      open_source(f'csv:{path}', 'train')


def test_a_folder_without_permission_is_an_error_that_names_it(tmp_path, touch, monkeypatch):
  touch(tmp_path / 'cat' / 'a.jpg', tmp_path / 'dog' / 'b.jpg')
  scandir = os.scandir

  def refuse(path):
    if Path(path).name == 'dog':
      raise PermissionError(13, 'Permission denied', str(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  with pytest.raises(UserError, match='dog.*Permission denied'):
    find_image_files([str(tmp_path)])
  with pytest.raises(UserError, match='dog.*Permission denied'):
    open_source(f'folder:{tmp_path}', 'train')


def test_a_path_that_no_file_can_have_is_an_error(tmp_path):
  for path in ('x' * 300, '~no-such-user-here/photos', 'a\0b'):
    with pytest.raises(UserError):
      open_source(f'folder:{path}', 'train')
    with pytest.raises(UserError):
      find_image_files([path])
