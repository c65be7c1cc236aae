"""Choose the tests that only the full tier runs, from the measured durations of all tests.

    python -m pytest -n 2 -m 'not slow' --durations=0 -vv | tee durations.log
    python3 .ci/choose_full_tests.py durations.log SECONDS > tests/full_tests.txt

The most expensive tests are chosen until the others take SECONDS on one core. The cheapest case of
each test function stays, unless that is not enough: then the cheapest test of each file stays.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

LINE = re.compile(r'^([\d.]+)s (?:setup|call|teardown) +(tests/\S+::.+)$', re.MULTILINE)

cost = defaultdict(float)
for seconds, test in LINE.findall(Path(sys.argv[1]).read_text(encoding='utf-8')):
  cost[test] += float(seconds)
budget, left, chosen = float(sys.argv[2]), sum(cost.values()), set()

for group_of in (lambda test: test.partition('[')[0], lambda test: test.partition('::')[0]):
  cheapest = {}
  for test in sorted(cost, key=cost.get, reverse=True):
    cheapest[group_of(test)] = test
  for test in sorted(cost, key=cost.get, reverse=True):
    if left > budget and test not in chosen and cheapest[group_of(test)] != test:
      chosen.add(test)
      left -= cost[test]

print('\n'.join(sorted(chosen)))
print(f'{len(chosen)} of {len(cost)} tests are full; the others take {left:.0f} s', file=sys.stderr)
