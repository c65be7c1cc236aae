"""Low-rank adapters in every family, against NumPy and against models without adapters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import Config, LoraConfig, ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.families import build_model
from vit_jax.models.lora import (
  LoraModel,
  adapted_kernels,
  check_new_head,
  frozen_paths,
  is_adapter,
  merge_adapters,
  merge_kernel,
)
from vit_jax.optim.losses import softmax_loss
from vit_jax.sharding.fsdp import state_shardings
from vit_jax.sharding.mesh import make_mesh, replicated
from vit_jax.step import TrainState, abstract_params, train_step

K = 5
VIT = {'variant': 'mu/4', 'depth': 3}
RESNET = {'variant': 'R1.1x1', 'stem_width': 32}
FAMILIES = {
  'ViT': (VIT | {'swiglu': True, 'layer_scale': 0.1}, '.*/kernel'),
  'map pooling': (VIT | {'pool': 'map'}, '(?!head).*kernel'),
  'hybrid': ({'variant': 'R1.1+mu/8', 'stem_width': 32}, '.*(conv[123]|value|embedding)/kernel'),
  'Axial-ViT': ({'variant': 'AxialViT-mu/4', 'pool': 'gap'}, '.*(query|Dense_0)/kernel'),
  'BiT ResNet': (RESNET, '.*conv[13]/kernel'),
}
SIZE = (32, 32)
IMAGES = np.random.default_rng(7).integers(0, 256, (4, *SIZE, 3), np.uint8)


def adapted(fields: dict, **lora) -> LoraModel:
  return LoraModel(build_model(ModelConfig(**fields), K), LoraConfig(**{'rank': 2} | lora))


def random_params(model, seed: int = 0) -> dict:
  """Draw every array, so that each of them changes the logits."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    scale = 0.3 if leaf.ndim > 1 else 0.1
    return (scale * rng.normal(size=leaf.shape) + (path[-1].key == 'scale')).astype(np.float32)

  return jax.tree.map_with_path(draw, abstract_params(model, SIZE))


def numpy_merge(params: dict, scale: float) -> dict:
  """Return the parameters with W + scale · A B, block by block, by contraction over the rank."""
  flat = dict(flatten_dict(params, sep='/'))
  for path in [path for path in flat if path.endswith('lora_a')]:
    module = path.removesuffix('lora_a')
    a, b = (flat.pop(module + name).astype(np.float64) for name in ('lora_a', 'lora_b'))
    if 'encoderblock' in path:
      product = np.stack([np.tensordot(x, y, axes=1) for x, y in zip(a, b, strict=True)])
    else:
      product = np.tensordot(a, b, axes=1)
    flat[f'{module}kernel'] = (flat[f'{module}kernel'] + scale * product).astype(np.float32)
  return unflatten_dict(flat, sep='/')


def apply(model, params, **kwargs):
  return jax.jit(functools.partial(model.apply, **kwargs))({'params': params}, IMAGES)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_model_computes_with_the_sum_of_each_kernel_and_its_product(family):
  fields, targets = FAMILIES[family]
  model = adapted(fields, targets=targets, alpha=3.0)
  params = random_params(model)
  merged = numpy_merge(params, 3.0 / 2)
  expected = apply(model.base, merged)
  np.testing.assert_allclose(apply(model, params), expected, rtol=1e-4, atol=1e-4)
  plain = {path: x for path, x in flatten_dict(params, sep='/').items() if not is_adapter(path)}
  without = apply(model.base, unflatten_dict(plain, sep='/'))
  assert np.abs(expected - without).max() > 0.01
  ours = merge_adapters(flatten_dict(params, sep='/'), model.lora)
  for path, array in flatten_dict(merged, sep='/').items():
    np.testing.assert_allclose(ours[path], array, rtol=1e-6, atol=1e-6, err_msg=path)


def test_at_first_the_model_is_the_one_without_adapters_bit_for_bit():
  model = adapted(VIT)
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)['params']
  head = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  params['head']['kernel'] = head
  plain = {path: x for path, x in flatten_dict(params, sep='/').items() if not is_adapter(path)}
  base = unflatten_dict(plain, sep='/')
  expected = jax.jit(model.base.init)(jax.random.key(0), IMAGES)['params']
  expected['head']['kernel'] = head
  jax.tree.map(np.testing.assert_array_equal, base, expected)
  a = flatten_dict(params, sep='/')[
    'Transformer/encoderblock/MultiHeadDotProductAttention_1/query/lora_a'
  ]
  bound = a.shape[1] ** -0.5  # peft's kaiming_uniform_(a=sqrt(5)).
  assert 0.9 * bound < np.abs(a).max() <= bound
  np.testing.assert_array_equal(apply(model, params), apply(model.base, base))


