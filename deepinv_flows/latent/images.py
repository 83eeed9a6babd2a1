"""The flows and generators that priors and reconstructions of whole images accept."""

from torch import nn

from ..flows import ImageGenerator


def images_of(flow: nn.Module) -> ImageGenerator:
    """
    A generator of images made of a flow, of another generator, or of the flow that a prior holds.

    :raises TypeError: for anything else, such as a prior on patches.
    """
    if not isinstance(flow, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as flow or generator; got {type(flow).__name__}")
    if hasattr(flow, "normalizing_flow") and hasattr(flow, "patch_size"):
        raise TypeError(f"expected a flow on whole images; got a {type(flow).__name__}, whose flow is on patches")
    return ImageGenerator(getattr(flow, "normalizing_flow", flow))
