"""Exit with 1 if the last test accuracy of a run is too low.

python3 .ci/check_accuracy.py RUNS_DIRECTORY PREFIX=LEAST ...
"""

import json
import sys
from pathlib import Path

for argument in sys.argv[2:]:
  prefix, least = argument.split('=')
  (path,) = Path(sys.argv[1]).glob(f'{prefix}*/metrics.jsonl')
  records = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
  accuracy = [record['test_accuracy'] for record in records if 'test_accuracy' in record][-1]
  print(f'{path.parent.name}: test accuracy {accuracy:.4f}, at least {least} expected')
  if accuracy < float(least):
    sys.exit(1)
