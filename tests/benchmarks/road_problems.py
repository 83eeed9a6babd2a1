"""
The six problems of ``road.py``: images to train on, to tune on, to test, and the physics.

Phantoms differ in how hard they are, so that four of them are tested; of the other problems there is one image.

Their images come with scikit-image and nilearn. ``pack(path)`` writes them to a file for machines that have neither, from which
``problem(name, path)`` reads them.
"""

from pathlib import Path

import deepinv as dinv
import torch

from deepinv_flows.images import load_images, phantoms


def noise(sigma):
    return dinv.physics.GaussianNoise(sigma, rng=torch.Generator().manual_seed(0))


def blur(sigma):
    return dinv.physics.functional.gaussian_blur(sigma=(sigma, sigma))


def texture(name, side=96):
    """Training rows, and pieces for tuning and testing from below them."""
    image = load_images(name)[0]
    below = image[:, -side:]
    return [image[:, : -side - 16]], below[None, ..., :side], below[None, ..., side + 16 : 2 * side + 16]


class Photographs:
    """Blur of a colour photograph."""

    options = {"patch_size": 4}

    @staticmethod
    def images():
        images = [load_images(name, channels=3)[0] for name in ("coffee", "chelsea", "rocket")]
        coffee, image = images[0], load_images("astronaut", channels=3)[0][None]
        images[0] = coffee[..., :-112]
        return images, coffee[None, :, 150:246, -96:], image[..., :128, 128:256]

    @staticmethod
    def physics():
        return dinv.physics.Blur(filter=blur(2.0), padding="circular", noise_model=noise(0.02))


class Ellipses:
    """From two thirds of the angles; the noise is a fifteenth of the standard deviation of the sinogram."""

    @staticmethod
    def images():
        generator = torch.Generator().manual_seed(1)
        images, more = (phantoms(number, 96, generator=generator) for number in (12, 3))
        return list(images[:9]), images[9:11], torch.cat([images[11:], more])

    @staticmethod
    def physics():
        angles = torch.linspace(0, 120, 61)[:-1]
        return dinv.physics.Tomography(angles, 96, circle=False, normalize=True, noise_model=noise(0.005))


class Gravel:
    @staticmethod
    def images():
        return texture("gravel")

    @staticmethod
    def physics():
        return dinv.physics.Downsampling(
            (1, 96, 96), filter=blur(1.5), factor=3, padding="circular", noise_model=noise(0.01)
        )


class Grass:
    @staticmethod
    def images():
        return texture("grass")

    @staticmethod
    def physics():
        mask = (torch.rand(1, 96, 96, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        return dinv.physics.Inpainting((1, 96, 96), mask=mask, noise_model=noise(0.01))


class Brick:
    @staticmethod
    def images():
        return texture("brick")

    @staticmethod
    def physics():
        return dinv.physics.Denoising(noise(0.1))


class Brain:
    """Axial slices of the MNI152 template, every 2 mm; those to test, to tune and to train are 20 mm and more apart."""

    @staticmethod
    def images():
        from nilearn.datasets import load_mni152_template

        volume = torch.from_numpy(load_mni152_template(resolution=2).get_fdata()).float()
        volume = (volume / volume.max())[1:97, 10:106]
        at = {k: volume[:, :, k].T.flip(0)[None].contiguous() for k in (18, 21, 24, 35, 46, 57, 60, 63, 66)}
        return [at[k] for k in (18, 21, 24, 57, 60, 63, 66)], at[35][None], at[46][None]

    @staticmethod
    def physics():
        lines = (torch.rand(96, generator=torch.Generator().manual_seed(1)) < 0.2).float()
        lines[42:54] = 1
        return Lines(lines.expand(96, 96).clone(), 0.01)


class Lines(dinv.physics.LinearPhysics):
    """Some lines of the Fourier transform of a real image, as pairs of real numbers."""

    def __init__(self, mask, sigma):
        super().__init__(noise_model=Masked(sigma, mask))
        self.register_buffer("mask", mask)

    def A(self, x, **kwargs):
        return torch.view_as_real(self.mask * torch.fft.fftshift(torch.fft.fft2(x[:, 0], norm="ortho"), (1, 2)))

    def A_adjoint(self, y, **kwargs):
        shifted = torch.fft.ifftshift(self.mask * torch.view_as_complex(y.contiguous()), (1, 2))
        return torch.fft.ifft2(shifted, norm="ortho").real[:, None]


class Masked(dinv.physics.GaussianNoise):
    """Noise where something is measured."""

    def __init__(self, sigma, mask):
        super().__init__(sigma, rng=torch.Generator().manual_seed(0))
        self.register_buffer("mask", mask[None, ..., None])

    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * self.mask


PROBLEMS = {
    "deblurring": Photographs,
    "tomography": Ellipses,
    "superresolution": Gravel,
    "inpainting": Grass,
    "denoising": Brick,
    "mri": Brain,
}


def pack(path: Path) -> None:
    torch.save({name: kind.images() for name, kind in PROBLEMS.items()}, path)


def problem(name: str, packed: Path | None = None):
    """Images to train on, images to tune on, an image to test, the physics, and options of the training; all on the CPU."""
    kind = PROBLEMS[name]
    images = kind.images() if packed is None else torch.load(packed)[name]
    return *images, kind.physics(), getattr(kind, "options", {})


def measured(x, physics, device):
    """The same measurements on every device, and the physics there; on the CPU its noise goes on, elsewhere it begins anew."""
    with torch.random.fork_rng(devices=[]):
        y = physics(x)
    if torch.device(device).type != "cpu":
        physics = physics.to(device)
        physics.noise_model.rng = torch.Generator(device).manual_seed(1)
    return x.to(device), y.to(device), physics