def test_gradients_of_adapters_follow_from_the_gradient_of_the_merged_kernel():
  w, a, b, g = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(6, 2, 4), (6, 3), (3, 2, 4), (6, 2, 4)])
  )
  merged, vjp = jax.vjp(lambda w, a, b: merge_kernel(w, a, b, 0.7), w, a, b)
  dw, da, db = vjp(g)
  np.testing.assert_allclose(merged, w + 0.7 * np.einsum('ir,rhc->ihc', a, b), atol=1e-5)
  np.testing.assert_allclose(da, 0.7 * np.einsum('ihc,rhc->ir', g, b), atol=1e-5)
  np.testing.assert_allclose(db, 0.7 * np.einsum('ir,ihc->rhc', a, g), atol=1e-5)
  assert not np.any(dw)


@pytest.mark.parametrize('fields', [{'remat': 'full'}, {'remat': 'vit'}, {'unroll': 0}])
def test_remat_and_unrolling_change_no_gradient(fields):
  def gradient(**more):
    model = adapted(VIT | more, targets='.*encoderblock.*/kernel')
    loss = lambda params: jnp.sum(model.apply({'params': params}, IMAGES) ** 2)
    return jax.jit(jax.grad(loss))(random_params(model))

  first, second = gradient(), gradient(**fields)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), first, second)


def test_merged_kernels_are_not_kept_for_the_backward_pass():
  model = adapted(VIT, targets='.*MlpBlock_3/Dense_0/kernel')
  params = random_params(model)
  adapters = {p: x for p, x in flatten_dict(params, sep='/').items() if is_adapter(p)}

  def logits(adapters):
    flat = flatten_dict(params, sep='/') | adapters
    return model.apply({'params': unflatten_dict(flat, sep='/')}, IMAGES)

  _, vjp = jax.vjp(logits, adapters)
  shape = params['Transformer']['encoderblock']['MlpBlock_3']['Dense_0']['kernel'].shape
  kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape in (shape, shape[1:])]
  assert len(kept) <= 1  # The frozen kernel.


def trained_tree(params: dict, lora: LoraConfig) -> dict:
  frozen = set(frozen_paths(params, lora))
  return unflatten_dict({p: p not in frozen for p in flatten_dict(params, sep='/')}, sep='/')


def run_steps(fsdp: int, devices: int, parts: int = 1) -> tuple[TrainState, TrainState]:
  """Train for three steps. Return the states before and after."""
  model = adapted(
    VIT | {'width': 256, 'heads': 4, 'dropout': 0.1}, targets='.*encoderblock.*/kernel'
  )
  params = jax.jit(model.init)(jax.random.key(0), IMAGES)['params']
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), params['head']['kernel'].shape)
  is_trained = trained_tree(params, model.lora)
  labels = jax.tree.map(lambda keep: 'trained' if keep else 'frozen', is_trained)
  tx = optax.partition({'trained': optax.sgd(0.01), 'frozen': optax.set_to_zero()}, labels)
  average = jax.tree.map(jnp.copy, params)
  state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params), ema=average)
  mesh = make_mesh(fsdp, batches={}, devices=jax.devices()[:devices])
  shardings = state_shardings(state, mesh)
  step = jax.jit(
    functools.partial(
      *(train_step,),
      model=model,
      tx=tx,
      loss=softmax_loss,
      lr=lambda step: 0.01,
      seed=3,
      mesh=mesh,
      is_trained=is_trained,
      grad_accum_steps=parts,
      ema=0.9,
    ),
    out_shardings=(shardings, replicated(mesh)),
  )
  rng, new = np.random.default_rng(0), jax.device_put(state, shardings)
  batch = {
    'image': rng.integers(0, 256, (16, *SIZE, 3), np.uint8),
    'label': rng.integers(0, K, (16, 1)).astype(np.int32),
    'mask': np.ones(16, bool),
  }
  for _ in range(3):
    new, _ = step(new, batch)
  return state, new


