"""The results page and its verdicts, from known numbers."""

import itertools
import statistics

import pytest

from vit_jax.paper.findings import MINI_CLAIMS, assess, format_points
from vit_jax.paper.mini import (
  FEWSHOT_METRIC,
  MINI_EXPERIMENTS,
  SWEEP,
  SWEEPS,
  MiniEffort,
  choose_rates,
  select_mini_runs,
)
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

EFFORT = MiniEffort(sources={'flowers': 'folder:photos'})


def made_up(name: str, value, seeds=EFFORT.seeds) -> list[dict]:
  """Return records of an experiment with the accuracies of `value(row, column, seed)`."""
  records = []
  for run in select_mini_runs(name, EFFORT, seeds):
    seed = run.settings['seed']
    steps = (100, 200) if name == 'pooling' else (200,)
    for metric, step in itertools.product(run.measures, steps):
      number = value(run.row, run.column, seed) * step / 200
      records.append(
        {'row': run.row, 'column': run.column, 'metric': metric, 'steps': step, 'seed': seed}
        | {'value': f'{number:.5f}', 'hours': '0.01', 'device': 'a device', 'commit': 'abc'}
        | {'config': run.config, 'digest': run_digest(run)}
      )
  return records


def verdicts(name: str, records: list[dict]) -> list[str]:
  return [claim.verdict for claim in MINI_CLAIMS[name](records)]


def test_every_experiment_has_a_section_a_plot_and_claims():
  assert [*MINI_EXPERIMENTS] == [*PAGE_SECTIONS] == [*MINI_PLOTS] == [SWEEP, *MINI_CLAIMS]


def test_the_page_has_our_numbers_the_papers_and_the_verdicts(tmp_path):
  for name in MINI_EXPERIMENTS:
    write_records_csv(
      made_up(name, lambda row, column, seed: 0.5 + 0.001 * seed), tmp_path / f'mini_{name}.csv'
    )
  (tmp_path / 'fewshot_flowers.md').write_text('# What it knows\n', encoding='utf-8')
  text = write_results_page(tmp_path, EFFORT).read_text(encoding='utf-8')
  assert '- [What it knows](fewshot_flowers.md)' in text and 'not run' not in text
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
  assert '| a larger ViT gains more from more data' in text and 'not decidable here' in text


def test_a_page_with_some_runs_says_what_is_missing(tmp_path):
  (first, *_) = records = made_up('data_size', lambda *_: 0.5, seeds=(0,))
  write_records_csv(records[:2], tmp_path / 'mini_data_size.csv')
  text = write_results_page(tmp_path, EFFORT).read_text(encoding='utf-8')
  assert f'| {first["row"]} | 50.0 | not run |' in text
  assert 'Experiment 3' in text and '1 of ' in text
  assert not (tmp_path / 'mini_scaling.png').exists()


def test_one_seed_decides_no_claim():
  for name in MINI_CLAIMS:
    for verdict in verdicts(name, made_up(name, lambda *_: 0.5, seeds=(0,))):
      assert verdict == 'not decidable yet (one seed)'


def test_verdicts_follow_from_the_numbers():
  share = {'1/16': 1, '1/4': 2, 'all': 4}
  grows = {
    'R-S': lambda n: 0.7 + 0.01 * n,
    'ViT-S': lambda n: 0.5 + 0.05 * n,
    'ViT-L': lambda n: 0.4 + 0.09 * n,
  }
  noise = {0: 0.0, 1: 0.001, 2: -0.001}
  records = made_up(
    'data_size',
    lambda row, column, seed: (
      grows[row](share[column.split(', ')[1]]) + noise[seed] * (row == 'R-S')
    ),
  )
  little, closing, larger_worse, gains, few_shot = MINI_CLAIMS['data_size'](records)
  assert (little.verdict, closing.verdict, gains.verdict, few_shot.verdict) == ('holds',) * 4
  assert larger_worse.verdict == 'holds: 1/16; does not hold: all'
  assert 'CIFAR-10, 1/16 +16.0 ± 0.1' in little.numbers  # 0.71 and 0.55.
  flat = made_up('positions', lambda row, column, seed: 0.6 + 0.05 * (row != 'none'))
  assert verdicts('positions', flat) == ['holds', 'holds']


@pytest.mark.parametrize(
  ('differences', 'small', 'verdict'),
  [
    ([], False, 'not run'),
    ([5.0], False, 'not decidable yet (one seed)'),
    ([5.0], True, 'not decidable yet (one seed)'),
    ([1.0, 1.1, 0.9], False, 'holds'),
    ([-1.0, -1.1, -0.9], False, 'does not hold'),
    ([3.0, -2.0, 0.1], False, 'not decidable here'),
    # Mean 1.5, standard error 0.5: three times it, but with two seeds 6.3 times are needed.
    ([1.0, 2.0], False, 'not decidable here'),
    ([0.1, 0.0, -0.1], True, 'holds'),
    ([0.9, -0.9, 0.0], True, 'not decidable here'),  # The interval reaches 1.5.
    ([2.0, 2.1, 1.9], True, 'does not hold'),
  ],
)
def test_a_verdict_needs_the_confidence_interval_on_one_side(differences, small, verdict):
  assert assess(dict(zip('012', differences, strict=False)), small=small) == verdict


def test_differences_are_shown_with_their_standard_error():
  values = [1.0, 2.0, 4.5]
  error = statistics.stdev(values) / 3**0.5
  assert format_points(dict(zip('012', values, strict=True))) == f'+2.5 ± {error:.1f}'
  assert (format_points({'0': -1.25}), format_points({})) == ('-1.2', 'not run')


def test_the_best_learning_rates_of_the_sweep_are_used_by_all_other_runs():
  best = {row: rates[-1] for row, (_, rates) in SWEEPS.items()}
  records = made_up(SWEEP, lambda row, column, seed: 0.5 + 0.1 * (float(column) == best[row]))
  assert {record['seed'] for record in records} == {0} and choose_rates(records) == best
  effort = MiniEffort(rates=best)
  for run in select_mini_runs('scaling', effort, (1,)):
    assert run.settings['optim.lr'] == best[run.row]
  adam, sgd, *tuned = select_mini_runs('optimizers', effort, (1,))
  assert (adam.settings['optim.lr'], sgd.settings['optim.lr']) == (best['R-S'], best['R-S SGD'])
  assert {run.settings['optim.lr'] for run in tuned} == {0.03}


def test_cells_are_means_over_seeds_at_the_last_step():
  record = lambda seed, value, steps=200: {
    'row': 'a',
    'column': 'b',
    'metric': FEWSHOT_METRIC,
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
