"""The names of lightly, mmpretrain and detectron2, against their own classes where they can be installed.

mmpretrain's packages pin old versions of others, so its classes are not in the default environment;
`scripts/test-peers` makes one that has them and runs this file there.
"""

import re
from dataclasses import replace

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import TINY, assert_equal_outputs, autoencoder_config, images, make_autoencoder, make_encoder, official
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer
from transformers import VitDetConfig, VitDetModel

import maehub
from maehub.conversion.conversion import convert
from maehub.errors import IntegrityError, UsageError
from maehub.models.autoencoder import MaskedAutoencoder
from maehub.models.encoder import Encoder
from maehub.weights.keys import detect, from_official, official_names, parts, to_official
from maehub.weights.library_keys import LIGHTLY_MASK_TOKEN, detect_foreign
from maehub.weights.model_folder import open_autoencoder, open_encoder, save
from maehub.weights.pickles import read_pickle
from maehub.weights.tensorfile import read_tensors, write_tensors

MAE = autoencoder_config("tiny", TINY, "pixels")
SAID = {"heads": 4, "decoder_heads": 4, "target": "pixels"}
CLASSIFIERS = {"cls": replace(TINY, classes=3), "mean": replace(TINY, classes=3, pool="mean")}
SEEDS = (3, 4)


@pytest.fixture(scope="module")
def autoencoder():
    return make_autoencoder(MAE)


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def written(model, folder, to):
    """The tensors that `convert` writes of a model."""
    save(model, folder / "model")
    result = convert(folder / "model", folder / to, to=to)
    assert result.certificate.holds
    return read_tensors(folder / to / "model.safetensors").tensors


def read_back(state, folder, **said):
    """A foreign state dictionary, as a file, as the network that maehub reads from it."""
    write_tensors(folder / "theirs.safetensors", {name: value.clone() for name, value in state.items()})
    return convert(folder / "theirs.safetensors", folder / "again", **said)


# ---- names alone


@pytest.mark.parametrize("dialect", ["lightly", "mmpretrain"])
def test_what_is_written_is_read_back(autoencoder, dialect):
    for model in (autoencoder, make_encoder(TINY), *map(make_encoder, CLASSIFIERS.values())):
        state = official(model)
        theirs = from_official(state, dialect)
        assert detect(theirs) == dialect
        again = to_official(theirs)
        assert again.dialect == dialect
        assert_same(again.state, state)
        assert set(again.dropped) == ({LIGHTLY_MASK_TOKEN} if dialect == "lightly" else set())


@settings(max_examples=25)
@given(st.data())
def test_any_part_of_a_state_survives(data):
    everything = sorted(official(MaskedAutoencoder(MAE)))
    names = data.draw(st.sets(st.sampled_from(everything)))
    names |= {"cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"}  # what tells the dialects
    part = {name: torch.arange(6.0) + number for number, name in enumerate(sorted(names))}
    for dialect in ("lightly", "mmpretrain"):
        assert_same(to_official(from_official(part, dialect)).state, part)


@given(st.sampled_from(["lightly", "mmpretrain", "detectron2"]), st.text(max_size=12))
def test_unknown_names_stay_for_the_strict_check(dialect, odd):
    sign = {"lightly": "backbone.vit.cls_token", "mmpretrain": "neck.decoder_embed.bias", "detectron2": "net.pos_embed"}
    name = f"surprise.{odd}"
    found = official_names([sign[dialect], name])
    assert found.dialect == dialect
    assert found.names[name] == name


@pytest.mark.parametrize(
    ("dialect", "ours", "theirs"),
    [
        ("lightly", "blocks.2.attn.qkv.weight", "backbone.vit.blocks.2.attn.qkv.weight"),
        ("lightly", "decoder_blocks.1.mlp.fc1.bias", "decoder.blocks.1.mlp.fc1.bias"),
        ("lightly", "decoder_pos_embed", "decoder.pos_embed"),
        ("lightly", "decoder_pred.weight", "prediction_head.weight"),
        ("mmpretrain", "patch_embed.proj.bias", "backbone.patch_embed.projection.bias"),
        ("mmpretrain", "blocks.2.mlp.fc1.weight", "backbone.layers.2.ffn.layers.0.0.weight"),
        ("mmpretrain", "blocks.2.mlp.fc2.weight", "backbone.layers.2.ffn.layers.1.weight"),
        ("mmpretrain", "blocks.1.norm1.weight", "backbone.layers.1.ln1.weight"),
        ("mmpretrain", "blocks.1.norm2.weight", "backbone.layers.1.ln2.weight"),
        ("mmpretrain", "decoder_blocks.1.norm1.bias", "neck.decoder_blocks.1.ln1.bias"),
        ("mmpretrain", "norm.bias", "backbone.ln1.bias"),
        ("mmpretrain", "decoder_norm.weight", "neck.ln1.weight"),
        ("mmpretrain", "decoder_blocks.0.attn.proj.bias", "neck.decoder_blocks.0.attn.proj.bias"),
        ("detectron2", "blocks.0.norm2.weight", "backbone.net.blocks.0.norm2.weight"),
    ],
)
def test_names_by_hand(autoencoder, dialect, ours, theirs):
    state = official(autoencoder)
    assert torch.equal(from_official(state, dialect)[theirs], state[ours])


