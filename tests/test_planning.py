"""Estimates against what they estimate: torch's own FLOP counter, live tensors, real modules."""

import json
import math
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import maehub
from maehub.cli import command_line as cli
from maehub.errors import DataError, UsageError
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS, Block, EncoderConfig
from maehub.models.masking import kept_count
from maehub.train.networks import costs
from maehub.train.planning.devices import DEVICES, device_row, measured_cpu
from maehub.train.planning.planning import network_of, plan
from maehub.train.pretraining.config import PlanConfig, PretrainConfig
from maehub.train.pretraining.objective import Objective

ASSETS = Path(maehub.__file__).parent / "assets"
SMALL = EncoderConfig(32, 8, 3, 48, 2, 2)
VIT_B, VIT_L = PRESETS["vit-b"], PRESETS["vit-l"]

NETWORKS = {
    "vit-b": AutoencoderConfig(VIT_B),
    "vit-l": AutoencoderConfig(VIT_L),
    "vit-h": AutoencoderConfig(PRESETS["vit-h"]),
    "vit-nano": AutoencoderConfig(PRESETS["vit-nano"], 160, 5, 5),
    "448 × 224": AutoencoderConfig(replace(VIT_B, image_size=(448, 224))),
    "grey": AutoencoderConfig(replace(VIT_B, channels=1)),
    "mask tokens in the encoder": AutoencoderConfig(VIT_B, mask_tokens="encoder"),
    "no decoder": AutoencoderConfig(VIT_B, decoder_depth=0, mask_tokens="encoder"),
    "one block": AutoencoderConfig(VIT_B, decoder_depth=1),
    "narrow": AutoencoderConfig(VIT_B, 128, 4, 4),
    "tokens": AutoencoderConfig(VIT_B, target="tokens", outputs=512, tokenizer="mean-colour"),
    "pca": AutoencoderConfig(VIT_B, target="pca", outputs=96),
}


def objective(network, kept, images, device="meta", **settings):
    """The loss of a training step on ``images`` views, and what it is called with."""
    with torch.device(device):
        model = MaskedAutoencoder(network)
        pixels = torch.empty(images, *network.encoder.size, network.encoder.channels, dtype=torch.uint8)
        masked = torch.empty(images, math.prod(network.encoder.grid), dtype=torch.bool)
        seeds = torch.empty(images, dtype=torch.int64)
        return Objective(model, model.preprocess, kept=kept, **settings), (pixels, masked, seeds)


def counted(network, kept, *, backward=False, **settings):
    loss, arguments = objective(network, kept, 1, **settings)
    with FlopCounterMode(display=False) as counter:
        value = loss(*arguments)
        if backward:
            value.backward()
    return counter.get_total_flops()


def kept_of(network, ratio=0.75):
    return kept_count(math.prod(network.encoder.grid), ratio)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_flops_are_those_that_torch_counts(network):
    kept = kept_of(network)
    work = costs.work_of(network, kept)
    assert costs.forward_flops(network, work) == counted(network, kept)


@pytest.mark.parametrize(
    ("mask_tokens", "settings"),
    [
        ("decoder", {"predict_share": 0.5}),
        ("decoder", {"predict_share": 0.001}),
        ("decoder", {"loss_on": "all"}),
        ("encoder", {"loss_on": "all"}),
        ("encoder", {"predict_share": 0.25}),
        ("encoder", {"predict_share": 0.25, "corruption": (0.8, 0.1, 0.1)}),
    ],
)
@pytest.mark.parametrize("ratio", [0.4, 0.9])
def test_flops_of_shares_losses_and_corruption(mask_tokens, settings, ratio):
    network = AutoencoderConfig(VIT_B, mask_tokens=mask_tokens)
    kept = kept_of(network, ratio)
    work = costs.work_of(
        network,
        kept,
        share=settings.get("predict_share", 1.0),
        loss_on=settings.get("loss_on", "hidden"),
        corrupts="corruption" in settings,
    )
    assert costs.forward_flops(network, work) == counted(network, kept, **settings)


