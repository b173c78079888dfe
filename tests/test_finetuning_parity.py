"""Fine-tuning beside timm: groups of parameters, schedule, mixing, the classifier and whole steps of training."""

import math
import random

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lars
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

from maehub.images.preprocess import Preprocess
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.rng import sample_seed
from maehub.train.engine.distributed import Group
from maehub.train.engine.optim import decayed_groups, learning_rate, set_rates
from maehub.train.finetuning.classifier import GlobalBatchNorm, Objective, as_classifier, drop_paths, freeze
from maehub.train.finetuning.mixing import _ERASING, _MIXING, Mixing
from maehub.train.finetuning.network import Classifier, optimizer_of
from maehub.train.finetuning.recipes import Settings
from maehub.train.finetuning.views import LabelledBatch, targets_of

try:
    from timm.optim import param_groups_layer_decay
except ImportError:  # timm before 1.0.12
    from timm.optim.optim_factory import param_groups_layer_decay

NETWORK = EncoderConfig(32, 8, 3, 32, 3, 2)
CPU = torch.device("cpu")


def peer(pool="avg", classes=5, **options):
    return timm.create_model(
        "vit_base_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=classes,
        global_pool=pool,
        **options,
    )


def ours(pool="mean", classes=5):
    torch.manual_seed(0)
    return as_classifier(Encoder(NETWORK), [f"class {number}" for number in range(classes)], pool=pool)


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
@pytest.mark.parametrize("layer_decay", [0.65, 0.75, 1.0])
def test_groups_are_those_of_timm(pool, theirs, layer_decay):
    model, other = ours(pool), peer(theirs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mine = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in decayed_groups(model, 3, 0.05, layer_decay)
        for parameter in group["params"]
    }
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    groups = param_groups_layer_decay(
        other, 0.05, no_weight_decay_list=other.no_weight_decay(), layer_decay=layer_decay
    )
    expected = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert mine == {name: (pytest.approx(scale), decay) for name, (scale, decay) in expected.items()}


def test_the_schedule_is_timms():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.002)
    theirs = CosineLRScheduler(
        optimizer, t_initial=200, lr_min=1e-6, warmup_t=10, warmup_lr_init=0, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(210):
        theirs.step_update(step)
        assert learning_rate(step, 210, 0.002, 10 / 210, 1e-6) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-9
        )


def batch(count=6, classes=4):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = np.arange(count) % classes
    return LabelledBatch(pixels, targets_of(labels, classes), torch.arange(count) + 7), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(8))
def test_mixing_is_timms(seed):
    settings = Settings("official", 1, 6, 1e-3, 0, 0.05, smoothing=0.1)
    examples, labels = batch()
    preprocess = Preprocess.evaluation(32, 3, 8)
    mixed, mixed_targets = Mixing(settings, preprocess, CPU)(examples, seed)
    state = np.random.get_state()
    np.random.seed(sample_seed(seed, 0, 0, _MIXING) % 2**32)
    images, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)(preprocess.normalise(examples.pixels), labels)
    np.random.set_state(state)
    assert torch.equal(mixed, images)
    assert torch.allclose(mixed_targets, targets, atol=1e-6)


def test_erasing_is_timms_by_the_seed_of_each_crop():
    settings = Settings("official", 1, 6, 1e-3, 0, 0.05, mixup=0, cutmix=0, smoothing=0, erasing=0.5)
    examples, _ = batch()
    preprocess = Preprocess.evaluation(32, 3, 8)
    mixed, _ = Mixing(settings, preprocess, CPU)(examples, 3)
    again, _ = Mixing(settings, preprocess, CPU)(LabelledBatch(*(field.flip(0) for field in examples)), 4)
    assert torch.equal(mixed, again.flip(0)), "the batch and its order change nothing"
    plain = preprocess.normalise(examples.pixels)
    changed = [not torch.equal(one, other) for one, other in zip(mixed, plain, strict=True)]
    assert 0 < sum(changed) < 6
    state = random.getstate()
    for image, seed, expected in zip(plain, examples.seeds.tolist(), mixed, strict=True):
        own = sample_seed(seed, 0, 0, _ERASING)
        random.seed(own)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(own)
            assert torch.equal(RandomErasing(0.5, mode="pixel", device="cpu")(image.clone()), expected)
    random.setstate(state)


