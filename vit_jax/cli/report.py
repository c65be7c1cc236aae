"""The command `report`, and the page that training and evaluation write at their end."""

import argparse
import time
from pathlib import Path

from vit_jax.cli.results import check_output_paths
from vit_jax.errors import UserError, one_line
from vit_jax.runtime.files import explain_write_errors
from vit_jax.runtime.screen import print_stderr

FILE_NAME = 'report.html'


def report(args: argparse.Namespace):
  """Write report.html about a run, about several runs side by side, or about an experiment."""
  check_output_paths(to=args.to)
  workdirs = [Path(run) for run in args.runs]
  if len(workdirs) == 1 and workdirs[0].suffix == '.csv':
    print(write_experiment_report(workdirs[0], args.to))
    return
  from vit_jax.report.build import report_comparison, report_run

  if len(workdirs) == 1:
    path = Path(args.to or workdirs[0] / FILE_NAME)
    _write(report_run(workdirs[0]), path)
  else:
    path = Path(args.to or FILE_NAME)
    _write(report_comparison(workdirs), path)
  print(path)


def add_report_flag(command: argparse.ArgumentParser):
  """Add --report and --no-report."""
  command.add_argument(
    '--report',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='write report.html into the run directory at the end (default: yes)',
  )


def write_run_report(workdir: Path, watchdog):
  """Write report.html into the directory of a complete run, on the first host.

  An error is one printed line: the run is complete without the page. The watchdog has no limit for
  it, because nothing waits.
  """
  import jax

  watchdog.arm(0)
  began = time.monotonic()
  if jax.process_index():
    return
  try:
    from vit_jax.report.build import report_run

    # The other hosts do not take part, so that the model cannot be applied.
    path = workdir / FILE_NAME
    _write(report_run(workdir, with_model=jax.process_count() == 1), path)
    print_stderr(f'report: {path} ({time.monotonic() - began:.0f} s)')
  except Exception as error:
    kind = '' if isinstance(error, UserError) else f'{type(error).__name__}: '
    print_stderr(f'there is no report of {workdir}: {kind}{one_line(error)}')


def write_evaluation_report(path: str, model, source, result, facts: dict):
  """Write the page of an evaluation to a file, or as report.html into a directory."""
  from vit_jax.report.build import report_evaluation

  _write(report_evaluation(model, source, result, facts), evaluation_report_path(path))


def evaluation_report_path(path: str) -> Path:
  """Return the file for --report: `path`, or report.html in it if it is a directory."""
  return Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)


def write_experiment_report(csv: Path, path: str = '') -> Path:
  """Write the page of the CSV of an experiment, by default beside it, and return its path."""
  from vit_jax.report.experiment import report_experiment

  to = Path(path or csv.with_suffix('.html'))
  _write(report_experiment(csv), to)
  return to


def _write(page, path: Path):
  from vit_jax.report.page import write_page

  with explain_write_errors(path.parent):
    write_page(page, path)


def add(commands):
  """Add the command and its arguments."""
  command = commands.add_parser('report', help=report.__doc__, description=report.__doc__)
  command.set_defaults(function=report)
  runs = 'run directories, or one CSV of `tables`'
  command.add_argument('runs', nargs='+', metavar='RUN', help=runs)
  command.add_argument(
    '--to',
    metavar='FILE',
    help='the page to write; by default RUN/report.html, report.html for several runs, and beside '
    'a CSV',
  )
