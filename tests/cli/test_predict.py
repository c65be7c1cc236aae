"""The output of `predict` while it runs."""

import csv
import json

from vit_jax.cli.predict import _write_predictions
from vit_jax.evaluate.predict import Prediction


def test_rows_are_in_the_files_before_the_next_image_is_predicted(tmp_path, capsys):
  json_path, csv_path = tmp_path / 'out.json', tmp_path / 'out.csv'
  paths, rows_before = [f'{i}.jpg' for i in range(5)], []

  def predictions():
    for path in paths:
      rows_before.append(csv_path.read_text(encoding='utf-8').count('\n') - 1)
      assert json_path.read_text(encoding='utf-8').count('"path"') == rows_before[-1]
      yield (
        Prediction(path, ('cat',), (0.75,)) if path != '3.jpg' else Prediction(path, error='bad')
      )

  unreadable = _write_predictions(
    predictions(), paths, json_path=str(json_path), csv_path=str(csv_path)
  )
  assert rows_before == [0, 1, 2, 3, 4] and unreadable == 1
  with csv_path.open(encoding='utf-8', newline='') as file:
    rows = list(csv.reader(file))
  assert rows[1] == ['0.jpg', '1', 'cat', '0.75', ''] and rows[4] == ['3.jpg', '', '', '', 'bad']
  objects = [
    {'path': path, 'predictions': [{'label': 'cat', 'probability': 0.75}]} for path in paths
  ]
  objects[3] = {'path': '3.jpg', 'error': 'bad'}
  assert json_path.read_text(encoding='utf-8') == json.dumps(objects, indent=1) + '\n'
  assert capsys.readouterr().out.splitlines()[0].split() == ['0.jpg', '75.00%', 'cat']
