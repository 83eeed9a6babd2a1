"""
A script of deepinv's kind: a photograph with 60% of its pixels lost, restored by Adam on all patches. It does not know of
deepinv_flows; ``demo_register.py`` runs it twice, as it stands.
"""

import json
import sys
import time

import deepinv as dinv
import skimage.data
import torch
from deepinv.optim import PatchNR, PatchPrior

weights, result, side, iterations = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
x = torch.from_numpy(skimage.data.gravel()[300 : 300 + side, 180 : 180 + side]).float()[None, None] / 255
rng = torch.Generator().manual_seed(0)
mask = (torch.rand(x.shape, generator=rng) < 0.4).float()
physics = dinv.physics.Inpainting(x.shape[1:], mask=mask[0], noise_model=dinv.physics.GaussianNoise(0.02, rng=rng))
y = physics(x)

prior = PatchPrior(PatchNR(pretrained=weights, patch_size=6), patch_size=6).requires_grad_(False)
data_fidelity = dinv.optim.L2()
x_net = torch.where(mask > 0, y, y.sum() / mask.sum()).requires_grad_()
optimizer = torch.optim.Adam([x_net], lr=0.03)
seconds = []
for _ in range(iterations):
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = data_fidelity(x_net, y, physics) + 0.08 * prior(x_net)
    loss.sum().backward()
    optimizer.step()
    seconds.append(time.perf_counter() - start)

torch.save({"x": x, "y": y, "x_net": x_net.detach()}, result)
psnr = float(dinv.metric.PSNR()(x_net.detach().clamp(0, 1), x))
print(json.dumps({"psnr": psnr, "loss": float(loss), "seconds": min(seconds)}))
