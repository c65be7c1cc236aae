"""Label sets of ImageNet, against sets and sorting in plain Python on the model's logits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.imagenet import (
  imagenet_class_names,
  imagenet_real_labels,
  imagenet_subset_classes,
  imagenet_synsets,
)
from vit_jax.errors import UserError
from vit_jax.evaluate.evaluator import make_pretrained_evaluator
from vit_jax.evaluate.label_sets import (
  count_label_set_hits,
  imagenet_class_indices,
  open_label_set_benchmark,
)
from vit_jax.evaluate.predict import eval_data_config
from vit_jax.evaluate.protocols import make_label_set_protocol as open_protocol

SYNSETS = imagenet_synsets('imagenet1k')


@pytest.fixture
def model(make_model):
  """Return a model of ImageNet's 1,000 classes."""
  return make_model(imagenet_class_names('imagenet1k'))


def write_images(root: Path, names: list[str], border: int = 0) -> np.ndarray:
  """Write noise in a red frame of `border` pixels. Return it without frame, [n, 16, 16, 3]."""
  images = np.random.default_rng(0).integers(0, 256, (len(names), 16, 16, 3), np.uint8)
  for name, image in zip(names, images, strict=True):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    framed = np.pad(image, ((border, border), (border, border), (0, 0)))
    framed[..., 0] = np.pad(image[..., 0], border, constant_values=255)
    Image.fromarray(framed).save(root / name)
  return images


def by_hand(logits: np.ndarray, sets: list[set[int]], among: set[int]) -> tuple[int, int, int, int]:
  """Return (correct, correct in top 5, evaluated, skipped) of predictions `among` classes."""
  right = right5 = judged = 0
  for row, allowed in zip(logits.tolist(), sets, strict=True):
    order = sorted(among, key=lambda class_: -row[class_])
    judged += bool(allowed)
    right += bool(allowed) and order[0] in allowed
    right5 += bool(allowed) and bool(allowed & set(order[:5]))
  return right, right5, judged, len(sets) - judged


def evaluate(model, protocol: str, data: str, **where):
  evaluator, params = make_pretrained_evaluator(model, eval_data_config(model, batch=16))
  facts = {'labels': model.labels, 'classes': model.classes}
  (result,) = open_protocol(protocol, data, **facts, **where)(evaluator, params)
  return result


def assert_result(found, right: int, right5: int, judged: int, skipped: int):
  assert (found.examples, found.skipped) == (judged, skipped)
  assert {name: each.accuracy for name, each in found.scores.items()} == {
    'top1': right / judged,
    'top5': right5 / judged,
  }


def test_counts_agree_with_sets_in_plain_python():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(500, 12))
  sets = [set(rng.choice(12, rng.integers(0, 4), replace=False).tolist()) for _ in range(500)]
  labels = np.array([[*each, *[-1] * (4 - len(each))] for each in sets])
  found = count_label_set_hits(np.argsort(-logits, axis=1)[:, :5], labels)
  assert (found.correct, found.correct_top5, found.examples, found.skipped) == by_hand(
    logits, sets, set(range(12))
  )
  assert 50 < found.skipped < 250


def test_the_included_labels_have_the_published_counts():
  """46,837 of the 50,000 have a label (arXiv 2006.07159); A and R have 200 classes each."""
  sets = imagenet_real_labels()
  assert (len(sets), sum(map(bool, sets))) == (50_000, 46_837)
  assert sets[:4] == ((), (970, 795), (230, 231), (809,))
  assert {len(set(imagenet_subset_classes(which))) for which in 'ar'} == {200}
  assert [SYNSETS[i] for i in imagenet_subset_classes('a')[:2]] == ['n01498041', 'n01531178']


def test_real_accepts_any_label_of_the_set_and_skips_empty_sets(model, tmp_path):
  numbers = list(range(1, 41))
  names = [f'{SYNSETS[n % 3]}/ILSVRC2012_val_{n:08}.png' for n in numbers]
  images = write_images(tmp_path / 'val', names)
  sets = [set(imagenet_real_labels()[n - 1]) for n in numbers]
  assert not all(sets) and max(map(len, sets)) > 1  # Some are empty, and some have several.
  logits = np.asarray(model.logits(images))
  assert_result(
    evaluate(model, 'real', f'folder:{tmp_path}'), *by_hand(logits, sets, set(range(1000)))
  )