@pytest.mark.parametrize("name", ["vit-b", "vit-l", "no decoder", "tokens"])
def test_training_takes_three_times_the_forward_flops(name):
    """The gradient of the pictures, which nobody needs, is why it is not quite three times."""
    network = NETWORKS[name]
    kept = kept_of(network)
    forward = costs.forward_flops(network, costs.work_of(network, kept))
    assert counted(network, kept, backward=True) == pytest.approx(forward * (1 + costs.BACKWARD), rel=0.01)


def test_the_papers_numbers():
    """The decoder takes 55 % of ViT-B; leaving mask tokens out saves 3.3 times for ViT-L, table 1c."""
    work = costs.work_of(NETWORKS["vit-b"], 49)
    share = costs.decoder_flops(NETWORKS["vit-b"], work) / costs.forward_flops(NETWORKS["vit-b"], work)
    assert share == pytest.approx(0.55, abs=0.01)
    large = NETWORKS["vit-l"]
    inside = costs.forward_flops(replace(large, mask_tokens="encoder"), costs.work_of(large, 49))
    assert inside / costs.forward_flops(large, costs.work_of(large, 49)) == pytest.approx(3.3, abs=0.1)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_parameters_are_those_of_the_module(network):
    with torch.device("meta"):
        model = MaskedAutoencoder(network)
    found = costs.count_parameters(network)
    everything = list(model.parameters())
    assert found.trained == sum(p.numel() for p in everything if p.requires_grad)
    assert found.trained + found.fixed == sum(p.numel() for p in everything)
    assert found.encoder == sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once of what was made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return made

    def gone(self, count):
        self.now -= count


def peak_per_view(network, kept, precision, *, checkpoint=False, **settings):
    """Bytes that a view adds to the peak of forward and backward: the slope between two batches."""

    def peak(images):
        with FakeTensorMode(allow_non_fake_inputs=True):
            loss, arguments = objective(network, kept, images, device="cpu", **settings)
            for block in loss.model.modules() if checkpoint else ():
                if isinstance(block, Block):
                    block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
            with LiveBytes() as live:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    value = loss(*arguments)
                value.backward()
            return live.peak

    pixels = math.prod(network.encoder.size) * network.encoder.channels
    return (peak(512) - peak(256)) / 256 + pixels  # the pictures themselves are made outside


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vit-b", "vit-nano", "no decoder", "tokens"])
def test_activations_are_those_that_live(name, precision):
    network = NETWORKS[name]
    kept = kept_of(network)
    measured = peak_per_view(network, kept, precision)
    assert costs.activation_bytes(network, costs.work_of(network, kept), precision) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("settings", [{"predict_share": 0.25}, {"loss_on": "all"}])
def test_activations_of_shares_and_losses(settings):
    network, kept = NETWORKS["vit-b"], 49
    work = costs.work_of(
        network, kept, share=settings.get("predict_share", 1), loss_on=settings.get("loss_on", "hidden")
    )
    measured = peak_per_view(network, kept, "bf16", **settings)
    assert costs.activation_bytes(network, work, "bf16") == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("name", ["vit-b", "no decoder"])
def test_activations_computed_again(name):
    network = NETWORKS[name]
    kept = kept_of(network)
    measured = peak_per_view(network, kept, "bf16", checkpoint=True)
    work = costs.work_of(network, kept)
    estimate = costs.activation_bytes(network, work, "bf16", checkpoint=True)
    assert estimate == pytest.approx(measured, rel=0.1)
    assert estimate < 0.5 * costs.activation_bytes(network, work, "bf16")


def test_memory_that_was_measured_on_an_h100():
    """docs/performance.md: 11.9 GiB above the weights, ViT-B, batch 256, bf16 autocast; pictures were made before."""
    network = NETWORKS["vit-b"]
    pictures = 5 * 3 * 224**2  # uint8, normalised
    copies = 2 * costs.count_parameters(network).trained
    views = 256 * (costs.activation_bytes(network, costs.work_of(network, 49), "bf16") - pictures)
    assert (views + copies) / 2**30 == pytest.approx(11.9, rel=0.03)


