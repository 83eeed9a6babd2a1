"""Constructors of every physics of deepinv, at a small size: the number of channels of its images, and how it is made."""

import deepinv as dinv
import torch
from deepinv import physics as P

SIDE = 8


def generator():
    return torch.Generator().manual_seed(0)


def mask(*shape):
    return (torch.rand(*shape, generator=generator()) > 0.3).float()


def blur(channels=1):
    return P.Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="circular")


def plane_wave():
    positions = torch.stack([torch.linspace(-0.004, 0.004, 6), torch.zeros(6), torch.zeros(6)], -1)
    return P.UltrasoundPlaneWave(
        (SIDE, SIDE), angles=[0.0], element_positions=positions, n_samples=64, sampling_frequency=5e6, normalize=True
    )


def scattering():
    circle = torch.linspace(0, 2 * torch.pi, 7)[:6]
    around = 2 * torch.stack([circle.cos(), circle.sin()])
    return P.Scattering(SIDE, receivers=around[:, None].expand(2, 6, 6), transmitters=around, dtype=torch.complex64)


IMAGE = (1, SIDE, SIDE)
PHYSICS = {
    "Blur": (1, blur),
    "BlurFFT": (1, lambda: P.BlurFFT(IMAGE, filter=torch.ones(1, 1, 3, 3) / 9)),
    "BlurFFTMultiScaler": (1, lambda: P.BlurFFTMultiScaler(P.BlurFFT(IMAGE, filter=torch.ones(1, 1, 3, 3) / 9), IMAGE)),
    "BlurMultiScaler": (1, lambda: P.BlurMultiScaler(blur(), IMAGE)),
    "ComposedLinearPhysics": (1, lambda: P.Downsampling(IMAGE, factor=2, filter="gaussian") * blur()),
    "ComposedPhysics": (1, lambda: P.SpatialUnwrapping() * blur()),
    "CompressedSensing": (1, lambda: P.CompressedSensing(30, IMAGE, rng=generator())),
    "CompressiveSpectralImaging": (3, lambda: P.CompressiveSpectralImaging((3, SIDE, SIDE), rng=generator())),
    "Decolorize": (3, lambda: P.Decolorize()),
    "Demosaicing": (3, lambda: P.Demosaicing((SIDE, SIDE))),
    "Denoising": (1, lambda: P.Denoising()),
    "Downsampling": (1, lambda: P.Downsampling(IMAGE, factor=2, filter="gaussian")),
    "DownsamplingMatlab": (1, lambda: P.DownsamplingMatlab(factor=2)),
    "HyperSpectralUnmixing": (3, lambda: P.HyperSpectralUnmixing(M=torch.rand(3, 5, generator=generator()))),
    "Inpainting": (1, lambda: P.Inpainting(IMAGE, mask=mask(*IMAGE))),
    "InpaintingMultiScaler": (1, lambda: P.InpaintingMultiScaler(
        P.Inpainting(IMAGE, mask=mask(*IMAGE)), IMAGE, factors=(2,)
    )),
    "LinearPhysicsMultiScaler": (1, lambda: P.LinearPhysicsMultiScaler(P.Denoising(), IMAGE)),
    "MRI": (2, lambda: P.MRI(mask=mask(1, 2, SIDE, SIDE), img_size=(2, SIDE, SIDE))),
    "MultiCoilMRI": (2, lambda: P.MultiCoilMRI(
        mask=mask(1, 2, SIDE, SIDE), img_size=(2, SIDE, SIDE), coil_maps=torch.ones(1, 3, SIDE, SIDE, dtype=torch.complex64)
    )),
    "Pansharpen": (3, lambda: P.Pansharpen((3, SIDE, SIDE), factor=2)),
    "PhaseRetrieval": (1, lambda: P.PhaseRetrieval(P.CompressedSensing(150, IMAGE, rng=generator()))),
    "PhysicsCropper": (1, lambda: P.PhysicsCropper(P.Denoising(), (1, 1))),
    "PhysicsMultiScaler": (1, lambda: P.PhysicsMultiScaler(P.Denoising(), IMAGE)),
    "Ptychography": (1, lambda: P.Ptychography(img_size=IMAGE)),
    "PtychographyLinearOperator": (1, lambda: P.PtychographyLinearOperator(img_size=IMAGE)),
    "RandomPhaseRetrieval": (1, lambda: P.RandomPhaseRetrieval(300, IMAGE, rng=generator())),
    "Scattering": (1, scattering),
    "SinglePhotonLidar": (3, lambda: P.SinglePhotonLidar(bins=20)),
    "SinglePixelCamera": (1, lambda: P.SinglePixelCamera(30, IMAGE, rng=generator())),
    "SpaceVaryingBlur": (1, lambda: P.SpaceVaryingBlur(
        filters=torch.ones(1, 1, 2, 3, 3) / 9, multipliers=torch.ones(1, 1, 2, SIDE, SIDE) / 2, padding="circular"
    )),
    "SpatialUnwrapping": (1, lambda: P.SpatialUnwrapping()),
    "StackedLinearPhysics": (1, lambda: P.stack(P.Inpainting(IMAGE, mask=mask(*IMAGE)), P.Denoising())),
    "StackedPhysics": (1, lambda: P.StackedPhysics([P.SpatialUnwrapping(), blur()])),
    "StructuredRandom": (1, lambda: P.StructuredRandom(IMAGE, IMAGE)),
    "StructuredRandomPhaseRetrieval": (1, lambda: P.StructuredRandomPhaseRetrieval(IMAGE, (1, 16, 16), n_layers=2)),
    "TiledSpaceVaryingBlur": (1, lambda: P.TiledSpaceVaryingBlur(
        filters=torch.ones(1, 1, 4, 3, 3) / 9, patch_size=4, stride=4
    )),
    "Tomography": (1, lambda: P.Tomography(angles=8, img_width=SIDE)),
    "UltrasoundPlaneWave": (1, plane_wave),
    "Upsampling": (1, lambda: P.Upsampling((1, 2 * SIDE, 2 * SIDE), factor=2, filter="bilinear")),
    "VirtualLinearPhysics": (1, lambda: P.VirtualLinearPhysics(
        physics=blur(), transform=dinv.transform.Shift(rng=generator()), g_params={"x_shift": [1], "y_shift": [2]}
    )),
}  # fmt: skip

# images that a flow on (N, C, H, W) does not make
REFUSED = {
    "DynamicMRI": (2, lambda: P.DynamicMRI(mask=mask(1, 2, 3, SIDE, SIDE), img_size=(2, 3, SIDE, SIDE))),
    "Haze": (3, lambda: P.Haze()),
    "SequentialMRI": (2, lambda: P.SequentialMRI(mask=mask(1, 2, 3, SIDE, SIDE), img_size=(2, 3, SIDE, SIDE))),
}
ONE_IMAGE_ONLY = {"SinglePhotonLidar"}  # deepinv 0.5.0 takes the batch for the bins
# need a package, or a graphics card, that the tests do not
ELSEWHERE = {"NonCartesianMRI", "PET", "RadioInterferometry", "TomographyWithAstra"}
ABSTRACT = {"Physics", "LinearPhysics", "DecomposablePhysics"}