def test_only_adapters_and_the_head_change_and_the_rest_stays_bit_for_bit():
  before, after = run_steps(fsdp=2, devices=4)
  lora = LoraConfig(rank=2)
  for path, old in flatten_dict(before.params, sep='/').items():
    new, average = (flatten_dict(t, sep='/')[path] for t in (after.params, after.ema))
    if path in frozen_paths(before.params, lora):
      np.testing.assert_array_equal(new, old)
      np.testing.assert_array_equal(average, old)
    else:
      assert np.any(new != old) and np.any(average != new), path


@pytest.mark.parametrize(('fsdp', 'parts'), [(1, 1), (2, 1), (8, 1), (2, 2)])
def test_eight_devices_equal_one(fsdp, parts):
  (_, one), (_, eight) = run_steps(1, 1, parts), run_steps(fsdp, 8, parts)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, one.params, eight.params)


def test_each_a_depends_on_its_path_and_the_seed_alone():
  few, many = (
    adapted(VIT, targets=targets).init(jax.random.key(5), IMAGES)['params']
    for targets in ('.*/query/kernel', '.*(query|value)/kernel')
  )
  a = [
    flatten_dict(p, sep='/')['Transformer/encoderblock/MultiHeadDotProductAttention_1/query/lora_a']
    for p in (few, many)
  ]
  np.testing.assert_array_equal(*a)


def test_the_default_targets_of_small_vits_train_at_most_two_percent():
  """ViT-S/14 with rank 16 and 5 classes: 24 kernels of 384 x 384 and a head."""
  model = LoraModel(build_model(ModelConfig(variant='S/14'), K), LoraConfig(rank=16))
  params = abstract_params(model, (224, 224))
  flat = flatten_dict(params, sep='/')
  frozen = set(frozen_paths(params, model.lora))
  trained = sum(leaf.size for path, leaf in flat.items() if path not in frozen)
  assert trained == 24 * 2 * 384 * 16 + 384 * K + K
  assert trained / sum(leaf.size for leaf in flat.values()) < 0.02


@pytest.mark.parametrize(
  ('lora', 'named'),
  [
    ({'targets': 'query/kernel'}, r"config\.lora\.targets='query/kernel'"),
    ({'targets': '.*/bias'}, r"config\.lora\.targets='\.\*/bias'"),
    ({'targets': 'head/kernel'}, r'config\.lora\.targets.*config\.lora\.train'),
    ({'train': 'heads/.*'}, r"config\.lora\.train='heads/\.\*'"),
    ({'rank': 33}, r'config\.lora\.rank=33.*32 x 32'),
  ],
)
def test_a_setting_that_fits_no_kernel_is_refused(lora, named):
  with pytest.raises(UserError, match=named):
    abstract_params(adapted(VIT | {'width': 32, 'heads': 4}, **lora), SIZE)


def test_kernels_of_heads_are_matrices_from_and_to_the_width():
  model = adapted(VIT | {'width': 32, 'heads': 4}, targets='.*(query|out|embedding)/kernel')
  flat = flatten_dict(abstract_params(model, SIZE), sep='/')
  shapes = {path.split('/')[-2]: (flat[path].shape, flat[path[:-1] + 'b'].shape)
            for path in flat if path.endswith('lora_a')}  # fmt: skip
  assert shapes == {
    'query': ((3, 32, 2), (3, 2, 4, 8)),
    'out': ((3, 4, 8, 2), (3, 2, 32)),
    'embedding': ((4, 4, 3, 2), (2, 32)),
  }
  assert len(adapted_kernels(abstract_params(model.base, SIZE), model.lora)) == 3


def test_a_new_head_has_to_be_trained():
  frozen = ['head/kernel', 'head/bias']
  with pytest.raises(UserError, match=r"config\.lora\.train=''.*head/kernel"):
    check_new_head(frozen, Config(lora=LoraConfig(rank=2, train='')))
  check_new_head(frozen, Config(lora=LoraConfig(rank=2, train=''), init_head='probe'))


def test_the_wrapped_model_has_what_training_uses_of_a_module():
  model = adapted(VIT)
  assert isinstance(model.base, nn.Module)
  assert (model.classes, model.config.variant, model.shape.width) == (K, 'mu/4', 32)
