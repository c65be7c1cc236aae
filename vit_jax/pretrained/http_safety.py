"""Limits on what a server may do to a download."""

import ipaddress
import socket
import time
import urllib.parse
import urllib.request

from vit_jax.errors import UserError

SLOW_SECONDS = 60.0  # A download must receive SLOW_BYTES in each period of this length.
SLOW_BYTES = 64 * 2**10
HTTP_SCHEMES = ('http', 'https')


class RateLimit:
  """Checks that a download does not become so slow that it would never end."""

  def __init__(self, url: str):
    self._url, self._start, self._received = url, time.monotonic(), 0

  def add(self, count: int):
    """Count received bytes.

    Raises UserError if fewer than SLOW_BYTES arrived in the last SLOW_SECONDS.
    """
    self._received += count
    if self._received >= SLOW_BYTES:
      self._start, self._received = time.monotonic(), 0
    elif time.monotonic() - self._start > SLOW_SECONDS:
      raise UserError(
        f'{self._url}: the server sent {self._received:,} bytes in {SLOW_SECONDS:.0f} s. Try again '
        'later: the download resumes'
      )


class SafeRedirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects, but not from a public host to a private address or another scheme."""

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    """Return the redirected request. Raises UserError for a target that is not allowed."""
    old, new = (urllib.parse.urlsplit(url) for url in (req.full_url, newurl))
    if new.scheme not in HTTP_SCHEMES:
      raise UserError(f'{req.full_url} redirects to {new.scheme}://, which is not followed')
    if is_private_host(new.hostname or '') and not is_private_host(old.hostname or ''):
      raise UserError(
        f'{req.full_url} redirects to {new.hostname}, an address of a private network, which is '
        'not followed. Use that address itself if it is meant'
      )
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(request: urllib.request.Request, *, timeout: float):
  """Open a URL as `urllib.request.urlopen` does, with safe redirects."""
  return urllib.request.build_opener(SafeRedirects).open(request, timeout=timeout)


def is_private_host(host: str) -> bool:
  """Return whether a host has an address that is not reachable from the public internet."""
  return any(not ipaddress.ip_address(address).is_global for address in resolve(host))


def resolve(host: str) -> set[str]:
  """Return the addresses of a host; none if it is unknown, as behind a proxy."""
  try:
    return {info[4][0].partition('%')[0] for info in socket.getaddrinfo(host, None)}
  except OSError:
    return set()
