r"""
Value and image gradient of a patch potential, chunk by chunk.

For an image :math:`x` with patches :math:`P_1 x, \dots, P_n x` the potential is the mean negative log-likelihood

.. math::

    g(x) = \frac{1}{n} \sum_{i=1}^n h(P_i x), \qquad h(p) = \tfrac12 \|z\|^2 - \log|\det J(p)|, \quad (z, \log|\det J|) = f(p)

of a flow :math:`f` (without the constant :math:`\tfrac D2 \log 2\pi`). Patches are taken in raster order, a chunk at a
time, so that memory does not grow with the image. Flows whose every part is known are evaluated by derivatives written out
(:mod:`deepinv_flows.patchnr.fused`), others by autograd inside each chunk. Second derivatives are autograd's, each chunk
recomputed in the backward pass.
"""

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from ..flows import nll
from .fused import patch_sums, steps_of
from .patches import PatchIndex

_UNUSED = {"allow_unused": True, "materialize_grads": True}  # the global scale of a GIN block


def weights_need_grad(flow: nn.Module) -> bool:
    """Whether autograd is recording and any weight of the flow asks for a gradient."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in flow.parameters())


def image_nll(
    flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int | None = None, precision: str | None = None
) -> Tensor:
    """
    Mean negative log-likelihood (B,) over the patches of each image, differentiable in all that asks for it.

    :param torch.nn.Module flow: flow on (N, D).
    :param torch.Tensor x: images (B, C, H, W).
    :param PatchIndex index: the patches to take.
    :param int chunk_size: patches at a time; ``None`` chooses.
    :param str precision: ``"bfloat16"`` for matrix products in it, where only the image needs a gradient and the
        hardware has them; so does autocast. ``None`` for the dtype of the weights.
    """
    params = dict(flow.named_parameters())
    if _transformed(x, *params.values()):
        return _checkpointed_nll(flow, x, index, len(index))
    trainable = weights_need_grad(flow)
    if trainable and (torch.is_autocast_enabled(x.device.type) or steps_of(flow) is None):
        return _checkpointed_nll(flow, x, index, chunk_size)
    if trainable or (x.requires_grad and torch.is_grad_enabled()):
        return _ImageNLL.apply(x, flow, index, chunk_size, precision, tuple(params), *params.values())
    with torch.no_grad():
        steps = steps_of(flow)
        if steps is None:
            return _autograd_sums(flow, x, index, chunk_size, image=False)[0]
        value = patch_sums(
            steps, x, index, _fused_chunk(chunk_size, x, steps), _product_dtype(x, precision), False
        ).value
    return (value * index.weight).to(x.dtype)


def value_and_grad(
    flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int | None = None, precision: str | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`image_nll` and its gradient in the image, together and without a graph; the weights are constants."""
    with torch.no_grad():
        steps = steps_of(flow)
        if steps is None:
            return _autograd_sums(flow, x, index, chunk_size, image=True)
        sums = patch_sums(steps, x, index, _fused_chunk(chunk_size, x, steps), _product_dtype(x, precision))
    return (sums.value * index.weight).to(x.dtype), sums.grad.mul_(index.weight).view_as(x).to(x.dtype)


def differentiable_grad(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int | None = None) -> Tensor:
    """Gradient of :func:`image_nll` in the image, itself differentiable in the image and in the weights."""
    return _gradients(flow, dict(flow.named_parameters()), (), x, x.new_ones(index.batch), index, chunk_size)[0]


class _ImageNLL(torch.autograd.Function):
    """
    :func:`image_nll` with its gradients computed at once, and recomputed with a graph only when the backward pass asks
    for one. What a caller will weigh the images of a batch by is not known yet: gradients in the weights are kept for each.
    Single patches are too many for that; they are taken to count alike, as in a mean, and recomputed if they do not.
    """

    @staticmethod
    def forward(ctx, x, flow, index, chunk_size, precision, names, *values):
        params = dict(zip(names, values))
        trainable = [name for name in names if params[name].requires_grad]
        if trainable:
            value, *grads = _all_grads(flow, params, trainable, x, index, chunk_size)
        else:
            value, *grads = value_and_grad(flow, x, index, chunk_size, precision)
        ctx.save_for_backward(x, *values, *grads)
        ctx.call = flow, index, chunk_size, names, trainable
        return value

    @staticmethod
    def backward(ctx, scale):
        flow, index, chunk_size, names, trainable = ctx.call
        x, *tensors = ctx.saved_tensors
        values, grads = tensors[: len(names)], tensors[len(names) :]
        params = dict(zip(names, values))
        if torch.is_grad_enabled():
            grads = _gradients(flow, params, trainable, x, scale, index, chunk_size)
        elif trainable and index.per_image == 1 and (scale != scale[0]).any():
            grads = _scaled_grads(flow, params, trainable, x, scale, index, chunk_size)
        else:
            grads = _weighted(grads, scale)
        weight_grads = dict(zip(trainable, grads[1:]))
        return grads[0], None, None, None, None, None, *(weight_grads.get(name) for name in names)


