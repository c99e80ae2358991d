import pytest
import torch
from torch import Tensor

from trainer.config import ConfigError, TrainConfig
from trainer.mixing import Partners, cutmix, mix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LABELS = torch.arange(8)
IMAGES = LABELS.float().view(-1, 1, 1, 1).expand(8, 2, 10, 6).clone()
"""Each image is full of its label, so that a mixed pixel says what it is made of."""


def mixed(config: TrainConfig, seed: int) -> tuple[Tensor, Partners]:
    images, partners = mix(IMAGES, LABELS, config, generator(seed))
    assert partners is not None
    return images, partners


def test_mixup_mixes_each_image_with_its_partner_by_the_share() -> None:
    for seed in range(20):
        images, partners = mixed(TrainConfig(mixup=0.4), seed)
        assert sorted(partners.labels.tolist()) == LABELS.tolist()
        expected = partners.share * LABELS + (1 - partners.share) * partners.labels
        torch.testing.assert_close(images, expected.view(-1, 1, 1, 1).expand_as(images))


def test_shares_are_drawn_from_the_beta_distribution() -> None:
    for alpha in (0.2, 1.0, 5.0):
        shares = torch.tensor([mixed(TrainConfig(mixup=alpha), s)[1].share for s in range(2000)])
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1000.0])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_an_extreme_alpha_has_shares_too(name: str, alpha: float) -> None:
    config = TrainConfig.from_dict({name: alpha})
    for seed in range(20):
        images, partners = mixed(config, seed)
        assert 0 <= partners.share <= 1
        assert bool(images.isfinite().all())


def test_cutmix_puts_one_rectangle_of_the_partner_in_and_the_share_is_that_of_the_pixels() -> None:
    for seed in range(50):
        images, partners = mixed(TrainConfig(cutmix=1.0), seed)
        own = images == LABELS.view(-1, 1, 1, 1)
        moved = (partners.labels != LABELS).nonzero()[:, 0]
        assert bool(torch.isin(images, LABELS.float()).all())
        for index in moved.tolist():
            assert float(own[index].float().mean()) == pytest.approx(partners.share)
            assert bool((images[index][~own[index]] == partners.labels[index]).all())
            hidden = ~own[index, 0]
            tall, wide = int(hidden.any(1).sum()), int(hidden.any(0).sum())
            assert int(hidden.sum()) == tall * wide


def test_cutmix_s_rectangle_hides_what_it_was_told_unless_the_border_cuts_it() -> None:
    partners = torch.ones(1, 1, 20, 20)
    shares = [
        cutmix(torch.zeros_like(partners), partners, 0.75, generator(s))[1] for s in range(99)
    ]
    assert min(shares) == 0.75
    assert max(shares) < 0.95


def test_with_both_on_a_fair_coin_decides_for_each_batch() -> None:
    both = TrainConfig(mixup=1.0, cutmix=1.0)
    num_cut = 0
    for seed in range(400):
        images, _ = mixed(both, seed)
        num_cut += bool((images == images.round()).all())
    assert 160 < num_cut < 240


def test_what_is_off_returns_the_same_tensor_and_draws_nothing() -> None:
    source = generator()
    before = source.get_state()
    images, partners = mix(IMAGES, LABELS, TrainConfig(), source)
    assert images is IMAGES
    assert partners is None
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("config", [TrainConfig(mixup=0.3), TrainConfig(cutmix=1.0)])
def test_the_generator_alone_decides_and_the_given_images_stay(config: TrainConfig) -> None:
    state, before = torch.get_rng_state(), IMAGES.clone()
    first, again, other = (mixed(config, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(IMAGES, before)


def test_cutmix_on_images_of_one_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match="cutmix needs images of at least 2 pixels each way"):
        mix(IMAGES[:, :, :1], LABELS, TrainConfig(cutmix=1.0), generator())


def test_partners_are_split_as_their_batch_is() -> None:
    partners = Partners(labels=LABELS, share=0.3)
    parts = partners.split(3)
    assert [part.labels.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert {part.share for part in parts} == {0.3}
