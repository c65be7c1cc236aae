"""Print the shell commands of README.md that follow a comment `<!-- run: NAME -->`.

python3 .ci/readme_commands.py NAME
"""

import re
import sys
from pathlib import Path

text = Path('README.md').read_text(encoding='utf-8')
commands = re.findall(rf'<!-- run: {re.escape(sys.argv[1])} -->\n```sh\n(.*?)```', text, re.DOTALL)
if not commands:
  sys.exit(f'README.md has no commands marked {sys.argv[1]!r}')
print(''.join(commands), end='')