def test_none_of_the_other_dialects_is_taken_for_one_of_these(autoencoder):
    state = official(autoencoder)
    for dialect in ("official", "timm", "transformers-4", "module"):
        assert detect_foreign(from_official(state, dialect)) is None
        assert detect_foreign(from_official(official(autoencoder.encoder), dialect)) is None


def test_parts_of_a_fused_tensor():
    assert parts("blocks.0.attn.qkv.bias") == tuple(f"blocks.0.attn.{one}.bias" for one in ("query", "key", "value"))
    assert parts("norm.weight") == ("norm.weight",)


# ---- lightly


class OurLightly(nn.Module):
    """The modules of lightly's MAE examples, under the names that they have there."""

    def __init__(self, config, since_1_6=True, classes=0):
        from lightly.models import modules

        super().__init__()
        encoder = config.encoder
        vit = timm_vit.VisionTransformer(
            encoder.size, encoder.patch_size, embed_dim=encoder.width, depth=encoder.depth, num_heads=encoder.heads,
            num_classes=classes,
        )  # fmt: skip
        self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
        count, width = vit.patch_embed.num_patches, config.decoder_width
        common = {"num_patches": count, "mlp_ratio": 4.0}
        self.since_1_6 = since_1_6
        if since_1_6:
            self.decoder_embed = nn.Linear(encoder.width, width)
            self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
                embed_dim=width, depth=config.decoder_depth, num_heads=config.decoder_heads, **common
            )
            self.prediction_head = nn.Linear(width, config.prediction_width)
        else:
            self.decoder = modules.MAEDecoderTIMM(
                patch_size=encoder.patch_size, embed_dim=encoder.width, decoder_embed_dim=width,
                decoder_depth=config.decoder_depth, decoder_num_heads=config.decoder_heads, **common,
            )  # fmt: skip

    def forward(self, pictures, keep):
        """Every patch's prediction, where ``keep`` (B, K) counts the class token as 0."""
        tokens = self.backbone.encode(images=pictures, idx_keep=keep)
        tokens = self.decoder_embed(tokens) if self.since_1_6 else self.decoder.embed(tokens)
        length = self.backbone.sequence_length
        whole = self.decoder.mask_token.repeat(len(pictures), length, 1)
        whole = whole.scatter(1, keep[:, :, None].expand(-1, -1, whole.shape[2]), tokens)
        if self.since_1_6:
            return self.prediction_head(self.decoder.decode(self.decoder.add_pos_embed(whole)))[:, 1:]
        return self.decoder.predict(self.decoder.decode(whole))[:, 1:]


def kept(masked):
    """The tokens that lightly keeps, class token first, for patches that are hidden here."""
    visible = torch.stack([(~row).nonzero().flatten() for row in masked]) + 1
    return torch.cat([torch.zeros(len(masked), 1, dtype=torch.int64), visible], dim=1)


@torch.inference_mode()
def assert_lightly_computes(theirs, ours):
    pictures = images(TINY)
    output = ours(pictures, seeds=SEEDS)
    assert_equal_outputs(output.prediction, theirs.eval()(pictures, kept(output.masked)))


@pytest.fixture
def lightly():
    return pytest.importorskip("lightly.models.modules")


@pytest.mark.filterwarnings("ignore:MAEDecoderTIMM")
def test_lightly_and_back(lightly, autoencoder, tmp_path):
    theirs = OurLightly(MAE)
    theirs.load_state_dict(written(autoencoder, tmp_path, "lightly"), strict=True)
    assert_lightly_computes(theirs, autoencoder)
    with torch.no_grad():  # as it is after training there
        for value in theirs.parameters():
            value.add_(torch.randn_like(value) * 0.01)
    result = read_back(theirs.state_dict(), tmp_path, **SAID)
    assert result.dropped == (LIGHTLY_MASK_TOKEN,)
    assert_lightly_computes(theirs, open_autoencoder(result.folder))


