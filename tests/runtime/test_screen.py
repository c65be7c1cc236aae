"""Standard streams without a reader, closed, on a full disk, and in a locale that is not UTF-8."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCII = {'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'C'}
BEGIN = """
import os, sys
from vit_jax.runtime.screen import ignore_lost_stdout, prepare_screen, use_utf8
use_utf8()
prepare_screen()
"""
PRINT_MUCH = """
ignore_lost_stdout()
for i in range(20000):
  print(i, file=sys.stderr)
  print(i, flush=i % 100 == 0)
open(sys.argv[1], 'w').write('complete')
"""


def python(code: str, *args: str, **kwargs) -> subprocess.Popen:
  env = {name: x for name, x in os.environ.items() if not name.startswith(('LC_', 'LANG'))}
  env |= {'PYTHONPATH': str(ROOT)} | kwargs.pop('env', {})
  return subprocess.Popen([sys.executable, '-c', BEGIN + code, *args], env=env, **kwargs)


def test_a_process_outlives_the_readers_of_its_output(tmp_path):
  process = python(
    PRINT_MUCH, str(tmp_path / 'end'), stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  process.stdout.close()
  process.stderr.close()
  assert process.wait() == 0 and (tmp_path / 'end').read_text(encoding='utf-8') == 'complete'


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_process_outlives_a_full_disk_behind_its_output(tmp_path):
  with Path('/dev/full').open('wb') as full:
    process = python(PRINT_MUCH, str(tmp_path / 'end'), stdout=full, stderr=full)
    assert process.wait() == 0 and (tmp_path / 'end').read_text(encoding='utf-8') == 'complete'


@pytest.mark.parametrize('closed', ['0<&-', '1>&-', '2>&-', '0<&- 1>&- 2>&-'])
def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path, closed):
  code = BEGIN + (
    'import faulthandler; faulthandler.enable()\n'
    'file = open(sys.argv[1], "w"); print("1"); print("2", file=sys.stderr); os.write(2, b"3")\n'
    'sys.stdout.flush(); file.write("complete")'
  )
  command = ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-c', code]
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run([*command, str(tmp_path / 'end')], env=env, capture_output=True, check=True)
  assert (tmp_path / 'end').read_text(encoding='utf-8') == 'complete'


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_each_line_of_progress_is_written_at_once(unbuffered):
  code = 'print("step 1", file=sys.stderr); os.read(0, 1); os._exit(0)'
  pipes = dict.fromkeys(('stdin', 'stderr'), subprocess.PIPE)
  with python(code, env={'PYTHONUNBUFFERED': unbuffered}, **pipes) as process:
    readable = select.select([process.stderr], [], [], 60)[0]
    process.communicate(b'x')
  assert readable


def test_an_error_of_a_result_on_stdout_is_still_an_error():
  code = 'print("a"); sys.stdout.flush()'
  with Path('/dev/full').open('wb') as full:
    assert python(code, stdout=full, stderr=subprocess.DEVNULL).wait() != 0


def test_in_an_ascii_locale_names_are_utf8_and_the_screen_shows_escapes(tmp_path):
  (tmp_path / 'é').mkdir()
  code = """
from pathlib import Path
(name,) = os.listdir(sys.argv[1])
print(name, ascii(sys.argv[2]), sys.getfilesystemencoding())
print(name, '\\udcff', file=sys.stderr)
Path(sys.argv[1], name, '\\u65e5').write_text(name)
"""
  process = python(
    code, str(tmp_path), 'ü', env=ASCII, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert out == b"\\xe9 '\\xfc' utf-8\n" and err == b'\\xe9 \\udcff\n'
  assert (tmp_path / 'é' / '日').read_bytes() == 'é'.encode()


def test_the_commands_run_in_an_ascii_locale(tmp_path):
  command = [sys.executable, '-m', 'vit_jax', 'verify', str(tmp_path / 'é')]
  env = os.environ | ASCII
  done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, check=False)
  assert done.returncode == 1 and b'Traceback' not in done.stderr
  assert b'\\xe9 has no checkpoint' in done.stderr
