"""The results page and its verdicts, from known numbers."""

import itertools
import math

import pytest

from vit_jax.paper.findings import MINI_FINDINGS, assess_claim
from vit_jax.paper.mini import MINI_EXPERIMENTS, MINI_FEWSHOT_METRIC, MiniEffort
from vit_jax.paper.plots import MINI_PLOTS
from vit_jax.paper.results_page import (
  PAGE_SECTIONS,
  format_markdown_cells,
  format_mean_and_std,
  summarize_records,
  write_results_page,
)
from vit_jax.paper.runner import write_records_csv
from vit_jax.paper.runs import run_digest

EFFORT = MiniEffort(photos='folder:photos')


def made_up(name: str, value) -> list[dict]:
  """Return records of an experiment with the accuracies of `value(row, column, seed)`."""
  records = []
  for run in MINI_EXPERIMENTS[name](EFFORT):
    seed = run.settings['seed']
    steps = (100, 200) if name == 'pooling' else (200,)
    for metric, step in itertools.product(run.measures, steps):
      facts = {
        'seed': seed,
        'hours': '0.01',
        'device': 'a device',
        'commit': 'abc',
        'config': run.config,
        'digest': run_digest(run),
      }
      number = value(run.row, run.column, seed) * step / 200
      records.append(
        {
          'row': run.row,
          'column': run.column,
          'metric': metric,
          'steps': step,
          'value': f'{number:.5f}',
        }
        | facts
      )
  return records


def test_every_experiment_has_a_section_a_plot_and_findings():
  assert [*MINI_EXPERIMENTS] == [*PAGE_SECTIONS] == [*MINI_PLOTS] == [*MINI_FINDINGS]


def test_the_page_has_our_numbers_the_papers_and_the_verdicts(tmp_path):
  for name in MINI_EXPERIMENTS:
    write_records_csv(
      made_up(name, lambda row, column, seed: 0.5 + 0.001 * seed), tmp_path / f'mini_{name}.csv'
    )
  (tmp_path / 'fewshot_flowers.md').write_text('# What it knows\n', encoding='utf-8')
  text = write_results_page(tmp_path, EFFORT).read_text(encoding='utf-8')
  assert '- [What it knows](fewshot_flowers.md)' in text
  for name in MINI_EXPERIMENTS:
    assert (tmp_path / f'mini_{name}.png').stat().st_size > 10_000
    assert f'![{PAGE_SECTIONS[name].title}](mini_{name}.png)' in text
  assert '50.1 ± 0.1' in text  # Ours: 50.0, 50.1 and 50.2.
  for theirs in (
    '| ViT-L/16 | 41.90 | 57.84 | 70.03 | 71.56 |',
    '| relative | 0.64032 |',
    '| ViT-B/16, 7 epochs | 224 | 84.15 |',
  ):
    assert theirs in text
  assert '| a ResNet is more accurate with little data | within chance |' in text


def test_a_page_with_some_runs_lists_what_was_not_run(tmp_path):
  write_records_csv(made_up('data_size', lambda *_: 0.5)[:2], tmp_path / 'mini_data_size.csv')
  text = write_results_page(tmp_path, EFFORT).read_text(encoding='utf-8')
  assert 'not run' in text and 'Experiment 3' not in text


def test_verdicts_follow_from_the_numbers():
  share = {'1/8': 1, '1/4': 2, '1/2': 3, '1': 4}
  grows = {
    'R-M': lambda n: 0.7 + 0.01 * n,
    'ViT-M': lambda n: 0.5 + 0.05 * n,
    'ViT-L': lambda n: 0.4 + 0.09 * n,
  }
  records = made_up(
    'data_size', lambda row, column, seed: grows[row](share[column]) + 0.001 * math.sin(7 * seed)
  )
  assert [verdict for _, verdict, _ in MINI_FINDINGS['data_size'](records)] == [
    'yes',
    'yes',
    'yes',
    'yes',
  ]
  assert (
    '16.0' in MINI_FINDINGS['data_size'](records)[0][2]
  )  # Percentage points between 0.71 and 0.55.
  flat = made_up('positions', lambda row, column, seed: 0.6 + 0.05 * (row != 'none') + 0.001 * seed)
  assert [verdict for _, verdict, _ in MINI_FINDINGS['positions'](flat)] == ['yes', 'yes']


@pytest.mark.parametrize(
  ('differences', 'small', 'verdict'),
  [
    ([], False, 'not run'),
    ([1.0, 1.1, 0.9], False, 'yes'),
    ([-1.0, -1.1, -0.9], False, 'no'),
    ([3.0, -2.0, 0.1], False, 'within chance'),
    # Mean 1.5 and standard error 1: above one standard error, and not above two.
    ([0.5, 2.5], False, 'within chance'),
    ([0.5], False, 'within chance'),
    ([1.5], False, 'yes'),
    ([0.5, -0.5], True, 'yes'),
    ([2.0, 2.1], True, 'no'),
  ],
)
def test_a_verdict_needs_twice_the_standard_error_or_one_point(differences, small, verdict):
  assert assess_claim(differences, small=small) == verdict


def test_cells_are_means_over_seeds_at_the_last_step():
  record = lambda seed, value, steps=200: {
    'row': 'a',
    'column': 'b',
    'metric': MINI_FEWSHOT_METRIC,
    'seed': seed,
    'steps': steps,
    'value': value,
  }
  assert summarize_records([record(0, 0.5), record(1, 0.6)]) == {('a', 'b'): '55.0 ± 7.1'}
  assert summarize_records([record(0, 0.1, 100), record(0, 0.2)]) == {('a', 'b'): '20.0'}
  assert summarize_records([record(0, 0.1, 100), record(0, 0.2)], by_step=True) == {
    ('a', '50 %'): '10.0',
    ('a', '100 %'): '20.0',
  }
  assert format_mean_and_std([84.16]) == '84.2'
  assert (
    format_markdown_cells({('a', 'x'): '1', ('b', 'y'): '2'})
    == '|  | x | y |\n| --- | ---: | ---: |\n| a | 1 |  |\n| b |  | 2 |'
  )