def test_fixed_memory():
    found = costs.Parameters(encoder=100, decoder=20, fixed=7)
    assert costs.fixed_bytes(found, "fp32") == 120 * 16 + 28
    assert costs.fixed_bytes(found, "bf16") == 120 * 18 + 28
    assert costs.fixed_bytes(found, "fp32", shards=4, largest_block=10) == (120 * 16 + 28) / 4 + 2 * 10 * 8
    assert costs.checkpoint_bytes(found) == 120 * 12 + 28


def planned(**settings):
    given = {"model": "vit-b", "images": 1_281_167, "epochs": 800, "batch_size": 4096, "on": "h100"} | settings
    return plan(PlanConfig(**given))


def test_the_block_that_fsdp_gathers():
    network = NETWORKS["vit-l"]
    with torch.device("meta"):
        model = MaskedAutoencoder(network)
    largest = max(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block))
    assert costs.block_parameters(network) == largest


def test_speed_that_was_measured_on_an_h100():
    """docs/performance.md, images/s of pretraining steps; the default utilisation is these rows' mean."""
    for model, rate, flags in [("vit-b", 3419, {}), ("vit-b", 4679, {"compile": True}), ("vit-l", 1678, {})]:
        assert planned(model=model, **flags).images_per_second == pytest.approx(rate, rel=0.06)


def test_length_and_rates_of_the_paper():
    found = planned(holdout=0, processes=8)
    assert found.steps == math.ceil(800 * 1_281_167 / 4096)
    assert found.learning_rate == pytest.approx(2.4e-3)
    assert found.hours == pytest.approx(found.steps * found.step_seconds / 3600)
    assert found.micro_batch * found.accumulation == 4096 / 8
    assert found.images_per_second == pytest.approx(4096 / found.step_seconds)
    assert planned(holdout=0, masks_per_image=4).steps == math.ceil(800 * 4 * 1_281_167 / 4096)
    assert planned().images == 1_281_167 - 2000
    assert planned(images=100).images == 95
    assert planned(epochs=None, steps=7).steps == 7


def test_micro_batch_fits_and_no_larger_one_would():
    found = planned(on="l4")
    room = found.device.memory * 2**30 * 0.9
    used = found.fixed_bytes + found.micro_batch * found.view_bytes
    assert used <= room < used + found.micro_batch * found.view_bytes
    assert 4096 % found.micro_batch == 0
    assert any("accumulated over" in sentence for sentence in found.advice)
    assert planned(on="l4", checkpoint_activations=True).micro_batch > found.micro_batch
    assert planned(on="l4", checkpoint_activations=True).step_seconds > found.step_seconds
    assert planned(on="l4", micro_batch=4096).advice[0].startswith("--micro-batch 4096 does not fit")


def test_what_does_not_fit_at_all():
    found = planned(model="vit-h", image_size=(2240,), on="t4", precision="fp32")
    assert (found.micro_batch, found.accumulation) == (0, 0)
    assert "Not even one view fits" in found.advice[0]
    assert "--fsdp" in found.advice[0]
    assert "does not fit" in found.describe()


def test_fsdp_shares_what_does_not_depend_on_the_batch():
    whole, shared = planned(model="vit-h", processes=8), planned(model="vit-h", processes=8, fsdp=True)
    assert shared.fixed_bytes < whole.fixed_bytes / 4
    assert shared.view_bytes == whole.view_bytes


def test_advice_is_what_it_says():
    decoder = next(sentence for sentence in planned().advice if "--decoder-depth 1" in sentence)
    ratio = planned().training_flops / planned(decoder_depth=1).training_flops
    assert f"{ratio:.1f} times cheaper" in decoder
    assert not any("--decoder-depth" in sentence for sentence in planned(model="vit-l").advice)
    assert any("--precision bf16" in sentence for sentence in planned(precision="fp32").advice)
    assert any("--from vit-b" in sentence for sentence in planned(images=5000).advice)
    assert not any("--from vit-b" in sentence for sentence in planned(images=5000, from_="vit-b").advice)
    assert any("multiple of 3" in sentence for sentence in planned(processes=3).advice)
    assert any("within a week" in sentence for sentence in planned(model="vit-h", epochs=1600).advice)
    week = next(sentence for sentence in planned(model="vit-h", epochs=1600).advice if "within a week" in sentence)
    assert planned(model="vit-h", epochs=1600, processes=int(week.split()[1])).hours <= 168