def test_mixing_leaves_the_global_generators_alone():
    examples, _ = batch()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    Mixing(Settings("official", 1, 6, 1e-3, 0, 0.05, erasing=1.0), Preprocess.evaluation(32, 3, 8), CPU)(examples, 1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_losses_are_timms():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    _, labels = batch()

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return logits

    objective = Objective(Fixed(), None, multi_label=False)
    hard = F.one_hot(labels, 4).float()
    soft = hard * 0.9 + 0.1 / 4
    assert objective(logits, soft) == pytest.approx(LabelSmoothingCrossEntropy(0.1)(logits, labels).item(), abs=1e-6)
    mixed = soft * 0.3 + soft.flip(0) * 0.7
    assert objective(logits, mixed) == pytest.approx(SoftTargetCrossEntropy()(logits, mixed).item(), abs=1e-6)
    several = (torch.rand(6, 4) > 0.5).float()
    expected = F.binary_cross_entropy(logits.sigmoid(), several).item()
    assert Objective(Fixed(), None, multi_label=True)(logits, several) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_the_classifier_is_timms(pool, theirs):
    model, other = ours(pool).eval(), peer(theirs).eval()
    torch.nn.init.normal_(model.head.weight)
    other.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (model(images) - other(images)).abs().max() / other(images).abs().max() < 1e-5


def test_ten_steps_are_those_of_timm():
    """AdamW with layer decay on timm's own network and groups, and on ours."""
    model, other = ours(), peer()
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(decayed_groups(model, 3, 0.05, 0.65), lr=0.0, fused=True)
    groups = param_groups_layer_decay(other, 0.05, no_weight_decay_list=other.no_weight_decay(), layer_decay=0.65)
    theirs = torch.optim.AdamW(groups, lr=0.0)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    targets = F.one_hot(torch.arange(8) % 5, 5).float()
    objective = Objective(model.train(), None, multi_label=False)
    other.train()
    for step in range(10):
        rate = learning_rate(step, 10, 0.01, 0.2, 1e-6)
        set_rates(optimizer, rate)
        for group in theirs.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss = objective(images, targets)
        expected = SoftTargetCrossEntropy()(other(images), targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for value, stepping in ((loss, optimizer), (expected, theirs)):
            stepping.zero_grad()
            value.backward()
            stepping.step()
    for name, parameter in other.named_parameters():
        difference = (dict(model.named_parameters())[name] - parameter).abs()
        if name.endswith("qkv.bias"):  # softmax cancels the keys': Adam makes whole steps of their rounding
            difference.detach().view(3, -1)[1] /= 10
        assert difference.max() < 1e-4, name


def test_stochastic_depth_has_timms_rates_and_none_in_eval_mode():
    model, other = ours(), peer(drop_path_rate=0.3)
    drop_paths(list(model.blocks), 0.3)
    mine = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert mine == pytest.approx([getattr(block.drop_path1, "drop_prob", 0.0) for block in other.blocks])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), model(images))
        torch.nn.init.normal_(model.head.weight)
        assert not torch.equal(model.train()(images), model(images))
    assert not any("drop" in name for name in model.state_dict())


def test_lars_steps_do_what_its_paper_says():
    """You et al. 2017: the rate of a matrix is scaled by trust · |w| / |g|; vectors are not."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.6, 0.8]])
    Lars([{"params": [weight], "weight_decay": 0.0}], lr=2.0, momentum=0.9, trust_coeff=0.001, always_adapt=True).step()
    expected = torch.tensor([[3.0, 4.0]]) - 2.0 * (0.001 * 5 / 1) * torch.tensor([[0.6, 0.8]])
    assert torch.allclose(weight, expected, atol=1e-6)


def test_batch_normalisation_of_one_process_is_torchs():
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    mine, theirs = GlobalBatchNorm(8, Group()), torch.nn.BatchNorm1d(8, eps=1e-6, affine=False)
    assert torch.allclose(mine(features), theirs(features), atol=1e-6)
    assert torch.allclose(mine.running_var, theirs.running_var)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (0, {"fc_norm", "head"}),
        (0.5, {"blocks.2.norm2", "blocks.2.mlp", "fc_norm", "head"}),
        (1, {"blocks.2", "fc_norm", "head"}),
        (2, {"blocks.1", "blocks.2", "fc_norm", "head"}),
    ],
)
def test_partial_fine_tuning_trains_the_last_blocks(blocks, expected):
    model = ours()
    freeze(model, blocks)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"{e}." for e in expected))
    }


def test_all_blocks_are_the_whole_network():
    model = ours()
    freeze(model, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_positions_are_trained_and_fc_norm_is_fresh():
    encoder = Encoder(NETWORK)
    model = as_classifier(encoder, ["a", "b"], pool="mean")
    assert model.pos_embed.requires_grad
    assert not hasattr(model, "norm")
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert model.head.weight.std() < 1e-4
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in encoder.blocks.state_dict(prefix="blocks.").items()
    )


def test_a_head_of_the_same_classes_is_kept():
    model = ours()
    assert torch.equal(
        as_classifier(model, model.config.class_names, pool="mean", seed=9).head.weight, model.head.weight
    )
    other = as_classifier(model, ["x", "y", "z", "u", "v"], pool="mean", seed=9)
    assert not torch.equal(other.head.weight, model.head.weight)
    assert math.isclose(other.head.weight.std().item(), 2e-5, rel_tol=0.3)


def test_the_linear_probes_rates_are_adapted_for_matrices_alone():
    """As published: weight decay is 0, and timm's LARS would then adapt nothing."""
    model = torch.nn.Linear(4, 3)
    classifier = Classifier(model, Preprocess.evaluation(32), lambda *_: [{"params": [p]} for p in model.parameters()])
    optimizer = optimizer_of(classifier, Settings("linear", 1, 8, 0.1, 0, 0.0, optimizer="lars"))
    assert isinstance(optimizer, Lars)
    assert [group["always_adapt"] for group in optimizer.param_groups] == [True, False]
