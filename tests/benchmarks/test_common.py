"""What keeps test images out of the training, and strengths off the ends of their grids."""

import pytest
import torch
from arena import best_strength
from common import check_apart, check_disjoint


def test_images_seen_in_training_are_named():
    images = {part: torch.rand(5, 3, 8, 8) for part in ("train", "val", "test")}
    images["other size"] = torch.rand(2, 3, 4, 4)
    check_disjoint(images)
    images["test"][3] = images["train"][2] + 0.01
    with pytest.raises(ValueError, match=r"within 0.05 RMSE .*; got test\[3\] and train\[2\] \(0.010\)"):
        check_disjoint(images)


def test_a_piece_of_a_training_image_is_named():
    images = [torch.rand(1, 24, 32) for _ in range(3)]
    check_apart(images, torch.rand(1, 1, 12, 12))
    with pytest.raises(ValueError, match=r"training image 2 is at 0.010 from pixel \(8, 16\) on"):
        check_apart(images, images[2][None, :, 8:20, 16:28] + 0.01)


def test_a_strength_is_not_chosen_at_an_end():
    def peak(at):
        return lambda strength: -((torch.tensor(strength).log() - torch.tensor(at).log()) ** 2)

    for at in (1e-3, 1.0, 1e3):
        chosen, tried, at_end = best_strength(peak(at), [0.3, 1.0, 3.0], 10)
        assert not at_end and min(tried) < chosen < max(tried)
    assert best_strength(peak(1e6), [0.3, 1.0, 3.0], 2)[2]
    chosen, tried, at_end = best_strength(lambda strength: -strength, [0.0, 1.0, 10.0], 5)
    assert chosen == 0 and not at_end and len(tried) == 3