def test_reading_is_asked_for_as_fast_as_the_device_computes():
    found = planned()
    assert found.reading.pictures_per_second == pytest.approx(found.images_per_second)
    assert found.reading.cores == math.ceil(found.images_per_second * found.reading.milliseconds / 1000)
    assert planned(masks_per_image=2).reading.pictures_per_second == pytest.approx(found.images_per_second / 2)


def test_pictures_are_counted_and_timed():
    found = plan(PlanConfig(str(ASSETS), epochs=10, batch_size=2))
    assert (found.images, found.steps) == (2, 10)
    assert found.reading.milliseconds > 0.1
    assert found.reading.source == "timed on 2 pictures of DATA"
    assert found.device.name == "cpu"
    assert found.precision == "fp32"


def test_the_network_is_the_one_that_would_be_trained(tmp_path):
    assert network_of(PlanConfig(model="vit-nano", epochs=1)) == NETWORKS["vit-nano"]
    assert network_of(PlanConfig(from_="vit-b", epochs=1)) == AutoencoderConfig(VIT_B)
    assert network_of(PlanConfig(from_="vit-b-448", epochs=1)).encoder.size == (448, 448)
    assert network_of(PlanConfig(from_="vit-l-pixel", epochs=1)) == AutoencoderConfig(VIT_L, target="pixels")
    embedded = maehub.load_autoencoder("vit-nano")
    assert network_of(PlanConfig(from_="vit-nano", epochs=1)) == embedded.config
    maehub.save(embedded, tmp_path / "model")
    assert network_of(PlanConfig(from_=str(tmp_path / "model"), epochs=1)) == embedded.config
    changed = network_of(PlanConfig(from_="vit-b", epochs=1, decoder_depth=2, target="pca", image_size=(320, 256)))
    assert (changed.decoder_depth, changed.outputs, changed.encoder.size) == (2, 96, (320, 256))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"on": "abacus"}, "--on abacus is not one of auto, cpu, v100"),
        ({"images": None}, "how many images"),
        ({"holdout": 2_000_000}, "leaves nothing"),
        ({"on": "v100", "precision": "bf16"}, "v100 does not compute in bf16"),
        ({"from_": "somebody/something"}, "maehub download somebody/something"),
        ({"model": "vit-x"}, "vit-x is not one of"),
        ({"utilisation": 1.5}, "--utilisation must be"),
        ({"images": 0}, "--images must be"),
        ({"processes": 0}, "--processes must be"),
        ({"epochs": None}, "--steps or as --epochs"),
    ],
)
def test_what_cannot_be_planned(settings, words):
    with pytest.raises(UsageError, match=words):
        planned(**settings)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(64))
    with pytest.raises(DataError, match=r"broken\.jpg"):
        plan(PlanConfig(str(tmp_path), epochs=1, on="h100"))


def test_devices():
    assert device_row("a100-80").rate("bf16") == 312
    assert device_row("auto", "cpu").name == "cpu"
    for row in DEVICES.values():
        assert row.fp32 < 100
        assert row.bf16 == 0 or row.bf16 > 2 * row.fp32 or row.name.startswith("rtx")
        assert "NVIDIA" in row.source
    cpu = measured_cpu()
    assert 1e-3 < cpu.fp32 < 50
    assert 0.1 < cpu.memory < 10_000
    assert cpu.bandwidth > 0.1


def test_every_flag_of_pretrain_is_one_of_plan():
    names = set(PretrainConfig.__dataclass_fields__)
    assert set(PlanConfig.__dataclass_fields__) == names | {"images", "on", "processes", "utilisation"}


def test_command(capsys):
    words = ["plan", "-m", "vit-l", "--images", "1281167", "--epochs", "800", "--on", "h100", "--batch-size", "4096"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for fact in (
        "303.1 M parameters in the encoder",
        "41.0 G forward",
        "249,838 steps",
        "What to change",
        "989 TFLOP/s",
    ):
        assert fact in text
    assert max(map(len, text.splitlines())) <= 120
    assert cli.main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["parameters"]["encoder"] == 303_099_904
    assert facts["device"]["name"] == "h100"
