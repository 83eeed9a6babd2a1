"""One progress bar for a whole training."""

import re

import pytest
import torch

from deepinv_flows import fit_flow, fit_patchnr, image_flow

IMAGES = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
OPTIONS = dict(epochs=3, steps_per_epoch=25, batch_size=4, patch_size=3, sub_net_size=8)


def test_one_bar_counts_all_epochs(capsys, tmp_path):
    fit_patchnr(IMAGES, IMAGES, save_path=tmp_path, **OPTIONS)
    out, err = capsys.readouterr()
    said = re.search(
        r"75 batches in 3 epochs, [\d.]+ ms each on \d+ threads: about [\d.]+ (seconds|minutes)", out + err
    )
    assert said and len(re.findall("about", out + err)) == 1
    assert "75/75" in err and "25/25" not in err
    assert re.search(r"epoch=3/3, loss=[-\d.e]+, best=[-\d.e]+", err)
    fit_patchnr(IMAGES, IMAGES, save_path=tmp_path, resume=True, **{**OPTIONS, "epochs": 4})
    out, err = capsys.readouterr()
    assert "25 batches in 1 epochs" in out + err and "100/100" in err and "epoch=4/4" in err


@pytest.mark.parametrize("options", [{"verbose": False}, {"show_progress_bar": False}])
def test_quiet_is_quiet(options, capsys):
    fit_patchnr(IMAGES, **OPTIONS, **options)
    fit_flow(image_flow((1, 12, 12), 1, 1, 4), IMAGES, epochs=1, **options)
    assert capsys.readouterr() == ("", "")
