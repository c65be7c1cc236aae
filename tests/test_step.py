"""One update: against optax, in microbatches, and over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import ModelConfig
from vit_jax.data.mixup import make_mix
from vit_jax.models.vit import build_vit
from vit_jax.optim.losses import softmax_loss
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated, to_global
from vit_jax.step import (
  abstract_params,
  images_and_targets,
  init_state,
  predict_logits,
  skip_reasons,
  train_step,
)

SIZE, K = (8, 8), 5
MODEL = build_vit(ModelConfig(variant='mu/4', depth=2), K)
TX = optax.sgd(0.1, momentum=0.9)  # Adam's first step, a sign, would amplify rounding.


def batch_of(n: int, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (n, *SIZE, 3), dtype=np.uint8),
    'label': rng.integers(0, K, (n, 1)).astype(np.int32),
    'mask': np.ones(n, bool),
  }


def fresh(**kwargs):
  return jax.jit(
    functools.partial(
      init_state, 0, **{'model': MODEL, 'tx': TX, 'size': SIZE, 'ema': False} | kwargs
    )
  )()


def stepper(**kwargs):
  return functools.partial(
    train_step,
    **{'model': MODEL, 'tx': TX, 'loss': softmax_loss, 'lr': lambda step: 0.1, 'seed': 3} | kwargs,
  )


def assert_close(a, b, tolerance=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def nonzero_head(state):
  """Replace the zero head, with which only the head has a gradient."""
  head = jax.tree.map(lambda x: jax.random.normal(jax.random.key(9), x.shape), state.params['head'])
  return state.replace(params=state.params | {'head': head})


def test_an_update_is_the_gradient_of_the_mean_loss_through_optax():
  state, batch = nonzero_head(fresh()), batch_of(16)

  def mean_loss(params):
    logits = MODEL.apply({'params': params}, batch['image'])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'][:, 0]).mean()

  value, grads = jax.value_and_grad(mean_loss)(state.params)
  updates, opt_state = TX.update(grads, state.opt_state, state.params)
  new, metrics = jax.jit(stepper())(state, batch)
  assert_close(new.params, optax.apply_updates(state.params, updates))
  assert_close(new.opt_state, opt_state)
  assert_close(metrics['loss'], value)
  assert_close(metrics['grad_norm'], optax.tree.norm(grads))
  assert int(new.step) == 1


@pytest.mark.parametrize('parts', [2, 4])
def test_microbatches_give_the_update_of_the_full_batch(parts):
  state, batch = nonzero_head(fresh()), batch_of(16)
  batch['mask'][[1, 6, 7]] = False
  full, full_metrics = jax.jit(stepper())(state, batch)
  split, split_metrics = jax.jit(stepper(grad_accum_steps=parts))(state, batch)
  assert_close(full.params, split.params)
  assert_close(full_metrics, split_metrics)


def test_masked_examples_do_not_change_the_update():
  state, batch = nonzero_head(fresh()), batch_of(16)
  kept = {name: value[:12] for name, value in batch.items()}
  batch['mask'][12:] = False
  batch['label'][12:] = -1
  masked, metrics = jax.jit(stepper())(state, batch)
  without, _ = jax.jit(stepper())(state, kept)
  assert_close(masked.params, without.params)
  assert metrics['skipped'] == 4


def test_eight_devices_equal_one_over_twenty_steps():
  """Losses and parameters agree to 1e-5 over 'data', over 'fsdp' and over both.

  The random draws are the same.
  """
  model = build_vit(
    ModelConfig(variant='mu/4', depth=2, width=256, heads=4, dropout=0.1, drop_path=0.1), K
  )
  tx = optax.sgd(1e-2)
  mix = make_mix(mixup_alpha=0.2, cutmix_alpha=1.0, cutmix_probability=0.5)
  step = stepper(model=model, tx=tx, mix=mix)
  begin = functools.partial(fresh, model=model, tx=tx)

  def run(fsdp, devices):
    mesh, losses = make_mesh(fsdp, batches={}, devices=devices), []
    shardings = state_shardings(jax.eval_shape(begin), mesh)
    state = jax.jit(begin, out_shardings=shardings)()
    update = jax.jit(
      functools.partial(step, mesh=mesh), out_shardings=(shardings, replicated(mesh))
    )
    for k in range(20):
      state, metrics = update(state, to_global(batch_of(16, k), mesh))
      losses.append(float(metrics['loss']))
    return losses, state

  reference, state = run(1, jax.devices()[:1])
  for fsdp in (1, 2, 8):
    losses, other = run(fsdp, jax.devices())
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
    assert_close(jax.device_get(state.params), jax.device_get(other.params))


@pytest.mark.parametrize('fsdp', [1, 8])
@pytest.mark.parametrize(('dtype', 'name'), [('float32', 'f32'), ('bfloat16', 'bf16')])
def test_gradients_are_summed_over_devices_in_grad_dtype(fsdp, dtype, name):
  """Read the program before compilation: the compiler for CPUs widens bfloat16."""
  model = build_vit(ModelConfig(variant='mu/4', depth=2, width=256, heads=4, dtype='bfloat16'), K)
  begin, mesh = functools.partial(fresh, model=model), make_mesh(fsdp, batches={})
  state = jax.eval_shape(begin)
  step = jax.jit(stepper(model=model, mesh=mesh, grad_dtype=dtype))
  text = step.lower(state, jax.eval_shape(lambda: batch_of(16))).as_text()
  results = re.findall(
    r'"stablehlo\.(?:all_reduce|reduce_scatter)".*?\}\) : .*? -> (.*?)$',
    text,
    re.DOTALL | re.MULTILINE,
  )
  summed = re.findall(r'tensor<(?:\d+x)+(\w+)>', ' '.join(results))
  assert summed == [name] * len(jax.tree.leaves(state.params))


def test_random_draws_are_a_function_of_the_seed_and_the_step():
  model = build_vit(ModelConfig(variant='mu/4', dropout=0.5), K)
  state, batch = nonzero_head(fresh(model=model)), batch_of(16)
  step, other_seed = jax.jit(stepper(model=model, seed=0)), jax.jit(stepper(model=model, seed=1))
  loss = float(step(state, batch)[1]['loss'])
  assert loss == float(step(state, batch)[1]['loss'])
  assert loss != float(other_seed(state, batch)[1]['loss'])
  assert loss != float(step(state.replace(step=jnp.int32(1)), batch)[1]['loss'])


def test_a_teacher_sees_the_mixed_images_of_the_student():
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
    'label': rng.integers(0, 5, (4, 1)),
    'mask': np.array([True, True, False, True]),
  }
  options = {'classes': 5, 'mix': make_mix(mixup_alpha=1, cutmix_alpha=0, cutmix_probability=0.5)}
  key, teach = jax.random.key(1), lambda images: images.reshape(4, -1)
  images, (targets, seen) = images_and_targets(batch, key, **options, teach=teach)
  np.testing.assert_array_equal(seen, images.reshape(4, -1))
  assert np.any(images[0] != batch['image'][0])
  for ours, alone in zip((images, targets), images_and_targets(batch, key, **options), strict=True):
    np.testing.assert_array_equal(ours, alone)


def test_the_average_follows_the_parameters():
  state, batch = nonzero_head(fresh(ema=True)), batch_of(16)
  new, _ = jax.jit(stepper(ema=0.9))(state, batch)
  assert_close(new.ema, jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, state.ema, new.params))
  assert new.eval_params is new.ema
  assert fresh().eval_params is not None and fresh().ema is None


BAD = {
  # Fault of the examples of class 0 -> a function of (softmax losses [b], mask of these examples
  # [b], logits [b, k]) that returns the faulty losses [b].
  'a loss that is NaN': lambda loss, theirs, logits: loss + jnp.where(theirs, jnp.nan, 0),
  'a loss that is infinite': lambda loss, theirs, logits: loss + jnp.where(theirs, jnp.inf, 0),
  'gradients that are NaN': lambda loss, theirs, logits: (
    loss + jnp.sqrt(jnp.where(theirs, 0 * logits.sum(-1), 1))
  ),
  'gradients of 1e30': lambda loss, theirs, logits: loss * jnp.where(theirs, 1e30, 1),
}


def poisoned(kind: str):
  """Return a softmax cross-entropy with a fault for examples of class 0."""
  return lambda logits, targets: BAD[kind](softmax_loss(logits, targets), targets[:, 0] > 0, logits)


def with_bad_rows(batch: dict, *rows: int) -> dict:
  """Return the batch with class 0 in these rows and no others."""
  label = np.maximum(batch['label'], 1)
  label[list(rows)] = 0
  return batch | {'label': label}


def bits(tree) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope='module')
def poisoned_step():
  """Return (step, state) with AdamW and a moving average. `step` takes a key of `BAD` first."""
  tx, kinds = optax.adamw(1e-2), [lambda *args, kind=kind: poisoned(kind)(*args) for kind in BAD]

  def step(kind, state, batch):
    loss = lambda logits, targets: jax.lax.switch(kind, kinds, logits, targets)
    return stepper(tx=tx, loss=loss, ema=0.9)(state, batch)

  compiled = jax.jit(step)
  return lambda kind, *args: compiled(list(BAD).index(kind), *args), nonzero_head(
    fresh(tx=tx, ema=True)
  )


@pytest.mark.parametrize('kind', BAD)
def test_a_step_that_is_not_finite_changes_only_the_step_count(poisoned_step, kind):
  step, begin = functools.partial(poisoned_step[0], kind), poisoned_step[1]
  good = with_bad_rows(batch_of(16))
  state, metrics = step(begin, good)
  assert not metrics['not_finite'] and bits(state.params) != bits(begin.params)
  for in_a_row in (1, 3, 10):
    before = state
    for k in range(in_a_row):
      state, metrics = step(state, with_bad_rows(batch_of(16, k), 5))
      assert metrics['not_finite'] and not metrics['spikes']
      assert bits(state.replace(step=before.step)) == bits(before)
    assert state.step == before.step + in_a_row
    again, metrics = step(state, good)
    without, _ = step(before.replace(step=state.step), good)
    assert (
      not metrics['not_finite']
      and bits(again) == bits(without)
      and bits(again.params) != bits(state.params)
    )
    state = again


@pytest.mark.parametrize('fsdp', [1, 8])
def test_a_fault_on_one_device_skips_the_step_on_all_devices(fsdp):
  """Row 13 is on the seventh of eight devices."""
  mesh = make_mesh(fsdp, batches={})
  begin = functools.partial(init_state, 0, model=MODEL, tx=TX, size=SIZE, ema=False)
  shardings = state_shardings(jax.eval_shape(begin), mesh)
  state = jax.jit(begin, out_shardings=shardings)()
  for kind in ('a loss that is NaN', 'gradients that are NaN'):
    step = jax.jit(
      stepper(loss=poisoned(kind), mesh=mesh), out_shardings=(shardings, replicated(mesh))
    )
    new, metrics = step(state, to_global(with_bad_rows(batch_of(16), 13), mesh))
    assert metrics['not_finite']
    for shard, old in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True):
      assert [s.data.tobytes() for s in shard.addressable_shards] == [
        s.data.tobytes() for s in old.addressable_shards
      ]


def test_a_norm_whose_square_is_too_large_for_float32_is_not_finite():
  state, metrics = fresh(), jnp.float32(1)
  assert not skip_reasons(state, metrics, optax.tree.norm({'a': jnp.full(4, 1e18)}), 0.0)[
    'not_finite'
  ]
  assert skip_reasons(state, metrics, optax.tree.norm({'a': jnp.full(4, 1e20)}), 0.0)['not_finite']


def test_predictions_are_the_models_logits_without_dropout():
  model = build_vit(ModelConfig(variant='mu/4', dropout=0.5), K)
  state, images = nonzero_head(fresh(model=model)), batch_of(4)['image']
  np.testing.assert_array_equal(
    predict_logits(state.params, images, model=model),
    predict_logits(state.params, images, model=model),
  )


def test_abstract_parameters_are_those_that_initialisation_makes():
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), fresh().params)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(MODEL, SIZE))