@pytest.mark.filterwarnings("ignore:.*MAEDecoderTIMM")
def test_lightlys_older_decoder_and_the_untrained_head_of_timm(lightly, tmp_path):
    theirs = OurLightly(MAE, since_1_6=False, classes=10)
    result = read_back(theirs.state_dict(), tmp_path, **SAID)
    assert set(result.dropped) == {LIGHTLY_MASK_TOKEN, "backbone.vit.head.weight", "backbone.vit.head.bias"}
    assert_lightly_computes(theirs, open_autoencoder(result.folder))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.inference_mode()
def test_lightlys_encoder_alone_and_its_classifier(lightly, pool, tmp_path):
    ours = make_encoder(CLASSIFIERS[pool])
    vit = timm_vit.VisionTransformer(
        32, 8, embed_dim=64, depth=3, num_heads=4, num_classes=3, global_pool="avg" if pool == "mean" else "token"
    )
    theirs = nn.ModuleDict({"backbone": lightly.MaskedVisionTransformerTIMM(vit=vit)})
    theirs.load_state_dict(written(ours, tmp_path, "lightly"), strict=True)
    pictures = images(TINY)
    assert_equal_outputs(ours(pictures), theirs["backbone"].vit.eval()(pictures))
    alone = theirs["backbone"].state_dict()  # "vit.…" and "mask_token"
    result = read_back(alone, tmp_path, heads=4)
    assert result.dropped == ("mask_token",)
    assert_equal_outputs(open_encoder(result.folder)(pictures), ours(pictures))


@pytest.mark.parametrize("masked", [True, False])
@torch.inference_mode()
def test_lightlys_encoder_of_torchvision(lightly, masked, tmp_path):
    vit = TorchvisionTransformer(32, 8, 3, 4, 64, 256, num_classes=5)
    theirs = lightly.MaskedVisionTransformerTorchvision(vit=vit)
    for value in vit.parameters():
        value.add_(torch.randn_like(value) * 0.1)
    state = {f"backbone.{name}": value for name, value in theirs.state_dict().items()} if masked else vit.state_dict()
    ours = open_encoder(read_back(state, tmp_path, heads=4).folder)
    assert ours.config == replace(TINY, classes=5)
    pictures = images(TINY)
    assert_equal_outputs(ours(pictures), vit.eval()(pictures))
    assert_equal_outputs(ours.features(pictures, pool="tokens"), theirs.eval().encode(pictures)[:, 1:])


@torch.inference_mode()
def test_lightlys_decoder_of_torchvision(lightly, tmp_path):
    """As its examples had it first: MAEBackbone, MAEDecoder, and the mask token beside them."""
    parts_ = {
        "backbone": lightly.MAEBackbone(32, 8, 3, 4, 64, 256),
        "decoder": lightly.MAEDecoder(17, 2, 4, 64, 32, 128, 192),
    }
    theirs = nn.ModuleDict(parts_).eval()
    token = torch.randn(1, 1, 32)
    result = read_back(theirs.state_dict() | {"mask_token": token}, tmp_path, **SAID)
    assert set(result.dropped) == {"backbone.heads.head.weight", "backbone.heads.head.bias"}
    ours, pictures = open_autoencoder(result.folder), images(TINY)
    output = ours(pictures, seeds=SEEDS)
    keep = kept(output.masked)
    tokens = parts_["decoder"].embed(parts_["backbone"].encode(pictures, keep))
    whole = token.repeat(2, 17, 1).scatter(1, keep[:, :, None].expand(-1, -1, 32), tokens)
    expected = parts_["decoder"].predict(parts_["decoder"].decode(whole))[:, 1:]
    assert_equal_outputs(output.prediction, expected)


# ---- mmpretrain


def mmpretrain_arch(config):
    return {
        "embed_dims": config.width, "num_layers": config.depth, "num_heads": config.heads,
        "feedforward_channels": int(config.width * config.mlp_ratio),
    }  # fmt: skip


