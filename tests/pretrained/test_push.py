"""Pushing a run to the hub: its files, its card, and what is refused, with a simulated hub."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

import vit_jax
from tests.pretrained.families import normalised
from tests.pretrained.hub_server import stop_answering
from tests.pretrained.test_export import IMAGES, STATISTICS, model
from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.pretrained.hub_upload import parse_push_name, upload_folder
from vit_jax.pretrained.model_card import RunFacts, read_run_facts
from vit_jax.pretrained.push import write_repository
from vit_jax.settings.fields import with_settings

# huggingface_hub uploads large files without Xet through a parameter that httpx calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
GOLDEN_RUN = Path(__file__).parents[1] / 'golden_run'
FACTS = RunFacts(
  config=with_settings(Config(), {'init': 'hf:google/vit@v1', 'optim.lr': 0.5}),
  data={'train.examples': 1234},
  versions={'jax': '0.10.2'},
  split='test',
  evaluation={
    'accuracy': 0.75, 'loss': 0.5, 'examples': 400, 'linear_probe': 0.625, 'majority': 0.25
  },
  step=99,
)  # fmt: skip
# Layout that has an equal model -> (settings of the model, files).
LAYOUTS = {
  'transformers': ({}, {'config.json', 'model.safetensors', 'preprocessor_config.json'}),
  'timm': ({'pool': 'map'}, {'config.json', 'model.safetensors'}),
  'vit_jax': ({'hidden_head': True}, {'model.json', 'model.npz'}),
}


def write(folder: Path, name: str = 'org/flowers', settings=None, facts=FACTS, **options) -> str:
  """Write the repository of a random model, and return its card."""
  folder.mkdir()
  options = {'command': 'vit-jax train', **options}
  write_repository(model(**(settings or {})), facts, folder, name, **options)
  return (folder / 'README.md').read_text(encoding='utf-8')


def upload(folder: Path, name: str = 'org/flowers', **options) -> str:
  return upload_folder(folder, name, **{'private': False, 'message': 'Upload'} | options)


@pytest.fixture
def token(monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_token')


@pytest.mark.parametrize('library', LAYOUTS)
def test_a_pushed_model_is_loaded_by_its_name_with_equal_logits(
  empty_hub, token, tmp_path, library
):
  settings, files = LAYOUTS[library]
  card = write(tmp_path / 'a', settings=settings)
  assert {path.name for path in (tmp_path / 'a').iterdir()} == files | {'README.md'}
  assert ModelCard(card).data.library_name == library
  assert upload(tmp_path / 'a').endswith('/org/flowers')
  assert empty_hub.repos['org/flowers'].keys() == files | {'README.md', '.gitattributes'}
  again, ours = vit_jax.load('hf:org/flowers'), model(**settings)
  np.testing.assert_array_equal(again.logits(IMAGES), ours.logits(IMAGES))
  # Each library has one way to round, which its files do not state.
  steps = dataclasses.replace(ours.preprocessing, rounding=again.preprocessing.rounding)
  assert (again.labels, again.preprocessing) == (ours.labels, steps)


def test_transformers_computes_our_logits_from_a_pushed_model(
  empty_hub, token, tmp_path, transformers
):
  import torch

  write(tmp_path / 'a')
  upload(tmp_path / 'a')
  folder = save_repository(empty_hub, tmp_path)
  theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
  with torch.no_grad():
    expected = theirs(normalised(IMAGES, **STATISTICS)).logits.numpy()
  assert list(theirs.config.id2label.values()) == list(model().labels)
  got = np.asarray(vit_jax.load('hf:org/flowers').logits(IMAGES))
  assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_timm_computes_our_logits_from_a_pushed_model(empty_hub, token, tmp_path, timm):
  import torch

  write(tmp_path / 'a', settings=LAYOUTS['timm'][0])
  upload(tmp_path / 'a')
  theirs = timm.create_model(f'local-dir:{save_repository(empty_hub, tmp_path)}', pretrained=True)
  with torch.no_grad():
    expected = theirs.eval()(normalised(IMAGES, **STATISTICS)).numpy()
  got = np.asarray(vit_jax.load('hf:org/flowers').logits(IMAGES))
  assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def save_repository(hub, tmp_path) -> Path:
  """Write what the hub has received to a folder."""
  (tmp_path / 'received').mkdir()
  for name, data in hub.repos['org/flowers'].items():
    (tmp_path / 'received' / name).write_bytes(data)
  return tmp_path / 'received'


def test_a_private_repository_and_a_branch_are_created(empty_hub, token, tmp_path):
  write(tmp_path / 'a')
  assert upload(tmp_path / 'a', private=True, revision='v2').endswith('/tree/v2')
  assert empty_hub.visibility == {'org/flowers': 'private'}
  assert empty_hub.repos['org/flowers'].keys() == {'.gitattributes'}  # The main branch.
  assert vit_jax.load('hf:org/flowers@v2').classes == 5


def test_a_second_push_replaces_the_files_of_the_first(empty_hub, token, tmp_path):
  write(tmp_path / 'a', settings=LAYOUTS['vit_jax'][0])
  write(tmp_path / 'b')
  upload(tmp_path / 'a')
  upload(tmp_path / 'b')
  files = LAYOUTS['transformers'][1]
  assert empty_hub.repos['org/flowers'].keys() == files | {'README.md', '.gitattributes'}


def test_the_card_states_data_recipe_accuracy_and_baselines(tmp_path):
  card = ModelCard(write(tmp_path / 'a', license='apache-2.0', command='vit-jax train --x=1'))
  data = card.data.to_dict()
  assert (data['pipeline_tag'], data['license']) == ('image-classification', 'apache-2.0')
  assert (data['base_model'], data['datasets']) == ('google/vit', ['fashion_mnist'])
  (result,) = card.data.eval_results
  assert (result.metric_type, result.metric_value, result.dataset_split) == (
    'accuracy', 0.75, 'test'
  )  # fmt: skip
  # Wilson's interval of 300 of 400, by hand: (0.7548 ± 0.0427) / 1.0096.
  for text in (
    '| Accuracy | 0.7500 |', '| Linear probe of the initial features | 0.6250 |',
    '| Majority class | 0.2500 |', '70.53% to 78.99%', '1,234 images', 'learning rate 0.5',
    'vit-jax train --x=1', '"é4"', 'jax 0.10.2', 'one of the 5 classes', "load('hf:org/flowers')",
  ):  # fmt: skip
    assert text in card.content, text


def test_a_card_without_a_licence_and_an_evaluation_invents_none(tmp_path):
  facts = dataclasses.replace(FACTS, evaluation={}, split='', config=Config())
  card = ModelCard(write(tmp_path / 'a', facts=facts))
  assert not {'license', 'metrics', 'model-index', 'base_model'} & card.data.to_dict().keys()
  assert 'The run has no evaluation' in card.content


def test_names_of_users_do_not_end_a_block_of_the_card(tmp_path):
  """Paths are reduced to their last part, too: a card is public."""
  run = tmp_path / 'run'
  shutil.copytree(GOLDEN_RUN, run)
  content = json.loads((run / 'config.json').read_text(encoding='utf-8'))
  content['data']['train'] = 'folder:/home/someone/private/a`|<b>'
  content['init'] = str(run / 'labels.txt')
  (run / 'config.json').write_text(json.dumps(content), encoding='utf-8')
  facts = read_run_facts(run)
  assert (facts.config.data.train, facts.config.init) == ('folder:a`|<b>', 'labels.txt')
  ours = dataclasses.replace(model(), labels=('---', '```', '</pre>', '    # x', 'é'))
  (tmp_path / 'a').mkdir()
  write_repository(ours, facts, tmp_path / 'a', 'org/x', command='vit-jax train')
  card = (tmp_path / 'a' / 'README.md').read_text(encoding='utf-8')
  assert 'someone' not in card and "`folder:a'/<b>`" in card
  assert [line for line in card.split('\n') if '```' in line] == [
    '    ["---", "```", "</pre>", "    # x", "é"]'
  ]
  assert ModelCard(card).data.library_name == 'transformers'


def test_a_run_directory_gives_the_facts_of_its_last_evaluation():
  facts = read_run_facts(GOLDEN_RUN)
  assert (facts.step, facts.split, facts.data['train.examples']) == (20, 'test', 1297)
  assert facts.evaluation['accuracy'] == 0.044 and facts.evaluation['examples'] == 500


def test_a_model_that_no_layout_has_is_refused(tmp_path):
  with pytest.raises(UserError, match='cannot be pushed: not in the layout of transformers') as e:
    write(tmp_path / 'a', settings={'patch_norm': True})
  assert 'timm' in str(e.value) and '\n' not in str(e.value)


def test_a_repository_with_other_files_is_not_changed(empty_hub, token, tmp_path):
  empty_hub.repos['org/flowers'] = {'README.md': b'', 'tokenizer.json': b'{}'}
  write(tmp_path / 'a')
  with pytest.raises(UserError, match=r'org/flowers has other files, such as tokenizer.json'):
    upload(tmp_path / 'a')
  assert empty_hub.repos['org/flowers'].keys() == {'README.md', 'tokenizer.json'}


@pytest.mark.parametrize(
  ('token', 'message'),
  [
    (None, 'needs a token with write access'),
    ('hf_read', 'may not write to org/flowers: .* member of org'),
    ('hf_wrong', 'does not accept the token: log in again'),
  ],
)
def test_a_token_that_may_not_write_is_a_one_line_error(
  empty_hub, tmp_path, monkeypatch, token, message
):
  if token:
    monkeypatch.setenv('HF_TOKEN', token)
  assert_upload_is_refused(tmp_path, message)
  assert not empty_hub.repos


@pytest.mark.parametrize(
  ('problem', 'message'),
  [
    ('no network', r'http://localhost:1 cannot be reached .* run the same command again'),
    ('offline mode', 'cannot be reached'),
    (500, 'cannot be reached'),
    (418, 'answered'),
  ],
)
def test_a_hub_that_does_not_answer_is_a_one_line_error(
  empty_hub, token, tmp_path, monkeypatch, problem, message
):
  stop_answering(empty_hub, monkeypatch, problem)
  assert_upload_is_refused(tmp_path, message)


def assert_upload_is_refused(tmp_path, message: str):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'README.md').write_text('# x', encoding='utf-8')
  with pytest.raises(UserError, match=message) as error:
    upload(tmp_path / 'a')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name', ['flowers', 'a/b/c', 'hf:org/x', 'org/x@v1', 'org/', '/x', 'org/a--b', 'org/.', 'o rg/x']
)
def test_a_name_that_is_not_org_name_is_refused(name):
  with pytest.raises(UserError, match='expected ORG/NAME'):
    parse_push_name(name)
  assert parse_push_name('my-org/vit.b_16') == 'my-org/vit.b_16'


def test_the_command_shows_what_it_would_upload_and_sends_nothing(typed, empty_hub):
  code, out, err = typed('push', str(GOLDEN_RUN), 'org/digits', '--private')
  assert code == 0, err
  assert 'would upload to org/digits (private' in out and 'nothing was uploaded' in out
  size = int(out.split('model.safetensors')[1].split()[0].replace(',', ''))
  assert size > 4 * 27_562  # The parameters of the run, in float32.
  assert 'library_name: transformers' in out and '--config.data.train=builtin:digits' in out
  assert empty_hub.requests == []


def test_the_command_uploads_the_parameters_that_the_run_evaluates(typed, empty_hub, token):
  code, out, err = typed('push', str(GOLDEN_RUN), 'org/digits', '--yes')
  assert code == 0, err
  assert '/org/digits' in out and '--init hf:org/digits IMAGE' in out
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  ours, again = (vit_jax.load(name) for name in (str(GOLDEN_RUN), 'hf:org/digits'))
  np.testing.assert_array_equal(ours.logits(images), again.logits(images))


def test_a_folder_that_is_no_run_is_refused(typed, tmp_path):
  code, _, err = typed('push', str(tmp_path), 'org/x')
  assert code == 2 and 'is not a run directory' in err
