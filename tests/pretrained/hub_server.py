"""A local server that speaks the protocol of the Hugging Face hub, for downloads and uploads."""

import base64
import hashlib
import http.server
import json

from huggingface_hub import constants

COMMIT, OLD_COMMIT = 40 * 'a', 40 * 'b'


def stop_answering(hub, monkeypatch, problem: str | int):
  """Let the hub be out of reach ('no network', 'offline mode') or answer with a status alone."""
  if problem == 'no network':
    monkeypatch.setenv('HF_ENDPOINT', 'http://localhost:1')
  elif problem == 'offline mode':
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  else:
    hub.status = problem


class Hub(http.server.BaseHTTPRequestHandler):
  """Serve `server.repos`: {name: {file: bytes}}, with the weights behind a redirect.

  An upload changes them. `server.branches` has the files of other branches: {(name, branch): …}.
  """

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    server, path = self.server, self.path.strip('/').split('?')[0]
    server.requests.append((self.command, path))
    if server.status:
      return self.answer(server.status)
    if path.startswith('cdn/'):
      _, org, name, revision, file = path.split('/')
      return self.answer(200, self.files(f'{org}/{name}', revision)[file])
    if path.startswith('api/models/'):
      org, name, *rest = path.removeprefix('api/models/').split('/')
      return self.model_info(f'{org}/{name}', rest[1] if rest else 'main')
    org, name, _, revision, file = path.split('/')
    return self.resolve(f'{org}/{name}', revision, file)

  def model_info(self, name: str, revision: str):
    if not self.is_accessible(name, revision):
      return None
    files = [{'rfilename': file} for file in self.files(name, revision)]
    info = {'id': name, 'modelId': name, 'sha': self.commit(revision), 'siblings': files}
    return self.answer_json(info)

  def resolve(self, name: str, revision: str, file: str):
    if not self.is_accessible(name, revision):
      return None
    data = self.files(name, revision).get(file)
    if data is None:
      return self.answer(404, headers={'X-Error-Code': 'EntryNotFound'})
    headers = {'X-Repo-Commit': self.commit(revision), 'ETag': f'"{hashlib.md5(data).hexdigest()}"'}
    if not file.endswith('.safetensors'):
      return self.answer(200, data, headers)
    headers |= {
      'X-Linked-Size': str(len(data)),
      'X-Linked-ETag': f'"{hashlib.sha256(data).hexdigest()}"',
      'Location': f'http://127.0.0.1:{self.server.server_port}/cdn/{name}/{revision}/{file}',
    }
    return self.answer(302, b'', headers)

  def is_accessible(self, name: str, revision: str) -> bool:
    if name == 'org/gated' and self.headers.get('Authorization') != 'Bearer hf_token':
      self.answer(403, headers={'X-Error-Code': 'GatedRepo'})
    elif name not in self.server.repos:
      self.answer(401, headers={'X-Error-Code': 'RepoNotFound'})
    elif (
      revision not in ('main', 'v1', COMMIT, OLD_COMMIT)
      and (name, revision) not in self.server.branches
    ):
      self.answer(404, headers={'X-Error-Code': 'RevisionNotFound'})
    else:
      return True
    return False

  def files(self, name: str, revision: str) -> dict[str, bytes]:
    """Return the files of a branch, which an upload changes."""
    return self.server.branches.get((name, revision), self.server.repos[name])

  def do_POST(self):
    server, path = self.server, self.path.strip('/').split('?')[0]
    body = self.rfile.read(int(self.headers['Content-Length']))
    server.requests.append((self.command, path))
    token = self.headers.get('Authorization')
    if server.status or token != 'Bearer hf_token':
      return self.answer(server.status or (403 if token == 'Bearer hf_read' else 401))
    if path == 'api/validate-yaml':
      return self.answer_json({'errors': [], 'warnings': []})
    if path == 'api/repos/create':
      return self.create_repo(json.loads(body))
    if path.endswith('.git/info/lfs/objects/batch'):
      return self.lfs_batch(json.loads(body))
    _, _, org, name, action, revision = path.split('/')
    actions = {'branch': self.create_branch, 'preupload': self.preupload, 'commit': self.add_commit}
    return actions[action](f'{org}/{name}', revision, body)

  def do_PUT(self):
    """Store a large file, under its SHA-256."""
    if 'Content-Length' in self.headers:
      data = self.rfile.read(int(self.headers['Content-Length']))
    else:  # Chunks: the size in hexadecimal, the data, and empty lines between them.
      data = b''
      while size := int(self.rfile.readline(), 16):
        data += self.rfile.read(size)
        self.rfile.readline()
    self.server.large[hashlib.sha256(data).hexdigest()] = data
    self.answer(200)

  def create_repo(self, body: dict):
    name = f'{body["organization"]}/{body["name"]}'
    url = {'url': f'http://localhost:{self.server.server_port}/{name}'}
    if name in self.server.repos:
      return self.answer_json(url, status=409)
    self.server.repos[name] = {'.gitattributes': b'*.safetensors filter=lfs'}
    self.server.visibility[name] = body.get('visibility', 'public')
    return self.answer_json(url)

  def create_branch(self, name: str, revision: str, body: bytes):
    self.server.branches[name, revision] = dict(self.server.repos[name])
    return self.answer(200)

  def preupload(self, name: str, revision: str, body: bytes):
    files = [
      {
        'path': file['path'],
        'uploadMode': 'regular' if file['path'].endswith(('.json', '.md')) else 'lfs',
        'shouldIgnore': False,
      }
      for file in json.loads(body)['files']
    ]
    return self.answer_json({'files': files})

  def lfs_batch(self, body: dict):
    port = self.server.server_port
    objects = [
      {**each, 'actions': {'upload': {'href': f'http://localhost:{port}/large/{each["oid"]}'}}}
      for each in body['objects']
    ]
    return self.answer_json({'transfer': 'basic', 'objects': objects})

  def add_commit(self, name: str, revision: str, body: bytes):
    files = dict(self.files(name, revision))
    for line in map(json.loads, body.splitlines()):
      value = line['value']
      if line['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif line['key'] == 'lfsFile':
        files[value['path']] = self.server.large[value['oid']]
      elif line['key'] == 'deletedFile':
        del files[value['path']]
    if (name, revision) in self.server.branches:
      self.server.branches[name, revision] = files
    else:
      self.server.repos[name] = files
    return self.answer_json(
      {
        'commitUrl': f'http://localhost:{self.server.server_port}/{name}/commit/x',
        'commitOid': COMMIT,
      }
    )

  def answer_json(self, content: dict, *, status: int = 200):
    return self.answer(status, json.dumps(content).encode(), {'Content-Type': 'application/json'})

  def commit(self, revision: str) -> str:
    if revision in ('main', COMMIT):
      return COMMIT
    return (
      OLD_COMMIT if revision in ('v1', OLD_COMMIT) else hashlib.sha1(revision.encode()).hexdigest()
    )

  def answer(self, status: int, data: bytes = b'', headers: dict[str, str] | None = None):
    self.send_response(status)
    for name, value in ((headers or {}) | {'Content-Length': str(len(data))}).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def log_message(self, *args):
    pass
