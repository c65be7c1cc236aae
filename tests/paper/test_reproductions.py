"""Every table and figure is listed, and its printed commands can be run.

Commands parse, models of configs can be built, and steps can be traced.
"""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from tests.test_configs import assert_a_step_traces
from vit_jax.__main__ import build_parser
from vit_jax.cli.jobs import parse_config_flags
from vit_jax.config import Config
from vit_jax.config_checks import validate
from vit_jax.data.dataset_sizes import DATASET_SIZES
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.optim.durations import total_steps
from vit_jax.paper.full_scale import replace_jft, uses_jft
from vit_jax.paper.published import parse_first_number
from vit_jax.paper.reproductions import (
  REPRODUCTIONS,
  expand_runs,
  find_reproduction,
  format_dry_run,
  list_reproductions,
  reproduction_paper_cells,
  run_exaflops,
)
from vit_jax.paper.runs import run_digest

WITH_RUNS = [name for name, each in REPRODUCTIONS.items() if each.make_runs]
QUICK = ('8', 'fig9', 'fig10')  # Each traces in one or two seconds.


def commands(name: str) -> list[list[str]]:
  """Return the printed commands without those that repeat another with other rates or seeds."""
  found = {}
  for line in format_dry_run(name, root=Path('runs/tables'), standin=False):
    if line.startswith('python'):
      found.setdefault(
        re.sub(r'(optim.lr|seed|init|workdir)=\S+|--init \S+', '', line), shlex.split(line)
      )
  return [*found.values()]


def configs(name: str) -> list[Config]:
  """Return the printed configs of a reproduction, read as the command line reads them."""
  return [
    parse_config_flags(words[4:-1])
    for words in commands(name)
    if words[1:4] == ['-m', 'vit_jax', 'train']
  ]


def test_every_table_and_figure_of_the_paper_is_listed():
  listed = {row[0] for row in list_reproductions()}
  assert listed == {f'Table {i}' for i in range(2, 10)} | {f'Figure {i}' for i in range(2, 15)} | {
    '§4.6',
    'Table 3 of augreg',
    'Table 1 of plain ViT',
    'Table 1 of GSAM',
    'Results of distill',
  }


@pytest.mark.parametrize('row', list_reproductions(), ids=lambda row: row[0])
def test_a_listed_item_has_its_command_its_needs_and_its_status(row):
  assert all(row)
  assert ('not reproducible outside Google' in row[-1]) == ('folder:jft' in row[3])


@pytest.mark.parametrize('name', WITH_RUNS)
def test_printed_commands_are_valid_and_their_configs_build(name):
  assert commands(name)
  for words in commands(name):
    assert words[:3] == ['python', '-m', 'vit_jax']
    _, settings = build_parser().parse_known_args(words[3:])
    assert all(setting.startswith('--config') for setting in settings)
  for config in configs(name):
    config = validate(config)
    examples, classes, _ = DATASET_SIZES[config.data.train]
    assert total_steps(config, examples) > 0
    build_model(config.model, classes).shape.grid(config.data.size)


def different(name: str) -> list[Config]:
  """Return one printed config for each kind of program.

  Their blocks run in a loop, which traces quickly and has the same parameters.
  """
  found = {}
  for config in configs(name):
    model = dataclasses.replace(
      config.model, unroll=1 if config.model.unroll == 0 else config.model.unroll
    )
    key = (repr(model), config.data.size, config.optim.name, config.loss, config.optim.ema > 0)
    found.setdefault(key, dataclasses.replace(config, model=model))
  return [*found.values()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in WITH_RUNS],
)
def test_a_step_of_every_printed_config_traces(name):
  for config in different(name):
    examples, classes, _ = DATASET_SIZES[config.data.train]
    assert_a_step_traces(validate(config), classes=classes, steps=total_steps(config, examples))


def test_the_stand_in_replaces_jft_and_nothing_else():
  runs = REPRODUCTIONS['5'].make_runs()
  assert uses_jft(runs) and not uses_jft([replace_jft(run) for run in runs])
  of_imagenet = [run for run in runs if 'JFT' not in run.row]
  assert [run_digest(replace_jft(run)) for run in of_imagenet] == [
    run_digest(run) for run in of_imagenet
  ]


