"""What a prior or a reconstruction of whole images takes as its flow."""

from torch import nn

from ..flows import ImageGenerator


def images_of(flow: nn.Module) -> ImageGenerator:
    """
    A flow or generator, or the flow of a prior, as a generator of images.

    :raises TypeError: for anything else, such as a prior on patches.
    """
    if not isinstance(flow, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as flow or generator; got {type(flow).__name__}")
    if hasattr(flow, "normalizing_flow") and hasattr(flow, "patch_size"):
        raise TypeError(f"expected a flow on whole images; got a {type(flow).__name__}, whose flow is on patches")
    return ImageGenerator(getattr(flow, "normalizing_flow", flow))
