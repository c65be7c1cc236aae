"""Words of a command as text that a shell reads back to the byte."""

import os
import re
import shlex

_VISIBLE = re.compile(rb'[\x20-\x7e]*')
_ESCAPED = re.compile(rb'[^\x20-\x26\x28-\x5b\x5d-\x7e]')  # Also the quote and the backslash.


def quote_word(word: str) -> str:
  """Quote a word for bash, on one line of ASCII.

  A newline in a word would end a comment, and tools that read a script as text change carriage
  returns and other encodings. Such bytes are therefore escaped as in $'caf\\303\\251'.
  """
  data = os.fsencode(word)
  if _VISIBLE.fullmatch(data):
    return shlex.quote(word)
  escaped = _ESCAPED.sub(lambda match: b'\\%03o' % match[0][0], data)
  return f"$'{escaped.decode()}'"


def join_words(words: list[str] | tuple[str, ...]) -> str:
  """Quote words and join them with spaces."""
  return ' '.join(map(quote_word, words))


def format_command(command: list[str]) -> str:
  """Format a command as a user would type it, with one flag a line if it is long."""
  # Quote the value only: --command='…'.
  words = [re.sub(r"^(\$?')(--\w[\w-]*=)", r'\2\1', quote_word(word)) for word in command]
  return wrap_words(words)


def wrap_words(words: list[str]) -> str:
  """Join quoted words, with one flag a line if they are long."""
  if len(' '.join(words)) <= 110:
    return ' '.join(words)
  lines = [words[0]]
  for word in words[1:]:
    lines = [*lines, word] if word.startswith('--') else [*lines[:-1], f'{lines[-1]} {word}']
  return ' \\\n  '.join(lines)