# What mmpretrain 1.2.0's own classes called their tensors; the slow tests below look whether they still do.
MMPRETRAIN_BACKBONE = {"cls_token", "pos_embed", "patch_embed.projection.weight", "patch_embed.projection.bias"}
MMPRETRAIN_NECK = {
    "mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias", "ln1.weight", "ln1.bias",
    "decoder_pred.weight", "decoder_pred.bias",
}  # fmt: skip
MMPRETRAIN_LAYER = {
    f"{part}.{leaf}"
    for part in ("ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1")
    for leaf in ("weight", "bias")
}


def mmpretrain_names(depth, decoder_depth=0, last=("ln1",)):
    names = {f"backbone.{name}" for name in MMPRETRAIN_BACKBONE}
    names |= {f"backbone.layers.{n}.{name}" for n in range(depth) for name in MMPRETRAIN_LAYER}
    names |= {f"backbone.{norm}.{leaf}" for norm in last for leaf in ("weight", "bias")}
    if decoder_depth:
        names |= {f"neck.{name}" for name in MMPRETRAIN_NECK}
        names |= {f"neck.decoder_blocks.{n}.{name}" for n in range(decoder_depth) for name in MMPRETRAIN_LAYER}
    return names


def test_mmpretrains_names_are_those_of_its_classes(autoencoder, tmp_path):
    assert set(written(autoencoder, tmp_path / "a", "mmpretrain")) == mmpretrain_names(3, 2)
    assert set(written(make_encoder(TINY), tmp_path / "b", "mmpretrain")) == mmpretrain_names(3)
    head = {"head.fc.weight", "head.fc.bias"}
    mean = written(make_encoder(CLASSIFIERS["mean"]), tmp_path / "c", "mmpretrain")
    assert set(mean) == mmpretrain_names(3, last=("ln2",)) | head
    head = {"head.layers.head.weight", "head.layers.head.bias"}
    token = written(make_encoder(CLASSIFIERS["cls"]), tmp_path / "d", "mmpretrain")
    assert set(token) == mmpretrain_names(3) | head


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_mmpretrain_and_back(autoencoder, tmp_path):
    pytest.importorskip("mmpretrain")
    from mmpretrain.models.necks.mae_neck import MAEPretrainDecoder
    from mmpretrain.models.selfsup.mae import MAEViT

    backbone = MAEViT(arch=mmpretrain_arch(TINY), img_size=32, patch_size=8)
    theirs = nn.ModuleDict({"backbone": backbone, "neck": MAEPretrainDecoder(16, 8, 3, 64, 32, 2, 4)}).eval()
    assert set(theirs.state_dict()) == mmpretrain_names(3, 2)
    theirs.load_state_dict(written(autoencoder, tmp_path, "mmpretrain"), strict=True)
    pictures = images(TINY)

    def compare(ours):
        output = ours(pictures, seeds=SEEDS)
        order = output.masked.int().argsort(dim=1, stable=True)
        keep = order[:, : int((~output.masked[0]).sum())]
        backbone.random_masking = lambda x, ratio: (
            x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2])), output.masked, order.argsort(dim=1)
        )  # fmt: skip
        latent, _, restore = backbone(pictures)
        assert_equal_outputs(output.prediction, theirs["neck"](latent, restore))

    compare(autoencoder)
    for value in theirs.parameters():
        value.add_(torch.randn_like(value) * 0.01)
    compare(open_autoencoder(read_back(theirs.state_dict(), tmp_path, **SAID).folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.inference_mode()
def test_mmpretrains_classifier_and_its_own_loader(pool, tmp_path):
    pytest.importorskip("mmpretrain")
    from mmengine.runner.checkpoint import load_checkpoint
    from mmpretrain.models import LinearClsHead, VisionTransformerClsHead
    from mmpretrain.models.backbones.vision_transformer import VisionTransformer

    ours = make_encoder(CLASSIFIERS[pool])
    mean = {"out_type": "avg_featmap", "final_norm": False} if pool == "mean" else {}
    backbone = VisionTransformer(arch=mmpretrain_arch(TINY), img_size=32, patch_size=8, **mean)
    head = (LinearClsHead if pool == "mean" else VisionTransformerClsHead)(3, 64)
    theirs = nn.ModuleDict({"backbone": backbone, "head": head}).eval()
    written(ours, tmp_path, "mmpretrain")
    load_checkpoint(theirs, str(tmp_path / "mmpretrain" / "model.pth"), strict=True)
    pictures = images(TINY)
    assert_equal_outputs(ours(pictures), head(backbone(pictures)))
    again = open_encoder(read_back(theirs.state_dict(), tmp_path, heads=4).folder)
    assert_equal_outputs(again(pictures), ours(pictures))


def probed(norm, linear, images):
    """What a linear probe says of class tokens: BatchNorm that was trained, and a linear layer."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.01, 4)
        norm.num_batches_tracked.fill_(5005)
    return linear(norm.eval()(images))


@torch.inference_mode()
@pytest.mark.parametrize("to", ["maehub", "mmpretrain"])
def test_the_two_layers_of_a_published_linear_probe_become_one(to, tmp_path):
    """As the official code saves it: head.0 is a BatchNorm, head.1 a linear layer."""
    encoder, pictures = make_encoder(TINY), images(TINY)
    norm, linear = nn.BatchNorm1d(64, affine=False, eps=1e-6), nn.Linear(64, 7)
    expected = probed(norm, linear, encoder.features(pictures))
    head = nn.Sequential(norm, linear).state_dict()
    state = official(encoder) | {f"head.{name}": value for name, value in head.items()}
    result = read_back_as(state, tmp_path, to)
    again = open_encoder(result.folder)
    assert again.config == replace(TINY, classes=7)
    assert_equal_outputs(again(pictures), expected)
    assert result.dropped == ("head.0.num_batches_tracked",)
    table = result.certificate.names["model.safetensors"]
    weight, bias = table["head.1.weight"][0], table["head.1.bias"][0]
    assert table["head.0.running_mean"] == [bias]
    assert set(table["head.0.running_var"]) == {weight, bias}
    assert set(result.certificate.left_out) == {"head.0.num_batches_tracked"}
    assert_equal_outputs(maehub.load(tmp_path / "theirs.safetensors", heads=4)(pictures), expected)


def read_back_as(state, folder, to):
    write_tensors(folder / "theirs.safetensors", {name: value.clone() for name, value in state.items()})
    return convert(folder / "theirs.safetensors", folder / "again", heads=4, to=to)


@pytest.mark.parametrize("lost", ["head.0.running_mean", "head.0.running_var", "head.1.bias", "head.1.weight"])
def test_half_a_linear_probe_is_refused(lost, tmp_path):
    norm, linear = nn.BatchNorm1d(64, affine=False), nn.Linear(64, 7)
    head = nn.Sequential(norm, linear).state_dict()
    state = official(make_encoder(TINY)) | {f"head.{name}": value for name, value in head.items()}
    for case in ("missing", "misshaped"):
        state = state | {lost: torch.zeros(3)}
        if case == "missing":
            del state[lost]
        (tmp_path / case).mkdir()
        with pytest.raises(IntegrityError, match=r"head\."):
            read_back(state, tmp_path / case, heads=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.inference_mode()
def test_mmpretrains_linear_probe(tmp_path):
    pytest.importorskip("mmpretrain")
    from mmpretrain.models import ClsBatchNormNeck, VisionTransformerClsHead
    from mmpretrain.models.backbones.vision_transformer import VisionTransformer

    backbone = VisionTransformer(arch=mmpretrain_arch(TINY), img_size=32, patch_size=8)
    neck, head = ClsBatchNormNeck(64), VisionTransformerClsHead(3, 64)
    theirs = nn.ModuleDict({"backbone": backbone, "neck": neck, "head": head}).eval()
    nn.init.normal_(head.layers.head.weight)
    pictures = images(TINY)
    probed(neck.bn, nn.Identity(), torch.zeros(2, 64))
    expected = head(neck(backbone(pictures)))
    again = open_encoder(read_back(theirs.state_dict(), tmp_path, heads=4).folder)
    assert_equal_outputs(again(pictures), expected)


def test_mmpretrains_backbone_alone_and_its_file(autoencoder, tmp_path):
    state = from_official(official(autoencoder.encoder), "mmpretrain")
    alone = {name.removeprefix("backbone."): value for name, value in state.items()}
    assert_same(to_official(alone).state, official(autoencoder.encoder))
    content = {"meta": {"epoch": 3}, "state_dict": state}
    torch.save(content, tmp_path / "epoch_3.pth")
    result = convert(tmp_path / "epoch_3.pth", tmp_path / "out", heads=4)
    assert result.dropped == ("meta",)
    assert_same(open_encoder(result.folder).state_dict(), autoencoder.encoder.state_dict())


def test_a_network_that_normalises_twice_is_refused(tmp_path):
    state = from_official(official(make_encoder(CLASSIFIERS["mean"])), "mmpretrain")
    state |= {"backbone.ln1.weight": torch.ones(64), "backbone.ln1.bias": torch.zeros(64)}
    with pytest.raises(UsageError, match="final_norm=False"):
        read_back(state, tmp_path, heads=4)


# ---- detectron2


@torch.inference_mode()
def test_vitdet_takes_the_backbone(autoencoder, tmp_path):
    """transformers has ViTDet too, under other names; without windows it is detectron2's network."""
    state = written(autoencoder, tmp_path, "detectron2")
    assert {name for name in official(autoencoder.encoder) if name.startswith(("pos_", "patch_", "blocks."))} == {
        name.removeprefix("backbone.net.") for name in state
    }
    config = VitDetConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=4, image_size=32, patch_size=8,
        pretrain_image_size=32, layer_norm_eps=1e-6, window_block_indices=[], use_absolute_position_embeddings=True,
    )  # fmt: skip
    theirs = VitDetModel(config).eval()
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("backbone.net.").replace("patch_embed.proj", "embeddings.projection")
        name = name.replace("pos_embed", "embeddings.position_embeddings").replace(".attn.", ".attention.")
        renamed[re.sub(r"^blocks\.", "encoder.layer.", name)] = value
    assert set(theirs.state_dict()) == set(renamed)
    theirs.load_state_dict(renamed, strict=True)
    encoder = autoencoder.encoder
    for size in ((32, 32), (48, 64)):  # its positions are resized as here
        pictures = images(TINY, size=size)
        patches = encoder.embed(pictures)[:, 1:]
        ours = encoder.encode(patches).transpose(1, 2).unflatten(2, (size[0] // 8, size[1] // 8))
        assert_equal_outputs(ours, theirs(pictures).last_hidden_state)


def test_vitdets_loader_finds_the_tensors(autoencoder, tmp_path):
    """detectron2 reads a pickle and looks for names that end like those of the file."""
    state = written(autoencoder, tmp_path, "detectron2")
    content = torch.load(tmp_path / "detectron2" / "model.pth", weights_only=True)
    assert set(content) == {"model"}
    assert_same(content["model"], state)
    assert_same(read_pickle(tmp_path / "detectron2" / "model.pth").tensors, state)
    table = (tmp_path / "detectron2" / "certificate.json").read_text()
    assert "the class token, which ViTDet does not use" in table
    assert "the decoder, which detectron2 has no place for" in table


def test_a_vitdet_backbone_cannot_be_read(autoencoder, tmp_path):
    state = from_official(official(autoencoder.encoder), "detectron2")
    for prefix in ("backbone.net.", "net."):
        theirs = {name.replace("backbone.net.", prefix): value for name, value in state.items()}
        with pytest.raises(UsageError, match="no class token"):
            to_official(theirs)
    with pytest.raises(UsageError, match="no class token"):
        read_back(state, tmp_path, heads=4)
    whole = {f"backbone.net.{name}": value for name, value in official(autoencoder.encoder).items()}
    assert_same(to_official(whole).state, official(autoencoder.encoder))  # with them it can


# ---- what a library cannot hold


def with_components(autoencoder):
    autoencoder.decoder.centre.zero_()
    autoencoder.decoder.components.copy_(torch.eye(5, autoencoder.config.patch_values))
    return autoencoder


@pytest.mark.parametrize(
    ("to", "model", "words"),
    [
        ("detectron2", lambda: make_encoder(replace(TINY, image_size=(16, 48))), "square"),
        ("mmpretrain", lambda: make_autoencoder(replace(MAE, encoder=replace(TINY, image_size=(16, 48)))), "square"),
        ("lightly", lambda: make_autoencoder(replace(MAE, mask_tokens="encoder")), "mask tokens"),
        ("mmpretrain", lambda: make_autoencoder(replace(MAE, mask_tokens="encoder", decoder_depth=0)), "mask tokens"),
        ("lightly", lambda: with_components(make_autoencoder(replace(MAE, target="pca", outputs=5))), "PCA"),
    ],
)
def test_what_cannot_be_held_is_refused(to, model, words, tmp_path):
    save(model(), tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        convert(tmp_path / "model", tmp_path / "out", to=to)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_folders_load_by_name_of_their_file(autoencoder, tmp_path):
    for to in ("lightly", "mmpretrain"):
        written(autoencoder, tmp_path / to, to)
        folder = tmp_path / to / to
        assert_same(maehub.load_autoencoder(folder).state_dict(), autoencoder.state_dict())
        encoder = maehub.load(folder / "model.safetensors", heads=4)
        assert_same(encoder.state_dict(), Encoder.state_dict(autoencoder.encoder))
