import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peers import TINY, autoencoder_config, make_autoencoder, make_encoder, official, transformers_mae_config
from transformers import ViTConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from maehub.errors import IntegrityError, UsageError
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.weights.keys import ENCODER_MASK_TOKEN, detect, from_official, is_decoder, to_official
from maehub.weights.tensorfile import read_tensors

MAE = autoencoder_config("tiny", TINY)
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 32, "patch_size": 8}  # fmt: skip  # noqa: E501


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def state():
    return official(make_autoencoder(MAE))


def test_official_names_are_the_published_ones(state):
    stems = {".".join(name.split(".")[:1]) for name in state}
    assert stems == {
        "cls_token", "pos_embed", "patch_embed", "blocks", "norm", "mask_token",
        "decoder_embed", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip
    assert len(state) == 4 + 12 * 3 + 2 + 1 + 2 + 1 + 12 * 2 + 2 + 2


@pytest.mark.parametrize(("dialect", "read_as"), [("official", "official"), ("module", "module"), ("transformers-4", "transformers-4")])  # fmt: skip  # noqa: E501
def test_written_dialects_are_read_back(state, dialect, read_as):
    written = from_official(state, dialect)
    assert detect(written) == read_as
    again = to_official(written)
    assert again.dialect == read_as
    assert not again.dropped
    assert_same(again.state, state)


def test_module_names_are_those_of_the_module(state):
    autoencoder = make_autoencoder(MAE)
    assert_same(from_official(state, "module"), autoencoder.state_dict())
    encoder = make_encoder(TINY)
    assert_same(from_official(official(encoder), "module"), encoder.state_dict())


@pytest.mark.parametrize("depth", [0, 2])
def test_components_of_a_pca_have_names_of_our_own(depth):
    config = AutoencoderConfig(TINY, 32, depth, 4, "pca", "encoder", outputs=5)
    autoencoder = make_autoencoder(config)
    ours = official(autoencoder)
    assert {"decoder_centre", "decoder_components", ENCODER_MASK_TOKEN} <= set(ours)
    assert set(from_official(ours, "module")) == set(autoencoder.state_dict())
    for dialect in ("official", "module"):
        assert set(to_official(from_official(ours, dialect)).state) == set(ours)
    assert set(from_official(ours, "timm")) == set(Encoder(TINY).state_dict())
    del ours[ENCODER_MASK_TOKEN]
    with pytest.raises(UsageError, match="PCA"):
        from_official(ours, "transformers-4")


def test_timm_is_the_encoder_alone(state):
    written = from_official(state, "timm")
    assert set(written) == set(Encoder(TINY).state_dict())
    assert not any(is_decoder(name) for name in written)


def test_transformers_5_in_memory_and_as_saved(tmp_path):
    theirs = ViTMAEForPreTraining(transformers_mae_config(MAE))
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_()
    in_memory = to_official(theirs.state_dict())
    assert in_memory.dialect == "transformers-5"
    assert set(in_memory.state) == set(official(make_autoencoder(MAE)))
    theirs.save_pretrained(tmp_path)
    saved = to_official(read_tensors(tmp_path / "model.safetensors").tensors)
    assert saved.dialect in ("transformers-5-saved", "transformers-4")  # the second once transformers is mended
    assert_same(saved.state, in_memory.state)
    # queries first, then keys, then values
    attention = theirs.vit.layers[0].attention
    fused = in_memory.state["blocks.0.attn.qkv.weight"]
    assert torch.equal(fused, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))


def test_the_three_transformers_dialects_name_the_same(state):
    four = from_official(state, "transformers-4")
    saved = {name.replace("decoder.decoder_layers", "decoder.decoder_encoder.layer"): v for name, v in four.items()}
    assert to_official(saved).dialect == "transformers-5-saved"
    assert_same(to_official(saved).state, state)


