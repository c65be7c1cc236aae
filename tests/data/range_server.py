"""A local HTTP server with byte ranges, a latency and a bandwidth. It can fail on purpose.

    python tests/data/range_server.py FOLDER --latency=0.03 --bandwidth=1e8

It prints its port. `benchmarks/object_storage.py` starts it like that.
"""

import argparse
import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# (number of the request, its path) -> None, '503', 'cut' (the connection closes within the body),
# 'short' (a complete response to a range of too few bytes) or 'whole' (the range is ignored).
Fault = Callable[[int, str], str | None]


class RangeServer:
  """Serves the files of a folder."""

  def __init__(
    self, folder: Path, *, latency=0.0, bandwidth=float('inf'), fault: Fault | None = None
  ):
    self.folder, self.latency, self.bandwidth = folder, latency, bandwidth
    self.fault = fault or (lambda number, path: None)
    self.requests: list[tuple[str, str]] = []  # (path, range) of each request.
    self.active = self.most_active = 0
    self._free_at = 0.0  # When the line has sent all that it was given.

  async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
    with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
      try:
        while await self._respond((await reader.readuntil(b'\r\n\r\n')).decode(), writer):
          pass
      finally:
        writer.close()

  async def _respond(self, request: str, writer: asyncio.StreamWriter) -> bool:
    """Write a response. Return whether the connection stays open."""
    method, path = request.split(' ', 2)[:2]
    found = re.search(r'^range: *bytes=(\d+)-(\d+)', request, re.IGNORECASE | re.MULTILINE)
    self.requests.append((path, found[0] if found else ''))
    fault = self.fault(len(self.requests), path)
    self.active += 1
    self.most_active = max(self.most_active, self.active)
    await asyncio.sleep(self.latency)
    self.active -= 1
    file = self.folder / path.lstrip('/')
    if fault == '503' or not file.is_file():
      status = '503 Service Unavailable' if fault == '503' else '404 Not Found'
      writer.write(f'HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n'.encode())
      return True
    status, body = '200 OK', file
    with file.open('rb') as content:
      if found and fault != 'whole':
        status, first = '206 Partial Content', int(found[1])
        content.seek(first)
        body = content.read(int(found[2]) + 1 - first)
      else:
        body = content.read()
    body = body[: len(body) // 2] if fault == 'short' and found else body
    head = f'HTTP/1.1 {status}\r\nAccept-Ranges: bytes\r\nContent-Length: {len(body)}\r\n\r\n'
    body = b'' if method == 'HEAD' else body[: len(body) // 2] if fault == 'cut' else body
    now = asyncio.get_running_loop().time()
    self._free_at = max(self._free_at, now) + len(body) / self.bandwidth
    if self._free_at > now:
      await asyncio.sleep(self._free_at - now)
    writer.write(head.encode() + body)
    await writer.drain()
    return fault != 'cut'


@contextlib.contextmanager
def serving(server: RangeServer) -> Iterator[str]:
  """Serve in another thread. Yield the URL."""
  loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

  async def run():
    listener = await asyncio.start_server(server.serve, '127.0.0.1', 0)
    ports.append(listener.sockets[0].getsockname()[1])
    ready.set()
    await stop.wait()
    listener.close()

  def main():
    asyncio.set_event_loop(loop)
    loop.run_until_complete(run())
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
      task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(asyncio.sleep(0))  # The transports close.
    loop.close()

  stop = asyncio.Event()
  thread = threading.Thread(target=main)
  thread.start()
  ready.wait()
  try:
    yield f'http://127.0.0.1:{ports[0]}'
  finally:
    loop.call_soon_threadsafe(stop.set)
    thread.join()


async def _serve_forever(server: RangeServer):
  listener = await asyncio.start_server(server.serve, '127.0.0.1', 0, backlog=1024)
  print(listener.sockets[0].getsockname()[1], flush=True)
  await listener.serve_forever()


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', type=Path)
  parser.add_argument('--latency', type=float, default=0.0)
  parser.add_argument('--bandwidth', type=float, default=float('inf'), help='bytes a second')
  args = parser.parse_args()
  asyncio.run(
    _serve_forever(RangeServer(args.folder, latency=args.latency, bandwidth=args.bandwidth))
  )