def test_a_pre_training_run_that_several_runs_start_from_is_listed_once():
  """Table 5 pre-trains 14 models, and fine-tunes each on five data sets.

  Fine-tuning takes four learning rates, then three seeds.
  """
  runs = [*expand_runs(REPRODUCTIONS['5'].make_runs())]
  assert len(runs) == 14 + 14 * 5 * (4 + 3)
  assert len({run_digest(run) for run in runs}) == len(runs)


def test_the_cost_of_pre_training_is_table_6s():
  start = next(
    run
    for run in expand_runs(REPRODUCTIONS['6'].make_runs())
    if run.config == 'configs/pretrain.py:B/16,jft,7'
  )
  assert run_exaflops(start) == pytest.approx(224, rel=0.01)


def test_the_cost_of_distillation_has_the_teachers_forward_pass():
  """Table 6: exaFLOPs of 7 epochs of JFT-300M, 303 million images, three passes each."""
  student, teacher = 50 / (7 * 303e6), 563 / 3 / (7 * 303e6)
  (run,) = [run for run in REPRODUCTIONS['distill'].make_runs() if run.row == 'BiT-R50x1 at 224']
  images = 9600 * 0.98 * 1_281_167
  assert run_exaflops(run) == pytest.approx(images * (student + teacher), rel=0.03)


def test_the_cost_of_the_axial_models_is_figure_13s():
  """They agree to 0.5 %, except for two models.

  ResNet50 agrees to 2 %: it has 50 exaFLOPs in Table 6 and 51.0 in Figure 13. Our AxialResNet50 is
  7 % below the figure.
  """
  theirs = reproduction_paper_cells('fig13')
  costs = {
    run.row: run_exaflops(run) / float(theirs[run.row, 'exaFLOPs'])
    for run in REPRODUCTIONS['fig13'].make_runs()
  }
  assert costs.pop('ResNet50') == pytest.approx(1, rel=2e-2)
  assert costs.pop('AxialResNet50') == pytest.approx(0.927, abs=0.005)
  assert len(costs) == 4 and list(costs.values()) == pytest.approx([1] * 4, rel=5e-3)


def test_a_dry_run_prints_the_papers_numbers_beside_ours():
  lines = [*format_dry_run('fig13', root=Path('runs'), standin=False)]
  assert '# AxialViT-B/16, ImageNet 5-shot (the paper: 65.79)' in lines
  assert any(line.startswith('#   426 exaFLOPs (the paper: 426.8), ') for line in lines)


def test_chip_hours_are_the_flops_divided_by_the_used_share_of_the_peak():
  lines = [*format_dry_run('fig10', root=Path('runs'), standin=False, chip='v5p', mfu=0.5)]
  exa, hours = (
    float(re.search(rf'([\d,]+) {what}', lines[-1])[1].replace(',', ''))
    for what in ('exaFLOPs', 'chip-hours')
  )
  assert hours == pytest.approx(exa * 1e18 / 0.5 / 459e12 / 3600, rel=1e-3)


@pytest.mark.parametrize(
  'name',
  [
    *('2', '5', '6', '7', '8', '9', 'fig2', 'fig3', 'fig5', 'fig13', 'selfsupervision'),
    *('augreg', 'plain_vit', 'sam', 'distill'),
  ],
)
def test_the_paper_has_a_number_for_every_cell_of_our_runs(name):
  theirs = reproduction_paper_cells(name)
  places = {(run.row, run.column) for run in REPRODUCTIONS[name].make_runs()}
  assert places and not [
    place for place in places if parse_first_number(theirs.get(place, '')) is None
  ]


def test_a_table_or_figure_is_found_by_any_common_spelling():
  assert find_reproduction('Table5') is find_reproduction('5') and find_reproduction(
    'figure4'
  ) is find_reproduction('fig4')
  with pytest.raises(UserError, match='no such table or figure'):
    find_reproduction('fig99')