@pytest.mark.parametrize("kind", [ViTMAEModel, ViTModel])
def test_bare_transformers_encoders(kind, tmp_path):
    config = transformers_mae_config(MAE) if kind is ViTMAEModel else ViTConfig(**VIT)
    theirs = kind(config)
    theirs.save_pretrained(tmp_path)
    for tensors in (theirs.state_dict(), read_tensors(tmp_path / "model.safetensors").tensors):
        read = to_official(tensors)
        assert not any(is_decoder(name) for name in read.state)
        assert set(read.state) == set(
            Encoder(EncoderConfig(32, 8, 3, 64, 3 if kind is ViTMAEModel else 2, 4)).state_dict()
        )
        dropped = {"pooler.dense.weight", "pooler.dense.bias"} if kind is ViTModel else set()
        assert set(read.dropped) == dropped


def test_transformers_classifier():
    theirs = ViTForImageClassification(ViTConfig(**VIT, num_labels=7))
    read = to_official(theirs.state_dict())
    assert read.state["head.weight"].shape == (7, 64)
    written = from_official(read.state, "transformers-4")
    assert {"vit.embeddings.cls_token", "classifier.bias", "vit.encoder.layer.1.output.dense.weight"} <= set(written)
    assert_same(to_official(written).state, read.state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
@pytest.mark.parametrize("dialect", ["official", "module", "transformers-4"])
def test_wrappers_are_stripped(state, prefix, dialect):
    wrapped = {prefix + name: value for name, value in from_official(state, dialect).items()}
    assert_same(to_official(wrapped).state, state)


def test_a_wrapper_that_not_all_keys_have_stays():
    read = to_official({"cls_token": torch.zeros(1), "module.head.weight": torch.zeros(1)})
    assert set(read.state) == {"cls_token", "module.head.weight"}


def test_mask_token_of_the_encoder_has_a_name_of_its_own():
    model = MaskedAutoencoder(AutoencoderConfig(TINY, 32, 1, 4, mask_tokens="encoder"))
    state = official(model)
    assert ENCODER_MASK_TOKEN in state
    assert "mask_token" not in state
    assert_same(from_official(state, "module"), model.state_dict())
    assert ENCODER_MASK_TOKEN not in from_official(state, "timm")
    with pytest.raises(UsageError, match="mask tokens"):
        from_official(state, "transformers-4")


def test_a_mean_pooled_classifier_has_no_transformers_form():
    state = official(make_encoder(EncoderConfig(32, 8, 3, 64, 1, 4, classes=3, pool="mean")))
    with pytest.raises(UsageError, match="fc_norm"):
        from_official(state, "transformers-4")


def test_unknown_names_stay_for_the_strict_check(state):
    names = from_official(state, "transformers-4") | {"vit.surprise": torch.zeros(1)}
    assert "vit.surprise" in to_official(names).state


def test_incomplete_queries_keys_values_stay_for_the_strict_check(state):
    names = from_official(state, "transformers-4")
    del names["vit.encoder.layer.1.attention.attention.key.bias"]
    read = to_official(names).state
    assert "blocks.1.attn.qkv.bias" not in read
    assert {"blocks.1.attn.query.bias", "blocks.1.attn.value.bias", "blocks.1.attn.qkv.weight"} <= set(read)


def test_two_names_of_one_tensor_are_refused(state):
    names = from_official(state, "transformers-4") | {"layernorm.weight": torch.zeros(64)}
    with pytest.raises(IntegrityError, match=r"both norm\.weight"):
        to_official(names)


@pytest.mark.parametrize("keys", [["conv1.weight", "fc.bias"], []])
def test_other_networks_are_not_known(keys):
    with pytest.raises(IntegrityError, match="not of a Vision Transformer"):
        detect(keys)


@given(st.data())
def test_any_part_of_a_state_survives_every_written_dialect(data):
    everything = sorted(official(MaskedAutoencoder(MAE)))
    names = data.draw(st.sets(st.sampled_from(everything)))
    names |= {"cls_token", "blocks.0.norm1.weight", "decoder_embed.weight"}  # what tells the dialects apart
    part = {name: torch.arange(6.0) + number for number, name in enumerate(sorted(names))}
    for dialect in ("official", "module", "transformers-4"):
        assert_same(to_official(from_official(part, dialect)).state, part)
