"""
Self-supervised MRI with a quarter of the k-space: what equivariance pays.

    python tests/benchmarks/splitting_mri.py [--steps 600] [--quick] [--cache FILE]

Axial slices of the MNI152 T1 template (an average of 152 brains, bundled with the package nilearn), averaged to 3 mm, 64x64
pixels: training from z = -48 to 11 mm, test from z = 32 to 56 mm every 3 mm, at least 20 mm apart. The slices are axial because
the template is its own mirror image. One Cartesian mask for all of them, of acceleration 4, without noise; an unrolled network
of three steps, three seeds. ``SSDU`` is deepinv's SplittingLoss with SSDU's Gaussian masks, and all the measurements as input in
the test; ours splits by the same masks. ``equivariance`` and ``--cache`` are those of ``splitting_inpainting.py``. The last line
is one JSON object.
"""

import warnings
from pathlib import Path

import deepinv as dinv
import torch
from deepinv.physics.generator import GaussianMaskGenerator, GaussianSplittingMaskGenerator
from splitting_inpainting import Network, Setting, parser, report, run_all

SIDE = 64
METHODS = {"mri": ["supervised", "MC", "EI", "SSDU", "ours, no motions", "ours"]}
TRAIN, TEST = range(-48, 12), range(32, 57, 3)  # z in mm


class Unrolled(dinv.models.Reconstructor):
    """Three times a network with the same weights, each time followed by a gradient step that restores what was measured."""

    def __init__(self, steps=3):
        super().__init__()
        self.network, self.steps = Network(inputs=2, outputs=2, widths=(12, 32, 64)), steps

    def forward(self, y, physics, **kwargs):
        x = physics.A_adjoint(y)
        for step in range(self.steps):
            if step:
                x = x - physics.A_adjoint(physics.A(x) - y)
            x = x + self.network.residual(x)
        return x


def slices(heights):
    """(N, 2, 64, 64) slices of the template at heights in mm, complex as two channels, in [0, 1]."""
    import nibabel
    import nilearn

    path = Path(nilearn.__file__).parent / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    volume = nibabel.load(path)
    index = [round(z - float(volume.affine[2, 3])) for z in heights]
    x = torch.from_numpy(volume.get_fdata(dtype="float32"))[:, :, index].movedim(-1, 0) / 255
    x = torch.nn.functional.avg_pool2d(x, 3)
    top, left = ((n - SIDE) // 2 for n in x.shape[1:])
    x = x[:, top : top + SIDE, left : left + SIDE]
    return torch.stack([x, torch.zeros_like(x)], 1)


def mri(variant, seed):
    assert min(abs(a - b) for a in TRAIN for b in TEST) >= 20, "expected training and test slices 20 mm apart"
    source = torch.Generator().manual_seed(1000 + seed)
    mask = GaussianMaskGenerator((2, SIDE, SIDE), acceleration=4, rng=source).step(1)["mask"]
    physics = dinv.physics.MRI(mask=mask, img_size=(2, SIDE, SIDE))
    splits = GaussianSplittingMaskGenerator((2, SIDE, SIDE), split_ratio=0.6)
    return Setting(slices(TRAIN), slices(TEST), physics, splits, Unrolled, batch=2, complex_abs=True)


def main():
    options = parser(__doc__)
    options.set_defaults(steps=600)
    args = options.parse_args()
    warnings.simplefilter("ignore")
    steps, seeds = (80, 2) if args.quick else (args.steps, args.seeds)
    results = run_all(METHODS, mri, steps, seeds, args.cache)
    report(METHODS, results, steps, seeds, Unrolled())


if __name__ == "__main__":
    main()