def _weighted(grads, scale: Tensor) -> list[Tensor]:
    """The gradient in a batch of images, and those in the weights, from those of each image or of all together."""
    grad, *weight_grads = grads
    parts = (g * scale[: len(g)].view(-1, *[1] * (g.ndim - 1)) for g in weight_grads)
    return [grad * scale.view(-1, *[1] * (grad.ndim - 1)), *(g.sum(0) for g in parts)]


def _all_grads(flow, params: dict, wanted, x: Tensor, index: PatchIndex, chunk_size: int | None) -> list[Tensor]:
    """
    Values (B,), gradient like x, and the gradients in the ``wanted`` parameters: for each image (B, ...), of single patches
    for all together (1, ...).
    """
    aliases, steps = _trainable_steps(flow, params, wanted)
    parts = []
    for part, own in [(x, index)] if index.per_image == 1 else [(image[None], index.single()) for image in x]:
        sums = patch_sums(steps, part, own, _fused_chunk(chunk_size, x, steps), weights=True)
        grads = [g[None] for g in _in_parameters(steps, sums.grads, aliases)]
        parts.append(
            [(sums.value * index.weight).to(x.dtype), *(g * index.weight for g in [sums.grad.view_as(part), *grads])]
        )
    return [torch.cat(pieces) for pieces in zip(*parts)]


def _scaled_grads(flow, params: dict, wanted, x: Tensor, scale: Tensor, index: PatchIndex, chunk_size: int | None):
    """Gradients of sum_b scale_b g(x_b) in the image and in the ``wanted`` parameters."""
    aliases, steps = _trainable_steps(flow, params, wanted)
    sums = patch_sums(steps, x, index, _fused_chunk(chunk_size, x, steps), weights=True, scale=scale)
    grads = _in_parameters(steps, sums.grads, aliases)
    return [g * index.weight for g in [sums.grad.view_as(x), *grads]]


def _trainable_steps(flow, params: dict, wanted) -> tuple[list[Tensor], list]:
    """Aliases of the ``wanted`` parameters, and the flow's steps on them: the parameters' own hooks are for what reaches them."""
    aliases = {name: p.detach().requires_grad_(name in wanted) for name, p in params.items()}
    with torch.enable_grad():
        steps = under(flow, aliases, steps_of)
    return [aliases[name] for name in wanted], steps


def _in_parameters(steps: list, grads: list[list[Tensor]], weights) -> tuple[Tensor, ...]:
    """Gradients in the flow's parameters from those in the packed weights."""
    pairs = [(w, g) for step, own in zip(steps, grads) for w, g in zip(step.packed, own) if w.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(w) for w in weights)
    packed, packed_grads = zip(*pairs)
    return torch.autograd.grad(packed, weights, packed_grads, retain_graph=True, **_UNUSED)


class _Under(nn.Module):
    def __init__(self, flow: nn.Module, function):
        super().__init__()
        self.flow, self.function = flow, function

    def forward(self, *args):
        return self.function(self.flow, *args)


def under(flow: nn.Module, params: dict[str, Tensor], function, *args):
    """``function(flow, *args)`` with these parameters in the flow's place."""
    named = {f"flow.{name}": value for name, value in params.items()}
    return torch.func.functional_call(_Under(flow, function), named, args)


def _gradients(flow, params: dict, wanted, x: Tensor, scale: Tensor, index: PatchIndex, chunk_size: int | None):
    """
    Gradients of sum_b scale_b g(x_b) in the image and in the ``wanted`` parameters, differentiable in all of them: partial
    ones, also where x and scale depend on the parameters.
    """
    if len(index) > _autograd_chunk(chunk_size, x):
        return _Gradient.apply(x, scale, flow, index, chunk_size, tuple(params), tuple(wanted), *params.values())
    with torch.enable_grad():
        return _recorded_grads(flow, params, wanted, x, scale, index, torch.arange(len(index), device=x.device))


def _recorded_grads(flow, params: dict, wanted, x, scale, index: PatchIndex, number: Tensor) -> tuple[Tensor, ...]:
    """What the patches of these numbers contribute to :func:`_gradients`, as a graph of any order."""
    image, pixels = index(number)
    patches = x.reshape(-1)[pixels]
    if not patches.requires_grad:
        patches.requires_grad_()
    aliases = {name: params[name].view_as(params[name]) for name in wanted}
    value = (under(flow, {**params, **aliases}, nll, patches, False) * scale[image]).sum() * index.weight
    patch_grad, *rest = torch.autograd.grad(value, [patches, *aliases.values()], create_graph=True, **_UNUSED)
    grad = x.new_zeros(x.numel()).index_add(0, pixels.reshape(-1), patch_grad.reshape(-1))
    return grad.view_as(x), *rest


