"""Schedules, iterate averaging, the order of samples, and the start of the codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dalle.config import DVAEConfig
from dalle.dvae import DVAE
from dalle.train.averaging import IterateAverage
from dalle.train.code_initialization import spread_codes
from dalle.train.dalle import DALLETraining
from dalle.train.dvae import DVAETraining
from dalle.train.precision import make_optimizer
from dalle.train.sampling import EpochOrder, derived_seed, generator
from dalle.train.schedules import PlateauHalving, cosine, warm_up
from dalle_kernels import AdamW16


def test_cosine_is_half_a_cosine_then_constant():
    assert cosine(2.0, 1.0, 10, 0) == 2.0
    assert cosine(2.0, 1.0, 10, 5) == pytest.approx(1.5)
    assert cosine(2.0, 1.0, 10, 2) == pytest.approx(1 + (1 + math.cos(math.pi / 5)) / 2)
    assert cosine(2.0, 1.0, 10, 10) == cosine(2.0, 1.0, 10, 99) == cosine(2.0, 1.0, 0, 0) == 1.0


def test_warm_up_is_linear_then_constant():
    assert [warm_up(8.0, 4, update) for update in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert warm_up(8.0, 0, 0) == 8.0


def test_the_papers_schedules_at_full_length():
    dvae = DVAETraining()
    assert dvae.scheduled("temperature", 1.0, 1 / 16, 150_000) == 1 / 16
    assert dvae.scheduled("temperature", 1.0, 1 / 16, 149_000) > 1 / 16
    assert dvae.scheduled("kl_weight", 0.0, 6.6, 5_000) == 6.6 > dvae.scheduled("kl_weight", 0.0, 6.6, 4_900)
    assert dvae.scheduled("learning_rate", 1e-4, 1.25e-6, 1_200_000) == 1.25e-6
    assert DALLETraining().warm_up_updates == 5_000


def test_stage_2_trains_as_the_paper_did_by_default():
    training, rule = DALLETraining(), PlateauHalving(window=1)
    assert (training.updates, training.batch_size, training.bpe_dropout) == (430_000, 1024, 0.1)
    assert (training.learning_rate, training.schedule, rule.most) == (4.5e-4, "plateau", 5)
    assert (training.clip_norm, training.average_decay, training.average_every) == (4.0, 0.99, 25)
    model = nn.Sequential(nn.Linear(2, 2))
    optimizers = (AdamW16(model.parameters(), 1.0), make_optimizer(model, model, training))
    sixteen_bit, plain = (optimizer.param_groups[0] for optimizer in optimizers)
    for group in (sixteen_bit, plain):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.96), 1e-8, 4.5e-2)
    assert (sixteen_bit["moments"], sixteen_bit["max_variance"]) == ("float16", 5.0)


def test_plateau_halves_at_most_five_times_and_resumes():
    rule = PlateauHalving(window=2, threshold=0.01)
    for loss in (4.0, 4.0, 3.0, 3.0):
        rule.observe(loss)
    assert rule.factor == 1
    for loss in (3.0, 2.99):
        rule.observe(loss)
    assert rule.factor == 0.5
    again = PlateauHalving(window=2, threshold=0.01)
    again.load_state_dict(rule.state_dict())
    for _ in range(40):
        again.observe(3.0)
    assert again.factor == 0.5**5 and rule.factor == 0.5


def test_iterate_average_follows_its_recurrence():
    model = nn.Linear(2, 1, bias=False)
    average = IterateAverage(model, decay=0.5, every=2)
    expected = model.weight.detach().clone()
    for update in range(1, 9):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.observe(model, update)
        if update % 2 == 0:
            decay = min(0.5, (1 + update // 2) / (10 + update // 2))
            expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight, expected)
    assert not average.model.weight.requires_grad


def test_every_epoch_holds_every_sample_once_in_its_own_order():
    order = EpochOrder(10, seed=3)
    pairs = [pair for update in range(10) for pair in order.batch(update, 4)]
    epochs = [[sample for epoch, sample in pairs if epoch == wanted] for wanted in range(4)]
    assert all(sorted(samples) == list(range(10)) for samples in epochs)
    assert len({tuple(samples) for samples in epochs}) == 4
    assert EpochOrder(10, seed=3).batch(7, 4) == pairs[28:32] != EpochOrder(10, seed=4).batch(7, 4)


def test_derived_seeds_differ_and_stay():
    seeds = {derived_seed(seed, name, update) for seed in range(3) for name in ("a", "b") for update in range(50)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "gumbel", 1) == 2140659328812996840
    assert torch.equal(torch.rand(3, generator=generator(1, "x")), torch.rand(3, generator=generator(1, "x")))


def test_spread_codes_makes_each_code_the_nearest_to_its_own_patch():
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, vocab_size=24, n_hid=8, n_init=8, group_count=3, n_blk_per_group=1))
    images = torch.rand(4, 3, 16, 16)
    before = dvae.encode(images).unique().numel()
    spread_codes(dvae, images, 4.0, generator(0, "codes"))
    assert dvae.encode(images).unique().numel() == 24 > before
    logits = dvae.encode_logits(images).permute(0, 2, 3, 1).flatten(0, 2).double()
    features, codes = [], dvae.encoder.blocks["output"].conv.w.flatten(1).double()
    dvae.encoder.blocks["output"].conv.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    dvae.encode_logits(images)
    centred = features[0].permute(0, 2, 3, 1).flatten(0, 2).double()
    centred = centred - centred.mean(dim=0)
    # A code is scale * c, c one of the patches: the patch of the same direction gives the scale back.
    own = torch.cosine_similarity(codes[:, None], centred, dim=2).argmax(dim=1)
    scale = (codes.norm(dim=1) / centred[own].norm(dim=1)).median()
    distances = torch.cdist(centred, codes / scale).square()
    torch.testing.assert_close(
        logits.log_softmax(dim=1), (-scale * distances / 2).log_softmax(dim=1), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(ValueError, match="expected at least 24 patches"):
        spread_codes(dvae, images[:1], 4.0, generator(0, "codes"))
