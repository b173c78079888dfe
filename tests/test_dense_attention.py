"""Blocks that attend in another way: against transformers' BEiT and ViTDet, their folders, and batch statistics."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import Forked

import maehub
from maehub.data import MapClasses
from maehub.dense import AttentionConfig, DenseEncoder, Segmenter, SegmenterConfig
from maehub.dense.attention import unwindowed, windowed
from maehub.errors import IntegrityError, UsageError
from maehub.interop import FeaturePyramid
from maehub.models import Encoder, EncoderConfig
from maehub.train.engine import Group, wrapped
from maehub.train.finetuning.classifier import drop_paths
from maehub.train.finetuning.dense.job import dense_groups
from maehub.train.finetuning.dense.map_job import build_segmenter
from maehub.train.finetuning.dense.recipes import DenseFacts, settle_maps

CLASSES = MapClasses(("ground", "red", "blue"), (0, 1, 2), (0, 1, 2))
PUBLISHED = AttentionConfig(relative="table", layer_scale=True)
VITDET = AttentionConfig(window=3, whole=(1, 3), relative="decomposed", cls=False)


def tiny(size=32, depth=4, **changes):
    torch.manual_seed(0)
    return Encoder(EncoderConfig(size, 8, 3, 32, depth, 2, **changes)).eval()


def stirred(model):
    """With numbers in what begins as nothing."""
    torch.manual_seed(1)
    for value in model.added().values():
        value.normal_(std=0.5)
    return model


# -- others


def give(theirs, ours, *, names):
    for own, other in names:
        theirs.get_submodule(other).load_state_dict(ours.get_submodule(own).state_dict())


def test_tables_and_scale_are_those_of_beit():
    """Of transformers, which has no bias of keys; ours is made 0."""
    transformers = pytest.importorskip("transformers")
    encoder = tiny(32)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.bias)
        block.attn.qkv.bias.data[32:64] = 0
    ours = stirred(DenseEncoder(encoder, PUBLISHED))
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, use_relative_position_bias=True, layer_scale_init_value=1.0,
        use_absolute_position_embeddings=True, use_mean_pooling=False, vocab_size=8, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.BeitModel(config, add_pooling_layer=False).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = Encoder.embed(ours, images)
    with torch.no_grad():
        for block, layer, number in zip(ours.blocks, theirs.layers, range(4), strict=True):
            for part, (weight, bias) in zip(
                ("q_proj", "k_proj", "v_proj"),
                zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True),
                strict=True,
            ):
                getattr(layer.attention, part).weight.copy_(weight)
                if part != "k_proj":
                    getattr(layer.attention, part).bias.copy_(bias)
            names = (("attn.proj", "attention.o_proj"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                     ("mlp", "mlp"))  # fmt: skip
            give(layer, block, names=names)
            layer.relative_position_bias.relative_position_bias_table.copy_(block.attn.table)
            layer.lambda_1.copy_(block.gamma_1)
            layer.lambda_2.copy_(block.gamma_2)
            tokens = layer(tokens, resolution=images.shape[2:])
            found = ours.maps(images, (number,), normed=False)[0].flatten(2).mT
            assert (found - tokens[:, 1:]).abs().max() < 1e-5


def test_a_table_is_looked_up_by_offsets():
    """Written out, for a grid that is no square: there BEiT of transformers takes rows of its table for columns."""
    attn = stirred(DenseEncoder(tiny((16, 24)), PUBLISHED)).blocks[0].attn
    table, bias = attn.table.detach().numpy(), attn.bias().detach().numpy()
    assert bias.shape == (2, 7, 7)
    for asking in range(6):
        for asked in range(6):
            down, across = asking // 3 - asked // 3 + 1, asking % 3 - asked % 3 + 2
            assert (bias[:, 1 + asking, 1 + asked] == table[5 * down + across]).all()
    assert (bias[:, 0, 1:] == table[-3, :, None]).all()
    assert (bias[:, 1:, 0] == table[-2, :, None]).all()
    assert (bias[:, 0, 0] == table[-1]).all()
    encoder, images = tiny((16, 24)), torch.randn(1, 3, 16, 24)
    model, block = stirred(DenseEncoder(encoder, AttentionConfig(relative="table"))), encoder.blocks[0]
    with torch.no_grad():
        tokens = encoder.embed(images)
        query, key, value = block.attn._heads(block.attn.qkv(block.norm1(tokens)), 3)
        logits = query @ key.mT / 4 + model.blocks[0].attn.bias()
        tokens = tokens + block.attn.proj((logits.softmax(3) @ value).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        found = model.maps(images, (0,), normed=False)[0]
    assert (found.flatten(2).mT - tokens[:, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [64, (56, 80), (16, 40), 24])
def test_windows_and_decomposed_positions_are_those_of_vitdet(size):
    """Of transformers: positions, windows of three patches, padded, and blocks without, of grids of any size."""
    transformers = pytest.importorskip("transformers")
    ours = stirred(DenseEncoder(tiny(64), VITDET))
    config = transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=64, pretrain_image_size=64,
        patch_size=8, window_size=3, window_block_indices=[0, 2], use_relative_position_embeddings=True,
    )  # fmt: skip
    theirs = transformers.VitDetModel(config).eval()
    with torch.no_grad():
        theirs.embeddings.position_embeddings.copy_(ours.pos_embed)
        theirs.embeddings.projection.load_state_dict(ours.patch_embed.proj.state_dict())
        for block, layer in zip(ours.blocks, theirs.encoder.layer, strict=True):
            names = (("attn", "attention"), ("norm1", "norm1"), ("norm2", "norm2"), ("mlp", "mlp"))
            give(layer, block, names=names)
        images = torch.randn(2, 3, *np.broadcast_to(size, 2).tolist())
        wanted = theirs(images, output_hidden_states=True).hidden_states[1:]
        found = ours.maps(images, range(4), normed=False)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5


# -- what begins as nothing


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("size", [32, (40, 24)])
def test_without_arguments_it_is_the_encoder(size, normed):
    encoder = tiny()
    images = torch.randn(2, 3, *np.broadcast_to(size, 2).tolist())
    with torch.no_grad():
        wanted = encoder.features(images, pool="map", layers=[1, -1], norm=normed)
        found = DenseEncoder(encoder, AttentionConfig()).maps(images, (1, -1), normed=normed)
    assert (torch.stack(found, 1) == wanted).all()


@pytest.mark.parametrize(
    ("config", "without"),
    [(PUBLISHED, AttentionConfig()), (VITDET, AttentionConfig(window=3, whole=(1, 3), cls=False))],
)
def test_tables_begin_as_nothing(config, without):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = [DenseEncoder(tiny(), one).maps(images, (0, 3), normed=True) for one in (config, without)]
        for one, other in zip(*maps, strict=True):
            assert (one - other).abs().max() < 1e-5


def test_a_window_of_the_whole_map_is_no_window():
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (
            DenseEncoder(tiny(), AttentionConfig(window=window, cls=False)).maps(images, (3,), normed=False)[0]
            for window in (4, None)
        )
    assert (one - other).abs().max() < 1e-5


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_windows_hold_every_place_once(rows, columns, side, count):
    numbers = torch.arange(1.0, 1 + count * rows * columns * 2).reshape(count, rows, columns, 2)
    windows = windowed(numbers, side)
    across, down = -(-columns // side), -(-rows // side)
    assert windows.shape == (count * across * down, side, side, 2)
    assert sorted(windows[windows > 0].tolist()) == numbers.reshape(-1).tolist()
    corner = windows.reshape(count, down, across, side, side, 2)[:, 0, 0, : min(side, rows), : min(side, columns)]
    assert (corner == numbers[:, :side, :side]).all()
    assert (unwindowed(windows, (rows, columns)) == numbers).all()


# -- as a part of networks


@pytest.mark.parametrize("config", [PUBLISHED, VITDET])
def test_every_tensor_is_trained(config):
    """Checkpointed and in bfloat16 too, with the gradients that it has without."""
    images, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointed in (False, True):
        model = stirred(DenseEncoder(tiny(), config)).requires_grad_(True)
        if checkpointed:
            wrapped(model, Group(), "fp32", compile=False, fsdp=False, checkpoint_activations=True)
        model.maps(images, (3,), normed=True)[0].square().sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, value in gradients[0].items():
        assert value is not None, name
        assert (value - gradients[1][name]).abs().max() < 1e-5 * value.abs().max() + 1e-8, name
        assert value.abs().max() > 0 or name == "cls_token", name
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rough = model.maps(images, (3,), normed=True)[0].float()
    exact = model.maps(images, (3,), normed=True)[0]
    assert (rough - exact).abs().mean() < 0.05


def test_stochastic_depth_is_that_of_the_blocks():
    torch.manual_seed(0)
    model = DenseEncoder(tiny(), PUBLISHED)
    drop_paths(list(model.blocks), 0.9)
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        calm = [model.maps(images, (3,), normed=False)[0] for _ in range(2)]
        model.train()
        wild = [model.maps(images, (3,), normed=False)[0] for _ in range(2)]
    assert (calm[0] == calm[1]).all()
    assert not (wild[0] == wild[1]).all()


def test_a_pyramid_takes_its_maps():
    encoder = stirred(DenseEncoder(tiny(), VITDET))
    pyramid = FeaturePyramid(encoder, 8)
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        levels = pyramid(images)
        again = pyramid.of(encoder.maps(images, pyramid.layers, normed=False))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 12), (8, 6), (4, 3), (2, 2)]
    assert all((levels[name] == again[name]).all() for name in levels)


ONE_OF_TWO = """
import sys
import torch
from maehub.dense.decoders import SharedBatchNorm
folder, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
norm, (x, weight) = SharedBatchNorm(5), torch.load(f"{folder}/given.pt")
x, weight = (part[[slice(0, 3), slice(3, 4)][rank]] for part in (x, weight))
x.requires_grad_(True)
y = norm(x)
(y * weight).sum().backward()
torch.distributed.all_reduce(norm.weight.grad)
found = {"y": y.detach(), "x": x.grad, "slope": norm.weight.grad, **norm.state_dict()}
norm.eval()
found["later"] = norm(x).detach()
torch.save(found, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_batch_statistics_and_their_gradients_are_of_all_processes(tmp_path):
    """Two real ones, of three pictures and of one, against torch's own in one process; far from zero, where squares
    would cancel."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 5, 6, 7) + 50, torch.randn(4, 5, 6, 7)
    torch.save((x, weight), tmp_path / "given.pt")
    lines = [[sys.executable, "-c", ONE_OF_TWO, str(tmp_path), str(rank)] for rank in range(2)]
    parts = [Forked(line, stderr=subprocess.PIPE, text=True) for line in lines]
    said = [part.communicate(timeout=120)[1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], said
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    norm = torch.nn.BatchNorm2d(5)
    x.requires_grad_(True)
    y = norm(x)
    (y * weight).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([part["y"] for part in found]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([part["x"] for part in found]), x.grad, **close)
    torch.testing.assert_close(torch.cat([part["later"] for part in found]), norm.eval()(x).detach(), **close)
    for part in found:
        torch.testing.assert_close(part["slope"], norm.weight.grad, **close)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(part[name], norm.state_dict()[name])


def segmenter(attention):
    torch.manual_seed(0)
    more = {"decoder": "upernet", "layers": (0, 1, 2, 3), "width": 12, "auxiliary": True, "norm": "batch"}
    return Segmenter(tiny(), SegmenterConfig(CLASSES, attention=attention, **more)).eval()


@pytest.mark.parametrize("config", [PUBLISHED, VITDET])
def test_a_folder_gives_the_same_segmenter(tmp_path, config):
    model = segmenter(config)
    stirred(model.encoder)
    maehub.save_segmenter(model, tmp_path / "m")
    again = maehub.load_segmenter(tmp_path / "m")
    assert again.config == model.config
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (again(images) == model(images)).all()
        plain = maehub.load(tmp_path / "m")
        assert type(plain) is Encoder
        assert (plain.features(images) == tiny().features(images)).all()
        assert (model.encoder.plain().features(images) == tiny().features(images)).all()
    text = (tmp_path / "m" / "segmenter.json").read_text()
    for wrong in (text.replace('"cls"', '"class"'), text.replace('"layer_scale": ', '"layer_scale": 7')):
        (tmp_path / "m" / "segmenter.json").write_text(wrong)
        with pytest.raises(IntegrityError):
            maehub.load_segmenter(tmp_path / "m")


def test_folders_without_attention_are_read(tmp_path):
    model = segmenter(AttentionConfig())
    assert type(model.encoder) is Encoder
    maehub.save_segmenter(model, tmp_path / "m")
    path = tmp_path / "m" / "segmenter.json"
    said = json.loads(path.read_text())
    del said["attention"]
    path.write_text(json.dumps(said))
    assert maehub.load_segmenter(tmp_path / "m").config == model.config


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0, "cls": False},
        {"window": 3},
        {"window": 2.0, "cls": False},
        {"window": 3, "whole": (-1,), "cls": False},
        {"window": 3, "whole": (4,), "cls": False},
        {"whole": (1,)},
        {"relative": "decomposed"},
        {"relative": "table", "cls": False},
        {"relative": "both"},
        {"layer_scale": 1},
        {"cls": None},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError):
        DenseEncoder(tiny(), AttentionConfig(**wrong))


def test_what_it_has_no_answer_for_is_refused():
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(UsageError, match="32, 32"):
        DenseEncoder(tiny(), PUBLISHED).maps(torch.randn(1, 3, 16, 64), (0,), normed=True)  # of as many patches
    model = DenseEncoder(tiny(), VITDET)
    for refused in (lambda: model.features(images), lambda: model.attention(images), lambda: model.resized(64)):
        with pytest.raises(UsageError):
            refused()
    with pytest.raises(UsageError, match="takes an Encoder"):
        DenseEncoder(model, VITDET)
    with pytest.raises(UsageError):
        SegmenterConfig(CLASSES, attention={"relative": "table"})


# -- the published recipe


def test_tables_train_at_the_rate_of_their_block_and_are_decayed():
    settings = settle_maps("ade20k", DenseFacts(32, 4, 100, trained=True), {})
    assert settings.attention == PUBLISHED
    shape = {name: getattr(settings, name) for name in ("decoder", "layers", "width", "norm", "attention")}
    described = SegmenterConfig(CLASSES, **shape)
    model = build_segmenter(tiny(), described, settings, 0)
    groups = dense_groups(model, settings)
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    for number, block in enumerate(model.encoder.blocks):
        rate = pytest.approx(0.65 ** (4 - number))
        assert place[id(block.attn.table)] | {"params": 0} == {"params": 0, "lr_scale": rate, "weight_decay": 0.05}
        for gamma in (block.gamma_1, block.gamma_2):
            assert (gamma == 1).all()
            assert place[id(gamma)] | {"params": 0} == {"params": 0, "lr_scale": rate, "weight_decay": 0.0}
    assert model.encoder.blocks[3].drop_path.drop_prob == pytest.approx(settings.drop_path)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(place) == len(trained)
