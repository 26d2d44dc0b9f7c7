"""Routed experts: every token passes the few that its router chooses; none is dropped.

(token, choice) pairs are sorted by expert, and each expert's rows go through its own weights in one
ragged product, `jax.lax.ragged_dot`. On a mesh the experts are spread over axes. Along `tensor`,
whose devices have the same tokens, a device computes the pairs of its own experts, and what the
others made is added. Along `expert`, whose devices have tokens of their own, pairs go to the
devices of their experts and come back (`experts_exchange`). There is no capacity, so nothing
depends on how full an expert is.

Reference: Shazeer et al. 2017, arXiv 1701.06538; dropless as in MegaBlocks, Gale et al. 2022,
arXiv 2211.15841.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from jaxdistill.models import experts_exchange
from jaxdistill.models.architecture import Experts
from jaxdistill.models.kernel import array, is_kernel
from jaxdistill.sharding import EXPERT, AnyMesh, MeshAxes, current_mesh, mesh_axes, spec

_IN, _OUT = ("experts", None, "expert_mlp"), ("experts", "expert_mlp", None)


class BareKernel(nnx.Module):
    """A kernel alone: how it is multiplied is its owner's business."""

    def __init__(self, params: Mapping[str, Any]):
        self.kernel = nnx.Param(params["kernel"])


class Passed(NamedTuple):
    """What became of tokens in the experts that they pass.

    Attributes:
      shares: float32 [B, L, K], what the experts' results are multiplied with.
      experts: int32 [B, L, K], their numbers.
      neurons: [B, L, K, F], what enters `down`.
      norms: float32 [B, L, K], L2 norm over D of what leaves it.
    """

    shares: Array
    experts: Array
    neurons: Array
    norms: Array


class RoutedMLP(nnx.Module):
    """sum over chosen experts e of share_e(x) * down_e(act(gate_e(x)) * up_e(x)).

    shares = softmax(x @ router), of the chosen ones, made to add up to 1 where `normalised`; the
    router is float32 whatever the model computes in: a near tie must not depend on rounding.
    """

    def __init__(
        self, experts: Experts, activate: Callable[[Array], Array], params: Mapping[str, Any]
    ):
        self.router, self.gate = BareKernel(params["router"]), BareKernel(params["gate"])
        self.up, self.down = BareKernel(params["up"]), BareKernel(params["down"])
        self.experts, self.activate = experts, activate

    def __call__(self, x_BLD: Array, rules: Mapping[str, MeshAxes]) -> Array:
        return self._everywhere(_sum, lambda tokens, width: tokens, x_BLD, rules)

    def scores(self, x_BLD: Array) -> Array:
        """What the router makes of each token for every expert, float32 [B, L, X]."""
        return _scores(x_BLD, self.router.kernel[...])

    def passed(self, x_BLD: Array, rules: Mapping[str, MeshAxes]) -> Passed:
        """What goes on inside, for those who measure it."""
        places = lambda tokens, width: (tokens, tokens, PartitionSpec(*tokens, width), tokens)
        # Each device sees all pairs of a token, so that none has to tell another of them.
        batch = tuple(axis for axis in mesh_axes(rules["batch"]) if axis != EXPERT)
        return Passed(*self._everywhere(_look, places, x_BLD, {**rules, "batch": batch}))

    def _everywhere(
        self,
        make: Callable,
        places: Callable[[PartitionSpec, MeshAxes], Any],
        x_BLD: Array,
        rules: Mapping[str, MeshAxes],
    ) -> Any:
        """What `make` makes of the pairs, on every device; `places`: where its results lie."""
        router, dtype = self.router.kernel[...], x_BLD.dtype
        kernels = tuple(
            _array(one.kernel.get_value(), dtype) for one in (self.gate, self.up, self.down)
        )

        def run(shared, sent, split, x_BLD, *weights):
            pairs = _run(self.experts, self.activate, shared, sent, x_BLD, *weights)
            return make(pairs, shared, split, x_BLD)

        mesh = current_mesh()
        if mesh is None:
            return run((), None, (), x_BLD, router, *kernels)
        place = lambda axes, array: spec(axes, array.shape, mesh, rules)
        tokens = place(("batch", "length", None), x_BLD)
        inner, outer = place(_IN, kernels[0]), place(_OUT, kernels[2])
        shared, split = mesh_axes(inner[0]), mesh_axes(inner[2])
        sent = None
        if EXPERT in shared and EXPERT in mesh_axes(tokens[0]):
            shared = tuple(axis for axis in shared if axis != EXPERT)
            sent = experts_exchange.Devices(EXPERT, mesh.shape[EXPERT], tuple(mesh.axis_names))
        return jax.shard_map(
            functools.partial(run, shared, sent, split),
            mesh=mesh,
            in_specs=(tokens, PartitionSpec(), inner, inner, outer),
            out_specs=places(tokens, inner[2]),
            check_vma=False,
        )(x_BLD, router, *kernels)