@pytest.mark.parametrize('which', ['a', 'r'])
def test_predictions_are_among_the_200_classes(model, tmp_path, which):
  among = imagenet_subset_classes(which)
  names = [f'{SYNSETS[among[i % 7]]}/{i}.png' for i in range(30)]
  images = write_images(tmp_path, names)
  sets = [{among[i % 7]} for i in range(30)]
  found = evaluate(model, which, f'folder:{tmp_path}')
  assert_result(found, *by_hand(np.asarray(model.logits(images)), sets, set(among)))
  assert len(open_label_set_benchmark(which, f'folder:{tmp_path}').class_indices) == 200


def test_v2_predicts_all_classes_and_folders_may_be_numbers(model, tmp_path):
  numbers = [0, 7, 10, 999, 31]
  images = write_images(tmp_path, [f'{numbers[i % 5]}/{i}.png' for i in range(25)])
  sets = [{numbers[i % 5]} for i in range(25)]
  assert_result(
    evaluate(model, 'v2', f'folder:{tmp_path}'),
    *by_hand(np.asarray(model.logits(images)), sets, set(range(1000))),
  )
  assert imagenet_class_indices(('10', '7'), '') == [10, 7]
  assert imagenet_class_indices(SYNSETS[5:7], '') == [5, 6]
  assert imagenet_class_indices(imagenet_class_names('imagenet1k')[5:7], '') == [5, 6]


@pytest.fixture
def objectnet(tmp_path):
  """Return (images, their label sets) of three folders, two of which are classes of ImageNet."""
  folders = {'alarm_clock': 'Alarm clock', 'air_freshener': 'Air freshener', 'tie': 'Tie'}
  mappings = tmp_path / 'mappings'
  mappings.mkdir()
  (mappings / 'folder_to_objectnet_label.json').write_text(json.dumps(folders), encoding='utf-8')
  overlap = {'Alarm clock': 'analog clock; digital clock', 'Tie': 'bow tie, bow-tie, bowtie'}
  (mappings / 'objectnet_to_imagenet_1k.json').write_text(json.dumps(overlap), encoding='utf-8')
  (mappings / 'imagenet_to_label_2012_v2').write_text(
    'kit fox\nanalog clock\nbow tie, bow-tie, bowtie\ndigital clock\n', encoding='utf-8'
  )
  order = {'278': 0, '409': 1, '457': 2, '530': 3}  # Number by synset: number in ILSVRC's order.
  (mappings / 'pytorch_to_imagenet_2012_id.json').write_text(json.dumps(order), encoding='utf-8')
  names = [f'{list(folders)[i % 3]}/{i}.png' for i in range(30)]
  images = write_images(tmp_path / 'images', names, border=2)
  return images, [[{409, 530}, set(), {457}][i % 3] for i in range(30)]


def test_objectnet_predicts_shared_classes_on_images_without_the_frame(model, tmp_path, objectnet):
  images, sets = objectnet
  found = evaluate(model, 'objectnet', f'folder:{tmp_path / "images"}')
  assert_result(found, *by_hand(np.asarray(model.logits(images)), sets, {409, 530, 457}))
  assert (found.examples, found.skipped) == (20, 10)


def test_a_missing_mapping_of_objectnet_is_a_user_error_with_the_file(tmp_path, objectnet):
  with pytest.raises(UserError, match=r'folder_to_objectnet_label.json.*--mapping'):
    open_label_set_benchmark(
      'objectnet', f'folder:{tmp_path / "images"}', mapping=str(tmp_path / 'nowhere')
    )
  with pytest.raises(UserError, match='folder:PATH/images'):
    open_label_set_benchmark('objectnet')
  (tmp_path / 'images' / 'tie').rename(tmp_path / 'images' / 'cravat')
  with pytest.raises(UserError, match="'cravat'"):
    open_label_set_benchmark('objectnet', f'folder:{tmp_path / "images"}')


def test_images_or_models_of_other_classes_are_user_errors(model, make_model, tmp_path):
  write_images(tmp_path / 'some', [f'{SYNSETS[i % 2]}/{i}.png' for i in range(4)])
  with pytest.raises(UserError, match='ILSVRC2012_val_00000001'):
    evaluate(model, 'real', f'folder:{tmp_path / "some"}')
  write_images(tmp_path / 'other', [f'{"ab"[i % 2]}/{i}.png' for i in range(4)])
  with pytest.raises(UserError, match="'a'"):
    open_label_set_benchmark('v2', f'folder:{tmp_path / "other"}')
  with pytest.raises(UserError, match='M '):
    open_label_set_benchmark('v2', f'folder:{tmp_path / "some"}').match_logits(
      ('cat', 'cow'), classes=2, source='M'
    )
  with pytest.raises(UserError, match='M has 4 classes'):
    open_label_set_benchmark('v2', f'folder:{tmp_path / "some"}').match_logits(
      (), classes=4, source='M'
    )
