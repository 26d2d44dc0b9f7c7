"""Pure loss functions on arrays, usable in any JAX codebase: [..., V] logits in, [...] out.

They know no model, no trainer and no mesh; parameters may have any tree. With plain arrays:

>>> import dataclasses, functools
>>> import jax, jax.numpy as jnp
>>> from jaxdistill import losses
>>> hidden, teacher = jnp.ones((8, 4)), jax.nn.one_hot(jnp.arange(8), 16) * 5
>>> mask = jnp.arange(8) > 0
>>> @jax.jit
... @jax.value_and_grad
... def step(kernel):
...     values = losses.forward_kl(hidden @ kernel, teacher, temperature=2.0)  # [8]
...     return losses.masked_mean(values, mask).value
>>> value, gradient = step(jnp.zeros((4, 16)))
>>> print(round(float(value), 3), gradient.shape)
2.362 (4, 16)

With variables as Flax has them, a dict of dicts, one example at a time under `vmap`:

>>> def apply(variables, x):
...     dense = variables["params"]["Dense_0"]
...     return x @ dense["kernel"] + dense["bias"]
>>> variables = {"params": {"Dense_0": {"kernel": jnp.zeros((4, 16)), "bias": jnp.zeros(16)}}}
>>> def loss(variables):
...     one = lambda x, target: losses.skew_forward_kl(apply(variables, x), target, skew=0.1)
...     return losses.masked_mean(jax.vmap(one)(hidden, teacher), mask).value
>>> print(jax.tree.map(jnp.shape, jax.jit(jax.grad(loss))(variables)))
{'params': {'Dense_0': {'bias': (16,), 'kernel': (4, 16)}}}

With a model that is a tree itself, as Equinox has it; the gradient is a model again:

>>> @jax.tree_util.register_dataclass
... @dataclasses.dataclass
... class Linear:
...     weight: jax.Array
...     def __call__(self, x):
...         return x @ self.weight.T
>>> model = Linear(jnp.zeros((16, 4)))
>>> teaches = lambda model: losses.taid(model(hidden), teacher, 0.4).mean()
>>> slope = jax.jit(jax.grad(teaches))(model)
>>> print(type(slope).__name__, slope.weight.shape)
Linear (16, 4)

And inside a `shard_map`, each device with its own rows; sums and counts add up over devices:

>>> from jax.sharding import PartitionSpec as P
>>> mesh = jax.sharding.Mesh(jax.devices(), ("data",))
>>> @jax.jit
... @functools.partial(
...     jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P(),
...     check_vma=False)
... def total(weight, hidden, teacher, mask):
...     mean = losses.masked_mean(losses.adaptive_kl(hidden @ weight.T, teacher), mask)
...     return jax.lax.psum(mean, "data").value
>>> n = jax.device_count()
>>> rows = lambda x: jnp.concatenate([x] * n)
>>> sharded = total(model.weight, rows(hidden), rows(teacher), rows(mask))
>>> whole = losses.masked_mean(losses.adaptive_kl(model(hidden), teacher), mask).value
>>> print(bool(jnp.allclose(sharded, whole, rtol=1e-6)))
True
"""

from jaxdistill.kernels.columns import shared_columns
from jaxdistill.losses.advantages import (
    early_weights,
    group_advantages,
    overlong_penalty,
    spread,
    teacher_advantages,
)
from jaxdistill.losses.cross_tokenizer import (
    alm,
    chunk_sums,
    generalized_jsd_of_parts,
    sorted_distance,
    uld,
)
from jaxdistill.losses.divergences import (
    alpha_beta_divergence,
    alpha_divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from jaxdistill.losses.features import hidden_cosine, hidden_mse, layer_map, relation_kl
from jaxdistill.losses.filters import (
    init_filters,
    init_projectors,
    project,
    ted_stage1,
    ted_stage2,
)
from jaxdistill.losses.likelihood import cross_entropy, masked_mean, token_log_probability
from jaxdistill.losses.pairs import (
    Response,
    distillm,
    distillm2,
    distillm2_balance,
    distillm2_skew,
    sequence_weights,
)
from jaxdistill.losses.policy import POLICIES, Policy, kl_loss, per_mean, policy_loss
from jaxdistill.losses.preference import dpo
from jaxdistill.losses.routing import load_balancing
from jaxdistill.losses.samplers import SamplerWeights, sampler_weights
from jaxdistill.losses.sparse import (
    sampled_cross_entropy,
    sampled_reverse_kl,
    topk_generalized_kl,
    topk_kl,
)
from jaxdistill.losses.temperature import (
    cosine_lambda,
    ctkd_temperature,
    init_temperature_head,
    reverse_gradient,
    temperature_head,
)
from jaxdistill.losses.tokens import entropy, log_mass
from jaxdistill.losses.whole_rows import (
    adaptive_kl,
    alphanet,
    alphanet_value,
    decoupled_kl,
    detached_skew_reverse_kl,
    logit_mse,
    smoothed_forward_kl,
    taid,
)
from jaxdistill.types import Mean

__all__ = [
    "Mean",
    "POLICIES",
    "Policy",
    "Response",
    "SamplerWeights",
    "adaptive_kl",
    "alm",
    "alpha_beta_divergence",
    "alpha_divergence",
    "alphanet",
    "alphanet_value",
    "chunk_sums",
    "cosine_lambda",
    "cross_entropy",
    "ctkd_temperature",
    "decoupled_kl",
    "detached_skew_reverse_kl",
    "distillm",
    "distillm2",
    "distillm2_balance",
    "distillm2_skew",
    "dpo",
    "early_weights",
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "generalized_jsd_of_parts",
    "group_advantages",
    "hidden_cosine",
    "hidden_mse",
    "init_filters",
    "init_projectors",
    "init_temperature_head",
    "kl_loss",
    "layer_map",
    "load_balancing",
    "log_mass",
    "logit_mse",
    "masked_mean",
    "overlong_penalty",
    "per_mean",
    "policy_loss",
    "project",
    "relation_kl",
    "reverse_gradient",
    "reverse_kl",
    "sampled_cross_entropy",
    "sampled_reverse_kl",
    "sampler_weights",
    "sequence_weights",
    "shared_columns",
    "skew_forward_kl",
    "skew_reverse_kl",
    "smoothed_forward_kl",
    "sorted_distance",
    "spread",
    "symmetric_kl",
    "taid",
    "teacher_advantages",
    "ted_stage1",
    "ted_stage2",
    "temperature_head",
    "token_log_probability",
    "topk_generalized_kl",
    "topk_kl",
    "total_variation",
    "uld",
]