class _Dispatched(NamedTuple):
    """One device's (token, choice) pairs, P = N * K, sorted by expert.

    Attributes:
      shares_NK, expert_NK: see `route`.
      hidden_PF: what enters `down`.
      made_PD: what leaves it; 0 where the expert is another device's.
      mine_P1: whether it is one's own.
      order_P: which pair, in the order of [N, K], is in a place.
    """

    shares_NK: Array
    expert_NK: Array
    hidden_PF: Array
    made_PD: Array
    mine_P1: Array
    order_P: Array

    def back(self, rows: Array) -> Array:
        """Rows [P, ...] of the pairs as [N, K, ...]."""
        return rows[jnp.argsort(self.order_P)].reshape(*self.expert_NK.shape, rows.shape[-1])


def _run(
    experts: Experts,
    activate: Callable[[Array], Array],
    shared: tuple[str, ...],
    sent: experts_exchange.Devices | None,
    x_BLD: Array,
    router_DX: Array,
    *kernels: Array,
) -> _Dispatched:
    """One device's part: its tokens through its experts.

    Args:
      experts: how many, and how many of them per token.
      activate: of the gate.
      shared: mesh axes that share the experts of the same tokens.
      sent: the devices that pairs go to, or None: they stay.
      x_BLD: its tokens.
      router_DX: whole.
      kernels: gate and up [X, D, F], down [X, F, D], of its experts.
    """
    count, chosen = kernels[0].shape[0], experts.chosen
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    shares_NK, expert_NK = route(experts, x_ND, router_DX)
    own = functools.partial(_own, shared, count)
    if sent is None:
        ran = _through(
            activate, lambda order: x_ND[order // chosen], own(expert_NK.ravel()), kernels
        )
        return _Dispatched(shares_NK, expert_NK, *ran)
    there = count * jax.lax.axis_size(shared) if shared else count  # experts of a device's peers
    device_P, number_P = jnp.divmod(expert_NK.ravel(), there)
    order_P = jnp.argsort(device_P)

    def apply(rows, numbers, *kernels):
        ran = _through(activate, lambda order: rows[order], own(numbers), kernels)
        return jnp.zeros_like(rows).at[ran.order_P].set(ran.made_PD, unique_indices=True)

    made_PD = experts_exchange.exchanged(
        sent, apply, x_ND[order_P // chosen], device_P[order_P], number_P[order_P], kernels
    )
    none = jnp.zeros((order_P.shape[0], 0), made_PD.dtype)
    return _Dispatched(shares_NK, expert_NK, none, made_PD, order_P >= 0, order_P)


def _own(shared: tuple[str, ...], count: int, number_P: Array) -> Array:
    """The numbers of a device's own experts; `count` for those of others."""
    number_P = number_P - (jax.lax.axis_index(shared) * count if shared else 0)
    return jnp.where((number_P >= 0) & (number_P < count), number_P, count)


class _Ran(NamedTuple):
    """Rows that went through a device's experts; see `_Dispatched`."""

    hidden_PF: Array
    made_PD: Array
    mine_P1: Array
    order_P: Array


def _through(
    activate: Callable[[Array], Array],
    rows_of: Callable[[Array], Array],
    own_P: Array,
    kernels: tuple[Array, ...],
) -> _Ran:
    """Rows, in the order that `rows_of` is given, through the experts of their numbers."""
    gate_XDF, up_XDF, down_XFD = kernels
    count = gate_XDF.shape[0]
    # Pairs of other devices' experts go behind all of one's own.
    order_P = jnp.argsort(own_P)
    sizes_X = jnp.zeros(count, jnp.int32).at[own_P].add(1, mode="drop")
    mine_P1 = (own_P[order_P] < count)[:, None]
    # What a ragged product makes of rows behind its last group is not defined: 0, on both sides.
    rows_PD = jnp.where(mine_P1, rows_of(order_P), 0)
    product = lambda rows, kernels: jax.lax.ragged_dot(rows, kernels, sizes_X)
    hidden_PF = activate(product(rows_PD, gate_XDF)) * product(rows_PD, up_XDF)
    made_PD = jnp.where(mine_P1, product(hidden_PF, down_XFD), 0)
    return _Ran(hidden_PF, made_PD, mine_P1, order_P)


def _sum(
    pairs: _Dispatched, shared: tuple[str, ...], split: tuple[str, ...], x_BLD: Array
) -> Array:
    """What the layer gives, [B, L, D]; `split`: mesh axes that share each expert's width."""
    made_NKD = pairs.back(pairs.made_PD).astype(jnp.float32)
    sum_ND = _added(jnp.einsum("NK,NKD->ND", pairs.shares_NK, made_NKD), (*shared, *split))
    return sum_ND.astype(x_BLD.dtype).reshape(x_BLD.shape)


def _look(
    pairs: _Dispatched, shared: tuple[str, ...], split: tuple[str, ...], x_BLD: Array
) -> tuple:
    """What `Passed` is made of."""
    made_NKD = pairs.back(pairs.made_PD).astype(jnp.float32)
    norms_NK = jnp.linalg.norm(_added(made_NKD, (*shared, *split)), axis=-1)
    hidden_NKF = pairs.back(jnp.where(pairs.mine_P1, pairs.hidden_PF, 0))
    parts = (pairs.shares_NK, pairs.expert_NK, _added(hidden_NKF, shared), norms_NK)
    return tuple(each.reshape(*x_BLD.shape[:2], *each.shape[1:]) for each in parts)


def _added(part: Array, axes: tuple[str, ...]) -> Array:
    """The sum over the devices along mesh axes."""
    return jax.lax.psum(part, axes) if axes else part


def filled(mesh: AnyMesh) -> float:
    """The part of a ragged product's rows that experts of the device have, where all get as many.

    The others are pairs of the devices along `tensor`, and room that a round of `expert` keeps.
    """
    room = experts_exchange.ROOM if mesh.shape.get(EXPERT, 1) > 1 else 1.0
    return 1.0 / (mesh.shape["tensor"] * room)


def route(experts: Experts, x_ND: Array, router_DX: Array) -> tuple[Array, Array]:
    """Shares, float32 [N, K], and numbers, int32 [N, K], of the experts that tokens pass."""
    shares_NX = jax.nn.softmax(_scores(x_ND, router_DX), axis=-1)
    shares_NK, expert_NK = jax.lax.top_k(shares_NX, experts.chosen)
    if experts.normalised:
        shares_NK = shares_NK / jnp.sum(shares_NK, axis=-1, keepdims=True)
    return shares_NK, expert_NK


def _scores(x: Array, router_DX: Array) -> Array:
    return x.astype(jnp.float32) @ router_DX.astype(jnp.float32)


def _array(kernel: Any, dtype: Any) -> Array:
    """A kernel as numbers: ragged products have no quantised form here."""
    return array(kernel).astype(dtype) if is_kernel(kernel) else kernel