class _Gradient(torch.autograd.Function):
    """
    :func:`_gradients` of more than a chunk. The backward pass is a Hessian-vector product, each chunk with a graph of its
    own: torch's checkpoints, which it takes for still higher derivatives, keep what they recompute until all chunks are done.
    """

    @staticmethod
    def forward(ctx, x, scale, flow, index, chunk_size, names, wanted, *values):
        params = dict(zip(names, values))
        ctx.save_for_backward(x, scale, *values)
        ctx.call = flow, index, _autograd_chunk(chunk_size, x), names, wanted
        ctx.random = torch.get_rng_state(), *get_device_states(x)
        if wanted:
            return tuple(_scaled_grads(flow, params, wanted, x, scale, index, chunk_size))
        return tuple(_weighted([under(flow, params, value_and_grad, x, index, chunk_size)[1]], scale))

    @staticmethod
    def backward(ctx, *directions):
        flow, index, size, names, wanted = ctx.call
        recorded = torch.is_grad_enabled()
        x, scale, *values = (
            t.view_as(t) if recorded and t.requires_grad else t.detach().requires_grad_(k < 2 or t.requires_grad)
            for k, t in enumerate(ctx.saved_tensors)
        )
        params = dict(zip(names, values))
        trainable = [name for name in names if params[name].requires_grad]
        targets = [x, scale, *(params[name] for name in trainable)]

        def chunk(number, *directions):
            grads = _recorded_grads(flow, params, wanted, x, scale, index, number)
            return torch.autograd.grad(grads, targets, directions, create_graph=recorded, **_UNUSED)

        total = None
        with torch.enable_grad(), _replayed(x, *ctx.random):
            for number in index.chunks(size):
                if recorded and not trainable:
                    parts = checkpoint(chunk, number, *directions, use_reentrant=False)
                else:
                    parts = chunk(number, *directions)
                total = parts if total is None else [a + b for a, b in zip(total, parts)]
        weight_grads = dict(zip(trainable, total[2:]))
        return *total[:2], None, None, None, None, None, *(weight_grads.get(name) for name in names)


@contextlib.contextmanager
def _replayed(x: Tensor, state: Tensor, devices: list, states: list):
    """What is random in a flow, as dropout, is drawn as it was."""
    with torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
        torch.set_rng_state(state)
        set_device_states(devices, states)
        yield


def _checkpointed_nll(flow: nn.Module, x: Tensor, index: PatchIndex, chunk_size: int | None) -> Tensor:
    def chunk(flat, number):
        image, pixels = index(number)
        values = nll(flow, flat.index_select(0, pixels.reshape(-1)).view_as(pixels), constant=False)
        return values if index.per_image == 1 else values.new_zeros(index.batch).index_add(0, image, values)

    flat, size = x.reshape(-1), _autograd_chunk(chunk_size, x)
    if len(index) <= size:
        return chunk(flat, next(index.chunks(size))) * index.weight
    parts = [checkpoint(chunk, flat, number, use_reentrant=False) for number in index.chunks(size)]
    return (torch.cat(parts) if index.per_image == 1 else sum(parts)) * index.weight


def _transformed(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation or a transform of :mod:`torch.func` is under way: they see no autograd.Function."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(t) or forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _autograd_sums(flow, x: Tensor, index: PatchIndex, chunk_size: int | None, image: bool):
    """Value (B,) and, if asked for, gradient of :func:`image_nll`, by autograd inside each chunk."""
    flat = x.detach().reshape(-1)
    total = torch.zeros(index.batch, dtype=torch.float64 if x.device.type != "mps" else x.dtype, device=x.device)
    grad = torch.zeros_like(flat) if image else None
    for numbers in index.chunks(_autograd_chunk(chunk_size, x)):
        number, pixels = index(numbers)
        with torch.set_grad_enabled(image):
            patches = flat[pixels].requires_grad_(image)
            values = nll(flow, patches, constant=False)
        if image:
            (patch_grad,) = torch.autograd.grad(values.sum(), patches)
            grad.index_add_(0, pixels.reshape(-1), patch_grad.reshape(-1))
        total.index_add_(0, number, values.detach().to(total.dtype))
    return (total * index.weight).to(x.dtype), grad.mul_(index.weight).view_as(x) if image else None


def _product_dtype(x: Tensor, precision: str | None) -> torch.dtype | None:
    """The dtype of matrix products that autocast or the user allow, if it is fast here: else ``None``."""
    device, wanted = x.device.type, None if precision is None else getattr(torch, precision)
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
    if device == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = wanted == torch.bfloat16 and (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
        return wanted if fast and x.dtype != torch.float64 else None
    return wanted if x.dtype != torch.float64 else None


def _fused_chunk(chunk_size: int | None, x: Tensor, steps: list) -> int:
    width = max((len(w) for step in steps for w in step.packed if w.ndim == 2), default=1)
    # hidden layers that fit into a core's cache, products that outlast the call to them
    return chunk_size or (min(max(2**18 // width, 1024), 4096) if x.device.type == "cpu" else 32768)


def _autograd_chunk(chunk_size: int | None, x: Tensor) -> int:
    return chunk_size or (2048 if x.device.type == "cpu" else 65536)
