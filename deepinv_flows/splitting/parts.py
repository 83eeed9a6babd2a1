"""The two parts of a split: which entries of the measurements each of its operators keeps."""

from deepinv.physics import ComposedPhysics
from torch import Tensor


def observed_mask(physics, y: Tensor) -> Tensor | None:
    """The operator's mask of the measurements, (B or 1, ...); ``None`` if it observes every entry of y."""
    if isinstance(physics, ComposedPhysics):
        physics = physics[-1]
    mask = getattr(physics, "mask", None)
    # compressed sensing also has a mask, which is one of the image
    if isinstance(mask, Tensor) and 2 <= mask.ndim <= y.ndim and _fits(mask, y):
        return mask.to(y.real.dtype)
    return None


def kept(mask: Tensor, observed: Tensor | None) -> Tensor:
    """The mask of A_1: the observed ones of the entries that a splitting mask keeps."""
    if observed is None:
        return mask
    if mask.ndim < observed.ndim:
        mask = aligned(mask, observed)
    return mask * aligned(observed, mask)


def rest(first: Tensor, observed: Tensor | None) -> Tensor:
    """The mask of A_2, which with that of A_1 makes up the mask of the observed entries."""
    return (1 if observed is None else aligned(observed, first)) - first


def shares(part: Tensor) -> Tensor:
    """The fraction of entries that a mask keeps of each sample, (B,)."""
    return part.flatten(1).mean(1)


def aligned(mask: Tensor, y: Tensor) -> Tensor:
    """A view of the mask (B, C, H, W) that broadcasts with measurements (B, C, ..., H, W)."""
    return mask.view(*mask.shape[:2], *[1] * (y.ndim - mask.ndim), *mask.shape[2:])


def _fits(mask: Tensor, y: Tensor) -> bool:
    same = mask.shape[-2:] == y.shape[-2:]
    if y.ndim == 2:  # vectors (B, m)
        same = mask.ndim == 2 and mask.shape[1] == y.shape[1]
    return same and all(m in (1, n) for m, n in zip(aligned(mask, y).shape, y.shape))


def check_mask(mask: Tensor, y: Tensor, observed: Tensor | None) -> None:
    if mask.device != y.device:
        raise ValueError(
            f"expected a splitting mask on {y.device}, as the measurements; got one on {mask.device}: "
            f"make the mask_generator with device={str(y.device)!r}"
        )
    if not 2 <= mask.ndim <= y.ndim or len(mask) != len(y) or not _fits(mask, y):
        size = tuple((y if observed is None else observed).shape[1:])
        raise ValueError(
            f"expected a splitting mask that fits measurements of shape {tuple(y.shape)}; got one of shape {tuple(mask.shape)}: "
            f"make the mask_generator with img_size={size}"
        )
