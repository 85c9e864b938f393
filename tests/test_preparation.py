import pytest
import torch

from hvp_engine.demo.preparation import standardize, stratified_split

LABELS = torch.tensor([0] * 7 + [1] * 50 + [2] * 143)[torch.randperm(200, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("sizes", [(120, 50, 30), (1, 2, 3), (200,), (99, 0, 101), (0,)])
def test_parts_have_the_exact_sizes_are_disjoint_and_keep_the_class_shares(sizes):
    parts = stratified_split(LABELS, sizes, seed=1)
    assert tuple(len(part) for part in parts) == sizes
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    for part, size in zip(parts, sizes, strict=True):
        counts = LABELS[part].bincount(minlength=3)
        expected = LABELS.bincount() * size / len(LABELS)
        assert (counts - expected).abs().max() <= 1


def test_split_is_seeded_and_shuffled():
    first, second, other = (torch.cat(stratified_split(LABELS, (100, 100), seed)) for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(stratified_split(torch.zeros(50), (50,), 0)[0], torch.arange(50))


def test_split_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    stratified_split(LABELS, (10,), 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sizes", [(150, 51), (-1, 5)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=r"sizes: expected .* at most 200 .* got"):
        stratified_split(LABELS, sizes, seed=0)


def test_standardize_fits_on_the_training_part_only():
    train, other = torch.randn(500, 4).double() * 3 + 7, torch.randn(20, 4).double()
    scaled, scaled_other = standardize(train, other)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(4).double())
    torch.testing.assert_close(scaled_other, (other - train.mean(0)) / train.std(0, correction=0))


def test_standardize_only_centres_a_constant_feature():
    scaled, other = standardize(torch.full((3, 1), 5.0), torch.tensor([[8.0]]))
    assert scaled.tolist() == [[0.0]] * 3 and other.tolist() == [[3.0]]


def test_standardize_images_for_each_channel():
    images = torch.rand(10, 3, 4, 4) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    (scaled,) = standardize(images, dims=(0, 2, 3))
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(3))
