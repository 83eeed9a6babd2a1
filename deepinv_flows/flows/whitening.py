"""A flow's first step on vectors, which makes them white; imported only when a flow with this step is built."""

from torch import Tensor

from .freia import ChannelAffine


class Whitening(ChannelAffine):
    r"""A fixed rotation of vectors, then a learned scale and offset for each of their entries: :math:`y = e^a \odot Rx + b`."""

    def initialise(self, x: Tensor, c=()) -> None:
        """Rotate to the principal axes of the rows of ``x``, then scale and shift so that these are standardised."""
        super().initialise(x[:, :, None, None])

    def forward(self, x, c=(), rev=False, jac=True):
        log_scale, offset = self.log_scale.flatten(), self.offset.flatten()
        if rev:
            return (((x[0] - offset) * (-log_scale).exp()) @ self.rotation,), -log_scale.sum()
        return ((x[0] @ self.rotation.T) * log_scale.exp() + offset,), log_scale.sum()
