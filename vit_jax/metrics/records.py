"""The records in metrics.jsonl: one JSON object a line, each with its step and its kind.

    {"step": 50, "kind": "train", "loss": ..., "lr": ..., "data_wait": ...}
    {"step": 900, "kind": "eval", "test_accuracy": ..., "test_loss": ..., "test_examples": ...}
    {"step": 900, "kind": "probe", "fewshot/digits_5shot": ...}
    {"step": 7, "kind": "bad_step", "left_out": "not_finite", "ids": [...]}
    {"step": 7, "kind": "unreadable", "unreadable": [...]}
    {"step": 0, "kind": "teacher", "forward_flops": ...}
    {"step": 900, "kind": "goodput", "goodput": ..., "starts": 2}

Records are output only. A run reads none of them to decide what to do next.
"""

import json
from pathlib import Path

from vit_jax.errors import UserError

KINDS = ('train', 'eval', 'probe', 'bad_step', 'unreadable', 'teacher', 'goodput')


def parse_record(line: str) -> dict | None:
  """Return the record in a line, or None if the line is not a record of a step."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or type(record.get('step')) is not int:
    return None
  return {'kind': _infer_kind(record)} | record


def _infer_kind(record: dict) -> str:
  """Return the kind of a record that was written before records had one."""
  if 'left_out' in record:
    return 'bad_step'
  if 'unreadable' in record:
    return 'unreadable'
  if 'lr' in record:
    return 'train'
  return 'probe' if any('/' in name for name in record) else 'eval'


def split_records(path: Path) -> tuple[list[dict], list[int]]:
  """Return (the records of a file, the numbers of the lines that are not records).

  A last line without a line break was cut short by a crash. It is neither. A file that does not
  exist has none.
  """
  text = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
  lines = [line for line in text.splitlines(keepends=True) if line.endswith('\n')]
  records = [parse_record(line) for line in lines]
  bad = [number for number, record in enumerate(records, start=1) if record is None]
  return [record for record in records if record is not None], bad


def read_metrics(workdir: Path, kind: str = '') -> list[dict]:
  """Return the records of a run, all or those of one kind.

  Raises UserError if a line of metrics.jsonl is not a record.
  """
  path = workdir / 'metrics.jsonl'
  records, bad = split_records(path)
  if bad:
    raise UserError(f'{path}, line {bad[0]} is not a record of a step; remove it')
  return [record for record in records if not kind or record['kind'] == kind]


def format_metrics(values: dict[str, float]) -> str:
  """Format an evaluation for the screen: 'test_accuracy 0.8693  test_examples 10,000'."""
  return '  '.join(
    f'{name} {value:,}' if isinstance(value, int) else f'{name} {value:.4f}'
    for name, value in values.items()
  )
