"""Learned primal-dual reconstruction on deepinv's blocks."""

import torch
from deepinv.models import PDNet_DualBlock, PDNet_PrimalBlock
from deepinv.utils import TensorList
from torch import Tensor, nn

from ..checks import positive_int, randomness
from .base import Iteration, Problem
from .optimizer import Optim


def _joined(y: Tensor | TensorList) -> Tensor:
    """Stacked measurements as one tensor, joined along their channels."""
    if torch.is_tensor(y):
        return y
    if len({part.shape[:1] + part.shape[2:] for part in y}) > 1:
        raise ValueError(
            f"expected stacked measurements of one size, to join their channels; got {[tuple(s) for s in y.shape]}"
        )
    return torch.cat(list(y), 1)


def _split(joined: Tensor, like: Tensor | TensorList) -> Tensor | TensorList:
    if torch.is_tensor(like):
        return joined
    return TensorList(list(torch.split(joined, [part.shape[1] for part in like], 1)))


def _copies(x: Tensor, n: int) -> Tensor:
    return x.repeat(1, n, *[1] * (x.ndim - 2))


class LearnedPrimalDualIteration(Iteration):
    """
    One iteration of :class:`deepinv_flows.LearnedPrimalDual`. ``est`` is (image, primal variable, dual variable). If only the
    image is given, the primal variable starts as ``n_primal`` copies of it and the dual variable as 0.

    ``params_algo`` holds ``primal_blocks`` and ``dual_blocks``, one for each iteration or one for all, as a list or, when
    unfolded by deepinv's own builder, a :class:`torch.nn.ModuleList`; and optionally ``n_primal`` and ``n_dual``.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import LearnedPrimalDualIteration
    >>> blocks = {
    ...     "primal_blocks": [dinv.models.PDNet_PrimalBlock() for _ in range(2)],
    ...     "dual_blocks": [dinv.models.PDNet_DualBlock() for _ in range(2)],
    ... }
    >>> model = dinv.optim.optim_builder(LearnedPrimalDualIteration(), 2, blocks)
    >>> model(torch.rand(1, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([1, 1, 8, 8])
    """

    defaults = {"n_primal": 5, "n_dual": 5}
    constants = ("n_primal", "n_dual")
    refuses = dict.fromkeys(
        ("DEQ", "anderson_acceleration", "backtracking"), "its iterations are learned and do not minimise an objective"
    )

    def step(self, X: dict, problem: Problem) -> dict:
        physics, y, x = problem.physics, _joined(problem.y), X["est"][0]
        if len(X["est"]) == 3:
            _, primal, dual = X["est"]
        else:
            primal, dual = _copies(x, problem["n_primal"]), _copies(torch.zeros_like(y), problem["n_dual"])
        channels, seen = x.shape[1], y.shape[1]
        second = primal[:, channels : 2 * channels] if problem["n_primal"] > 1 else primal
        dual = problem["dual_blocks"](dual, _joined(physics.A(second)), y)
        primal = problem["primal_blocks"](primal, physics.A_adjoint(_split(dual[:, :seen], problem.y)))
        return {"est": (primal[:, :channels], primal, dual)}


class LearnedPrimalDual(Optim):
    r"""
    Primal-dual iterations whose two steps are learned.

    .. math::

        h_{k+1} = \Gamma_k\big(h_k,\; A\, p_k^{(2)},\; y\big), \qquad
        p_{k+1} = \Lambda_k\big(p_k,\; A^\top h_{k+1}^{(1)}\big)

    with ``n_primal`` images p and ``n_dual`` measurements h, and deepinv's convolutional blocks :math:`\Gamma_k`
    (:class:`deepinv.models.PDNet_DualBlock`) and :math:`\Lambda_k` (:class:`deepinv.models.PDNet_PrimalBlock`), each of which
    adds to its first argument. The estimate is :math:`p^{(1)}`. The start is h = 0 and copies of ``init``, by default of
    :math:`A^\top y`; ``custom_init=lambda y, physics: physics.A_dagger(y)`` starts from the pseudo-inverse. Scale the physics so
    that its norm is about 1.

    The model is always unfolded: train it with :class:`deepinv.Trainer`. The channels of stacked measurements of one size are
    joined. DEQ, Anderson acceleration and backtracking are refused, since the model does not minimise an objective.

    :param int max_iter: number of iterations.
    :param int channels: number of channels of an image.
    :param int measurement_channels: number of channels of a measurement, of all parts together if it is stacked; ``None`` is
        ``channels``.
    :param int n_primal: number of images p.
    :param int n_dual: number of measurements h.
    :param int depth: number of convolutions in a block.
    :param int nf: number of features between the convolutions.
    :param int dim: 2 for images (B, C, H, W), 3 for volumes.
    :param bool tied: whether one pair of blocks serves all iterations.
    :param list[torch.nn.Module] primal_blocks: blocks that replace those of deepinv, called as ``block(p, image)``.
    :param list[torch.nn.Module] dual_blocks: blocks that replace those of deepinv, called as ``block(h, measurement, y)``.
    :param torch.Generator generator: source of the initial weights; ``None`` is torch's global generator.
    :param kwargs: ``data_fidelity`` (reported as cost), ``crit_conv, thres_conv, early_stop, custom_metrics, custom_init,
        cost_fn, get_output``, as in :class:`deepinv.optim.BaseOptim`.
    :raises ValueError: for fewer blocks than iterations, and an option that is refused.

    Source: Adler & Oktem, "Learned primal-dual reconstruction", IEEE Trans. Med. Imaging 37 (2018), arXiv 1707.06474.

    >>> import deepinv as dinv, torch
    >>> from deepinv_flows import LearnedPrimalDual
    >>> model = LearnedPrimalDual(max_iter=3, nf=8)
    >>> model(torch.rand(2, 1, 8, 8), dinv.physics.Denoising()).shape
    torch.Size([2, 1, 8, 8])
    """

    iteration = LearnedPrimalDualIteration

    def __init__(
        self,
        max_iter: int = 10,
        channels: int = 1,
        measurement_channels: int | None = None,
        n_primal: int = 5,
        n_dual: int = 5,
        depth: int = 3,
        nf: int = 32,
        dim: int = 2,
        *,
        tied: bool = False,
        primal_blocks: list[nn.Module] | None = None,
        dual_blocks: list[nn.Module] | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ):
        positive_int(max_iter=max_iter)
        seen = channels if measurement_channels is None else measurement_channels
        sizes = {"depth": depth, "nf": nf, "dim": dim}
        primal, dual = n_primal * channels, n_dual * seen
        with randomness(generator):
            blocks = range(1 if tied else max_iter)
            if primal_blocks is None:
                primal_blocks = [PDNet_PrimalBlock(primal + channels, primal, **sizes) for _ in blocks]
            if dual_blocks is None:
                dual_blocks = [PDNet_DualBlock(dual + 2 * seen, dual, **sizes) for _ in blocks]
        if "unfold" in kwargs and not kwargs.pop("unfold"):
            raise ValueError(
                "expected unfold=True, since LearnedPrimalDual is learned and so always unfolded; got unfold=False"
            )
        parameters = {
            "primal_blocks": primal_blocks,
            "dual_blocks": dual_blocks,
            "n_primal": n_primal,
            "n_dual": n_dual,
        }
        super().__init__(parameters, max_iter=max_iter, unfold=True, **kwargs)
