"""Overrides that make each config of ``examples/configs`` small enough for a test."""

CROPS = "size=16 train_data.number=8 eval_data.number=4 batch_size=4"
SPLITTING = f"{CROPS} model.backbone_net.depth=3 model.backbone_net.nf=4"
TINY = {
    "image_flow": "size=8 train_data.images.number=8 eval_data.number=4 batch_size=4 model.flow.flow.num_steps=1",
    "learned_primal_dual": f"{CROPS} model.max_iter=2 model.nf=4 physics.angles=8",
    "patchnr": "samples_per_epoch=128 batch_size=64 eval_data.size=64 model.flow.num_layers=2 model.flow.sub_net_size=8",
    "splitting_noiseless": SPLITTING,
    "splitting_noisy": SPLITTING,
    "unfolded_nmapg": f"{CROPS} model.max_iter=2 model.stepsize=[0.1,0.1] model.lambda_reg=[0.1,0.1]",
}
