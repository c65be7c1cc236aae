"""Words with a special meaning in a shell, YAML, gcloud, Kubernetes, Python or a terminal."""

HOSTILE = (
  "'; touch PWNED; '", '"; touch PWNED; "', '$(touch PWNED)', '`touch PWNED`', '; touch PWNED', '&& touch PWNED',
  '| touch PWNED', '> PWNED', '>PWNED', 'a\ntouch PWNED\n', '\r\ntouch PWNED\r\n', '\n', '\r', '\t', '\v\f\b\a',
  '\nEOF\ntouch PWNED\n', "\\'; touch PWNED #", '\\', '\\\n', '\\x41\\101', "it's", '"', "$'\\n'", '', ' ', '  a  b ',
  '-', '--', '-x', '--flag', '--flag=$(touch PWNED)', '-m', '# comment', 'a #b', '!!', '!$', '*', '?', '[a-z]', '{a,b}',
  '{0}', '{name}', '{{ x }}', '{% x %}', '%s%n', '~', '~root', '$HOME', '${PATH}', '${x?}', '$(NAME)', '$$', '${IFS}',
  'a: b', 'a:b', ': ', '&anchor x', '*anchor', '- item', '| block', '>- folded', '!!python/name:os.system', '--- ', '...',
  '%TAG', '@x', 'null', 'true', '1e3', '0x1f', '? key', '{a: b}', '[a, b]', 'a,b', 'a=b', 'a,only-dir=b', '^:^a:b',
  'a@b', '../../etc', '/..', 'gs://b/../c', 'gr\u00fc\u00dfe', 'e\u0301', '\u65e5\u672c', '\U0001f600', '\u2028touch PWNED', '\u202eabc',
  '\ufeff', '\x1b[31m', '\x7f', '\x85', '\udcff', '\udcc3(', 'x' * 30_000, "'" * 500, 'PATH=/x', 'a;b', 'a&b', 'a|b', '(a)', 'a)',
)  # fmt: skip
