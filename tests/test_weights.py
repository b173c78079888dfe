"""Building networks from tensors, and model folders. Fault rows 22, 25, 26 and 37."""

import copy
import json
import os
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import (
    TINY,
    assert_equal_outputs,
    autoencoder_config,
    images,
    make_autoencoder,
    make_encoder,
    noise_for,
    official,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTForImageClassification, ViTMAEForPreTraining

import maehub
from maehub.errors import CheckpointError, IntegrityError, MaehubError, UsageError
from maehub.files import sha256_file
from maehub.images.preprocess import Preprocess
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS, Encoder, EncoderConfig, Origin
from maehub.models.positions import resize_table
from maehub.train.pretraining.objective import Components, store_components
from maehub.weights import config_json as layouts
from maehub.weights.keys import from_official
from maehub.weights.model_folder import (
    Hints,
    LoadOptions,
    build,
    infer_config,
    open_autoencoder,
    open_encoder,
    read_folder,
    save,
)
from maehub.weights.tensorfile import read_header, read_tensors, write_tensors

MAE = autoencoder_config("tiny", TINY)
ORIGIN = Origin("vit-x", "a" * 40, "b" * 64, "cc-by-nc-4.0")


@pytest.fixture(scope="module")
def autoencoder():
    model = make_autoencoder(MAE)
    model.encoder.origin = ORIGIN
    return model


@pytest.fixture
def folder(autoencoder, tmp_path):
    return save(autoencoder, tmp_path / "model")


def same_weights(ours, theirs):
    theirs = theirs.state_dict()
    return set(ours.state_dict()) == set(theirs) and all(
        torch.equal(v, theirs[k]) for k, v in ours.state_dict().items()
    )


def made(config):
    """A network of any kind, the components of a PCA fitted."""
    model = make_encoder(config) if isinstance(config, EncoderConfig) else make_autoencoder(config)
    if isinstance(config, AutoencoderConfig) and config.target == "pca":
        basis = torch.linalg.qr(torch.randn(config.patch_values, config.outputs)).Q.T
        store_components(model, Components(torch.randn(config.patch_values), basis))
    return model


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


# configurations from shapes


@pytest.mark.parametrize("name", PRESETS)
def test_published_networks_are_inferred(name):
    with torch.device("meta"):
        state = Encoder(PRESETS[name]).state_dict()
    assert infer_config(state) == PRESETS[name]


def test_published_autoencoder_is_inferred():
    config = AutoencoderConfig(PRESETS["vit-b"], target="pixels")
    with torch.device("meta"):
        state = official(MaskedAutoencoder(config))
    assert infer_config(state, Hints(target="pixels")) == config
    assert infer_config(state).target == "unknown"


def test_a_classifier_is_inferred():
    config = replace(PRESETS["vit-s"], classes=7, pool="mean")
    with torch.device("meta"):
        assert infer_config(Encoder(config).state_dict()) == config


def test_what_shapes_do_not_tell_is_asked_for():
    state = official(make_autoencoder(MAE))
    with pytest.raises(UsageError, match="heads="):
        infer_config(state)
    with pytest.raises(UsageError, match="decoder_heads="):
        infer_config(state, Hints(heads=4))
    assert infer_config(state, Hints(heads=4, decoder_heads=4, target="normalised_pixels")) == MAE
    wide = official(make_encoder(replace(TINY, image_size=(16, 48))))
    with pytest.raises(UsageError, match="no class token and a square"):
        infer_config(wide, Hints(heads=4))
    assert infer_config(wide, Hints(heads=4, image_size=(16, 48))).size == (16, 48)


@given(st.integers(1, 40).map(lambda n: 4 * n), st.integers(1, 700))
def test_any_mlp_width_is_inferred(width, hidden):
    with torch.device("meta"):
        state = dict(Encoder(EncoderConfig(8, 4, 3, width, 1, 1)).state_dict())
        state["blocks.0.mlp.fc1.weight"] = torch.empty(hidden, width)
    assert int(width * infer_config(state, Hints(heads=1)).mlp_ratio) == hidden


# building strictly


def test_tensors_are_taken_as_they_are(autoencoder):
    state = official(autoencoder)
    built = build(MaskedAutoencoder, state, MAE)
    assert same_weights(built, autoencoder)
    assert not built.training
    assert built.encoder.blocks[0].mlp.fc1.weight.data_ptr() == state["blocks.0.mlp.fc1.weight"].data_ptr()
    frozen = {name for name, value in built.named_parameters() if not value.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}
    built.loss(images(TINY), torch.arange(16).repeat(2, 1) % 4 > 0).backward()


def test_row_25_the_encoder_of_an_autoencoder(autoencoder):
    built = build(Encoder, official(autoencoder), MAE, origin=ORIGIN)
    assert same_weights(built, autoencoder.encoder)
    assert built.origin == ORIGIN


def test_row_25_no_autoencoder_without_a_decoder():
    state = official(make_encoder(TINY))
    with pytest.raises(IntegrityError, match=r"encoder-only ViT.*without the decoder") as caught:
        build(MaskedAutoencoder, state, TINY)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_row_25_every_missing_extra_misshaped_or_other_tensor_is_named(data):
    state = official(MaskedAutoencoder(MAE))
    names = st.sampled_from(sorted(state))
    wrong = {"missing": data.draw(st.sets(names, max_size=15))}
    wrong["of another shape"] = data.draw(st.sets(names, max_size=3)) - wrong["missing"]
    wrong["not floating"] = data.draw(st.sets(names, max_size=3)) - wrong["missing"] - wrong["of another shape"]
    wrong["unexpected"] = {f"surprise.{number}" for number in range(data.draw(st.integers(0, 12)))}
    for name in wrong["missing"]:
        del state[name]
    for name in wrong["of another shape"]:
        state[name] = torch.zeros(*state[name].shape, 1)
    for name in wrong["not floating"]:
        state[name] = state[name].long()
    state |= {name: torch.zeros(1) for name in wrong["unexpected"]}
    if not any(wrong.values()):
        build(MaskedAutoencoder, state, MAE)
        return
    with pytest.raises(IntegrityError) as caught:
        build(MaskedAutoencoder, state, MAE)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 6
    assert "nothing was loaded" in lines[0]
    for kind, expected in wrong.items():
        listed = [line for line in lines if line.startswith(f"{kind}, {len(expected)} of ")]
        assert len(listed) == bool(expected)
        named = expected & set(re.findall(r"[\w.]+", listed[0])) if listed else set()
        assert len(named) == min(10, len(expected))


def test_row_25_a_file_says_what_it_looks_like(autoencoder):
    def error(state, config):
        with pytest.raises(IntegrityError) as caught:
            build(Encoder, state, config)
        return str(caught.value)

    with torch.device("meta"):
        published = dict(Encoder(PRESETS["vit-b"]).state_dict())
        classifier = dict(Encoder(replace(PRESETS["vit-l"], classes=9)).state_dict())
    assert "looks like: an encoder-only ViT-B/16" in error(published, TINY)
    assert "looks like: a classifier ViT-L/16 with 9 classes" in error(classifier, PRESETS["vit-l"])
    partial = official(autoencoder)
    del partial["norm.bias"]
    assert "looks like: an autoencoder ViT of width 64, depth 3, patch 8 with 2 decoder blocks" in error(partial, MAE)


def test_row_25_positions_of_another_size_are_resized_only_when_asked(autoencoder):
    with pytest.raises(IntegrityError, match=r"pos_embed \(1, 17, 64\) instead of \(1, 26, 64\)"):
        build(Encoder, official(autoencoder), replace(TINY, image_size=40))
    build(Encoder, official(autoencoder), TINY, options=LoadOptions(image_size=40))


def everything(state):
    """The names, dtypes and bytes of tensors, in their order, and the state of the generators."""
    contents = [(name, str(value.dtype), tuple(value.shape), value.numpy().tobytes()) for name, value in state.items()]
    return contents, torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()


FAILING = {
    "missing": lambda state: state.pop("norm.weight"),
    "unexpected": lambda state: state.update({"surprise": torch.zeros(1)}),
    "of another shape": lambda state: state.update({"norm.bias": torch.zeros(1)}),
    "not floating": lambda state: state.update({"norm.bias": state["norm.bias"].long()}),
    "NaN or infinity": lambda state: state.update({"norm.bias": state["norm.bias"] * torch.nan}),
    "dtype must be": lambda state: LoadOptions(dtype=torch.int8),
    "an autoencoder has no head": lambda state: LoadOptions(classes=3),
    "33×33 pixels is not divisible": lambda state: LoadOptions(image_size=33),
}


@pytest.mark.parametrize("fault", FAILING)
def test_row_25_a_failed_load_changes_nothing(fault):
    """Neither what it was given nor a network that was built of the same tensors, which shares them."""
    whole = official(make_autoencoder(MAE))
    built = build(MaskedAutoencoder, whole, MAE)
    state = dict(whole)
    options = FAILING[fault](state)
    torch.rand(1)  # or a generator that is set anew each time would seem untouched
    before, shared = everything(state), everything(built.state_dict())
    with pytest.raises(MaehubError) as caught:
        build(MaskedAutoencoder, state, MAE, options=options if isinstance(options, LoadOptions) else LoadOptions())
    assert fault in str(caught.value)
    assert everything(state) == before
    assert everything(built.state_dict()) == shared


@pytest.mark.parametrize("damage", ["cut", "another", "NaN"])
def test_row_25_a_folder_that_fails_to_load_stays_as_it_is(folder, damage):
    path = folder / "model.safetensors"
    tensors = dict(read_tensors(path).tensors)
    name = next(iter(tensors))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        value = tensors[name]
        save_file(tensors | {name: value[:1].clone() if damage == "another" else value * torch.nan}, path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    torch.rand(1)
    generators = everything({})
    with pytest.raises(IntegrityError):
        open_autoencoder(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert everything({}) == generators


def test_a_configuration_far_too_large_for_its_tensors_is_refused_at_once():
    state = official(make_encoder(TINY))
    for large in (replace(TINY, depth=512), replace(TINY, image_size=8000), replace(TINY, width=16_384, heads=1)):
        with pytest.raises(IntegrityError, match="too few tensors"):
            build(Encoder, state, large)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["blocks.1.norm2.bias", "cls_token", "pos_embed", "blocks.2.mlp.fc1.weight"])
def test_row_26_non_finite_weights_are_refused_by_name(bad, dtype, name):
    state = {key: value.to(dtype) for key, value in official(make_encoder(TINY)).items()}
    changed = state[name].float().clone()
    changed.view(-1)[-1] = bad
    state[name] = changed.to(dtype)
    with pytest.raises(IntegrityError, match=rf"NaN or infinity in {re.escape(name)};"):
        build(Encoder, state, TINY)
    build(Encoder, state, TINY, options=LoadOptions(check_finite=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_weights_pass_although_their_sum_overflows(dtype):
    state = official(make_encoder(TINY))
    state["norm.bias"] = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    build(Encoder, state, TINY)


def test_row_26_a_model_with_nan_is_not_saved(tmp_path):
    model = make_encoder(TINY)
    model.norm.bias.data[0] = torch.nan
    with pytest.raises(IntegrityError, match=r"norm\.bias"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# departures


@pytest.mark.parametrize("size", [(16, 48), 64])
def test_image_size_resizes_both_tables_on_their_grid(autoencoder, size):
    built = build(MaskedAutoencoder, official(autoencoder), MAE, options=LoadOptions(image_size=size))
    pair = (size, size) if isinstance(size, int) else size
    grid = (pair[0] // 8, pair[1] // 8)
    assert built.config.encoder.size == built.preprocess.size == pair
    for ours, stored in ((built.encoder, autoencoder.encoder), (built.decoder, autoencoder.decoder)):
        assert torch.equal(ours.pos_embed, resize_table(stored.pos_embed, (4, 4), grid))
    pictures = images(TINY, size=pair)
    assert torch.equal(built(pictures).prediction, autoencoder(pictures).prediction)
    with pytest.raises(UsageError, match="nearest size"):
        build(MaskedAutoencoder, official(autoencoder), MAE, options=LoadOptions(image_size=33))


def test_crop_fraction_follows_the_published_rule_at_448():
    config = EncoderConfig(224, 56, 3, 32, 1, 2)
    state = official(make_encoder(config))
    assert build(Encoder, state, config).preprocess.crop_fraction == 0.875
    assert build(Encoder, state, config, options=LoadOptions(image_size=448)).preprocess.crop_fraction == 1.0


def test_positions_rule_is_used_and_kept():
    state = official(make_encoder(TINY))
    tables = []
    for rule in ("bicubic", "antialias", "sincos"):
        built = build(Encoder, state, TINY, options=LoadOptions(image_size=16, positions=rule))
        assert built.config.positions == rule
        tables.append(built.pos_embed)
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channels_see_a_grey_picture_alike(autoencoder, channels):
    """A picture whose channels are equal gives the same tokens; the predictions are those of the old channels."""
    built = build(MaskedAutoencoder, official(autoencoder), MAE, options=LoadOptions(channels=channels))
    grey = images(replace(TINY, channels=1))
    ours = built(grey.expand(-1, channels, -1, -1)).prediction.unflatten(2, (64, channels))
    rgb = autoencoder(grey.expand(-1, 3, -1, -1)).prediction.unflatten(2, (64, 3))
    if channels in (1, 6):  # every kernel counts equally; else the first ones count more
        expected = rgb.mean(dim=-1, keepdim=True) if channels == 1 else rgb.repeat(1, 1, 1, 2)
        assert_equal_outputs(ours, expected)
    assert built.preprocess.channels == channels
    kernel = built.encoder.patch_embed.proj.weight
    if channels > 1:
        assert_equal_outputs(kernel[:, 0], autoencoder.encoder.patch_embed.proj.weight[:, 0] * 3 / channels)


def test_classes_give_a_new_head_and_zero_none():
    encoder = make_encoder(replace(TINY, classes=5))
    state = official(encoder)
    assert same_weights(build(Encoder, state, encoder.config, options=LoadOptions(classes=5)), encoder)
    new = build(Encoder, state, encoder.config, options=LoadOptions(classes=9))
    assert new.head.weight.shape == (9, 64)
    assert 0 < new.head.weight.std() < 1e-4
    assert not new.head.bias.any()
    none = build(Encoder, state, encoder.config, options=LoadOptions(classes=0))
    assert none(images(TINY)).shape == (2, 64)
    with pytest.raises(UsageError, match="classes="):
        build(MaskedAutoencoder, official(make_autoencoder(MAE)), MAE, options=LoadOptions(classes=5))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_dtype_none_is_float32_whatever_the_file_holds(stored):
    state = {name: value.to(stored) for name, value in official(make_encoder(TINY)).items()}
    assert {value.dtype for value in build(Encoder, state, TINY).parameters()} == {torch.float32}
    half = build(Encoder, state, TINY, options=LoadOptions(dtype=torch.float16))
    assert {value.dtype for value in half.parameters()} == {torch.float16}
    with pytest.raises(UsageError, match="floating"):
        build(Encoder, state, TINY, options=LoadOptions(dtype=torch.int8))


def test_a_built_network_can_be_copied(autoencoder):
    built = build(MaskedAutoencoder, official(autoencoder), MAE)
    assert same_weights(copy.deepcopy(built), autoencoder)


# folders


def test_an_autoencoder_comes_back(autoencoder, folder):
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json", "model.safetensors", "timm/model.safetensors", "preprocessor_config.json", "README.md"
    }  # fmt: skip
    again = open_autoencoder(folder)
    assert same_weights(again, autoencoder)
    assert (again.config, again.preprocess, again.encoder.origin) == (MAE, autoencoder.preprocess, ORIGIN)
    encoder = open_encoder(folder)
    assert same_weights(encoder, autoencoder.encoder)
    assert encoder.origin == ORIGIN
    read = read_folder(folder)
    assert read.encoder_tensors == folder / "timm" / "model.safetensors"
    assert read.sha256 == {
        name: sha256_file(folder / name) for name in ("model.safetensors", "timm/model.safetensors")
    }  # fmt: skip


OTHERS = {
    "encoder": TINY,
    "mean": replace(TINY, pool="mean", classes=3),
    "grey, wide, own mlp": replace(TINY, image_size=(16, 48), channels=1, mlp_ratio=1.7, positions="antialias"),
    "non-square": replace(MAE, encoder=replace(TINY, image_size=(16, 48))),
    "mask tokens in the encoder": replace(MAE, mask_tokens="encoder"),
    "unknown target": replace(MAE, target="unknown"),
    "linear head": replace(MAE, decoder_depth=0, mask_tokens="encoder"),
    "pca": replace(MAE, target="pca", outputs=5),
    "tokens": replace(MAE, target="tokens", outputs=17, mask_tokens="encoder", decoder_depth=0),
    "mean colours": replace(MAE, target="tokens", outputs=512, tokenizer="mean-colour"),
    "grey mean colours": replace(
        MAE, encoder=replace(TINY, channels=1), target="tokens", outputs=8, tokenizer="mean-colour"
    ),
    "four channels": replace(MAE, encoder=replace(TINY, channels=4)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_network_comes_back(kind, tmp_path):
    config = OTHERS[kind]
    is_encoder = isinstance(config, EncoderConfig)
    model = made(config)
    save(model, tmp_path / "a")
    again = open_encoder(tmp_path / "a") if is_encoder else open_autoencoder(tmp_path / "a")
    assert same_weights(again, model)
    assert again.config == config
    assert again.preprocess == model.preprocess
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "timm" in values["maehub"]["verified"]
    assert ("transformers" in values["maehub"]["verified"]) == (kind == "four channels")
    for_transformers = kind == "four channels"
    assert ("model_type" in values) == for_transformers
    assert (tmp_path / "a" / "preprocessor_config.json").exists() == for_transformers
    if not is_encoder and not for_transformers:
        assert "Only maehub reads the whole of this folder" in (tmp_path / "a" / "README.md").read_text()
        assert set(read_header(tmp_path / "a" / "model.safetensors").tensors) == set(official(model))
        assert same_weights(open_encoder(tmp_path / "a"), model.encoder)
    else:
        assert for_transformers or is_encoder


HEADS = ["linear head", "pca", "tokens", "mean colours", "grey mean colours"]


@pytest.mark.parametrize("kind", HEADS)
def test_a_bare_file_with_another_head(kind, tmp_path):
    config = OTHERS[kind]
    model = made(config)
    said = {"heads": 4, "decoder_heads": 4}
    if config.target in ("normalised_pixels", "tokens"):
        said["target"] = config.target
    # a file tells neither the tokenizer nor the width that a decoder without blocks would have
    expected = replace(config, tokenizer="") if config.decoder_depth else replace(config, decoder_width=512, decoder_heads=16)  # fmt: skip  # noqa: E501
    for dialect in ("official", "module"):
        path = tmp_path / f"{dialect}.safetensors"
        write_tensors(path, from_official(official(model), dialect))
        again = open_autoencoder(path, **said)
        assert same_weights(again, model)
        assert again.config == expected
        assert same_weights(open_encoder(path, heads=4), model.encoder)
    if config.target == "tokens":
        with pytest.raises(UsageError, match=rf"predicts {config.outputs} values.*target='tokens'"):
            open_autoencoder(path, heads=4, decoder_heads=4)
        with pytest.raises(IntegrityError, match="decoder_pred"):
            open_autoencoder(path, heads=4, decoder_heads=4, target="pixels")
    else:
        wrong = "pixels" if config.target == "pca" else "pca"
        with pytest.raises(UsageError, match="components of a PCA"):
            open_autoencoder(path, heads=4, decoder_heads=4, target=wrong)


def test_a_pixel_head_may_be_said_to_give_tokens(tmp_path):
    model = make_autoencoder(replace(MAE, target="unknown"))
    save(model, tmp_path / "a")
    assert open_autoencoder(tmp_path / "a", target="tokens").config.outputs == 192
    with pytest.raises(UsageError, match="no components of a PCA"):
        open_autoencoder(tmp_path / "a", target="pca")


@pytest.mark.parametrize("kind", HEADS)
def test_other_sizes_but_no_other_channels_for_another_head(kind):
    config = OTHERS[kind]
    model = made(config)
    built = build(MaskedAutoencoder, official(model), config, options=LoadOptions(image_size=(16, 48)))
    pictures = images(config.encoder, size=(16, 48))
    assert torch.equal(built(pictures).prediction, model(pictures).prediction)
    options = LoadOptions(channels=4 - config.encoder.channels)
    if config.outputs:
        with pytest.raises(UsageError, match="encoder alone"):
            build(MaskedAutoencoder, official(model), config, options=options)
    else:
        assert build(MaskedAutoencoder, official(model), config, options=options).config.prediction_width == 64
    assert build(Encoder, official(model), config, options=options).config.channels == options.channels


def test_a_file_with_half_a_basis_is_refused():
    config = OTHERS["pca"]
    state = official(made(config))
    for name in ("decoder_centre", "decoder_components"):
        with pytest.raises(IntegrityError, match=f"missing, 1 of .*{name}"):
            build(MaskedAutoencoder, {key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(IntegrityError, match=r"unexpected, 2 of .*decoder_centre, decoder_components"):
        build(MaskedAutoencoder, state, replace(config, target="unknown", outputs=0))


def test_components_that_were_never_fitted_are_not_saved(tmp_path):
    with pytest.raises(IntegrityError, match="decoder_components"):
        save(make_autoencoder(OTHERS["pca"]), tmp_path / "a")


@pytest.mark.parametrize("change", [{"outputs": 500_000}, {"decoder_width": 16_384, "decoder_heads": 4}])
def test_a_decoder_far_too_large_for_its_tensors_is_refused_at_once(change):
    config = OTHERS["mean colours"]
    with pytest.raises(IntegrityError, match="too few tensors"):
        build(MaskedAutoencoder, official(made(config)), replace(config, tokenizer="", **change))


def test_a_folder_is_deterministic(autoencoder, tmp_path):
    for name in ("a", "b"):
        save(autoencoder, tmp_path / name / "model")
    for path in (tmp_path / "a").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_half_precision_on_disk_is_said_and_loads_as_float32(autoencoder, tmp_path):
    folder = save(autoencoder, tmp_path / "half", dtype=torch.float16)
    assert {entry.dtype for entry in read_header(folder / "model.safetensors").tensors.values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text())["maehub"]["dtype"] == "float16"
    assert {value.dtype for value in open_autoencoder(folder).parameters()} == {torch.float32}


def test_row_36_modes_of_a_folder_follow_the_umask(autoencoder, tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(autoencoder, tmp_path / "model")
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)


def test_row_37_saving_onto_the_folder_just_loaded(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for _ in range(2):
        loaded = open_autoencoder(folder)  # memory-mapped from the file that is replaced
        save(loaded, folder, overwrite=True)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert same_weights(loaded, open_autoencoder(folder))


def test_a_folder_in_use_is_refused_and_overwriting_keeps_other_files(autoencoder, folder, tmp_path):
    with pytest.raises(UsageError, match="overwrite=True"):
        save(autoencoder, folder)
    (folder / "figure.png").write_bytes(b"kept")
    save(autoencoder.encoder, folder, overwrite=True)
    assert (folder / "figure.png").read_bytes() == b"kept"
    assert not (folder / "timm").exists()
    assert same_weights(open_encoder(folder), autoencoder.encoder)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="not overwritten"):
        save(autoencoder, other, overwrite=True)
    assert [entry.name for entry in other.iterdir()] == ["cat.jpg"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "photos"}


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(autoencoder, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maehub.weights.model_folder.write_json", full)
    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        save(autoencoder, folder, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_run_folder_gives_its_model(autoencoder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="no exported model yet"):
        read_folder(run)
    save(autoencoder, run / "model")
    assert same_weights(open_autoencoder(run), autoencoder)


def test_saving_anything_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a Linear"):
        maehub.save(torch.nn.Linear(1, 1), tmp_path / "a")


# what a configuration must not do


CHANGES = {
    "unknown key in our block": lambda c: c["maehub"].update(surprise=1),
    "unknown key in the network": lambda c: c["maehub"]["network"].update(surprise=1),
    "unknown key in the encoder": lambda c: c["maehub"]["network"]["encoder"].update(surprise=1),
    "unknown key in the transform": lambda c: c["maehub"]["preprocess"].update(surprise=1),
    "unknown key in the origin": lambda c: c["maehub"]["origin"].update(surprise=1),
    "origin no text": lambda c: c["maehub"]["origin"].update(name={"a": 1}),
    "block no object": lambda c: c.update(maehub=[1]),
    "no network": lambda c: c["maehub"].pop("network"),
    "no transform": lambda c: c["maehub"].update(preprocess=None),
    "kind": lambda c: c["maehub"].update(kind="other"),
    "format": lambda c: c["maehub"].update(format="1"),
    "heads": lambda c: c["maehub"]["network"]["encoder"].update(heads=5),
    "a huge depth": lambda c: c["maehub"]["network"]["encoder"].update(depth=10**9),
    "a list for a number": lambda c: c["maehub"]["network"]["encoder"].update(width=[64]),
    "hashes": lambda c: c["maehub"].update(sha256={"model.safetensors": 1}),
    "outputs of pixels": lambda c: c["maehub"]["network"].update(outputs=3),
    "outputs no int": lambda c: c["maehub"]["network"].update(target="tokens", outputs="3"),
    "a tokenizer unknown here": lambda c: c["maehub"]["network"].update(target="tokens", outputs=3, tokenizer="dall-e"),
    "a head without mask tokens in the encoder": lambda c: c["maehub"]["network"].update(decoder_depth=0),
    "another patch": lambda c: c["maehub"]["network"]["encoder"].update(patch_size=4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_block_is_refused(folder, change):
    edit_config(folder, CHANGES[change])
    with pytest.raises(IntegrityError) as caught:
        open_autoencoder(folder)
    assert str(folder) in str(caught.value)
    assert str(caught.value).count("\n") < 6


def test_a_newer_format_asks_for_an_update(folder):
    edit_config(folder, lambda c: c["maehub"].update(format=2, new_key=1))
    with pytest.raises(UsageError, match="update maehub"):
        open_autoencoder(folder)


def test_row_18_foreign_keys_are_ignored_and_nothing_is_executed(folder, autoencoder):
    code = folder / "code.py"
    code.write_text("raise SystemExit('executed')")
    edit_config(folder, lambda c: c.update(auto_map={"AutoModel": "code.Model"}, trust_remote_code=True, other=[1]))
    assert same_weights(open_autoencoder(folder), autoencoder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 100_000, "\x00"])
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(IntegrityError, match="JSON"):
        open_autoencoder(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"no config\.json"),
        ({"config.json": "{}"}, r"no model\.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "maehub convert"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "several files"),
    ],
)
def test_a_folder_without_a_model_says_what_it_lacks(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=words):
        read_folder(tmp_path)


def test_target_is_said_once(folder, tmp_path):
    with pytest.raises(UsageError, match="predicts normalised_pixels"):
        open_autoencoder(folder, target="pixels")
    assert open_autoencoder(folder, target="normalised_pixels").config.target == "normalised_pixels"
    save(make_autoencoder(replace(MAE, target="unknown")), tmp_path / "unknown")
    assert open_autoencoder(tmp_path / "unknown", target="pixels").config.target == "pixels"


# files of others


def test_a_bare_file_of_any_dialect(autoencoder, tmp_path):
    state = official(autoencoder)
    for dialect in ("official", "module", "transformers-4"):
        path = tmp_path / f"{dialect}.safetensors"
        write_tensors(path, from_official(state, dialect))
        again = open_autoencoder(path, heads=4, decoder_heads=4, target="normalised_pixels")
        assert same_weights(again, autoencoder)
        assert again.config == MAE
        assert same_weights(open_encoder(path, heads=4), autoencoder.encoder)
        with pytest.raises(UsageError, match="heads="):
            open_encoder(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_row_22_a_damaged_header_never_gives_wrong_weights(autoencoder, tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, official(autoencoder))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        again = open_autoencoder(path, heads=4, decoder_heads=4)
    except IntegrityError:
        return
    assert same_weights(again, autoencoder)


def test_a_plain_transformers_folder(autoencoder, folder, tmp_path):
    theirs = ViTMAEForPreTraining.from_pretrained(folder)
    theirs.config.maehub = None
    theirs.save_pretrained(tmp_path / "plain")
    again = open_autoencoder(tmp_path / "plain")
    assert same_weights(again, autoencoder)
    assert again.config == MAE
    assert again.preprocess == Preprocess.evaluation(32, 3, 8)
    assert again.encoder.origin is None


def test_a_folder_that_transformers_saved_again_is_theirs(folder, tmp_path):
    """It keeps our block, whose hashes and second file no longer hold."""
    theirs = ViTMAEForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        theirs.vit.embeddings.cls_token.add_(1)
    theirs.save_pretrained(folder)
    assert "maehub" in json.loads((folder / "config.json").read_text())
    encoder = open_encoder(folder)
    assert torch.equal(encoder.cls_token, theirs.vit.embeddings.cls_token)
    assert not read_folder(folder).sha256


def test_a_transformers_classifier_and_its_statistics(tmp_path):
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    theirs = ViTForImageClassification(
        ViTConfig(**fields, image_size=32, patch_size=8, num_labels=3, layer_norm_eps=1e-6)
    ).eval()
    theirs.save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    ours = open_encoder(tmp_path)
    assert ours.preprocess.mean == ours.preprocess.std == (0.5, 0.5, 0.5)
    with torch.inference_mode():
        assert_equal_outputs(ours(images(TINY)), theirs(images(TINY)).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_norm_eps": 1e-5}, "1e-06|1e-6"),
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"model_type": "dinov2"}, "dinov2"),
    ],
)
def test_transformers_networks_that_ours_is_not(folder, change, words):
    edit_config(folder, lambda c: (c.pop("maehub"), c.update(change)))
    with pytest.raises(UsageError, match=words):
        open_encoder(folder)


def test_a_plain_timm_folder(tmp_path):
    encoder = make_encoder(TINY)
    save(encoder, tmp_path / "model")
    edit_config(tmp_path / "model", lambda c: (c.pop("maehub"), c["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3])))
    again = open_encoder(tmp_path / "model")
    assert same_weights(again, encoder)
    assert again.preprocess.mean == (0.1, 0.2, 0.3)
    edit_config(tmp_path / "model", lambda c: c.update(architecture="hiera_base_224"))
    with pytest.raises(UsageError, match="hiera_base_224"):
        open_encoder(tmp_path / "model")


def test_of_a_plain_folder_with_a_decoder_only_its_encoder_need_be_told(tmp_path):
    autoencoder = make_autoencoder(MAE)  # its decoder is not 512 wide, and timm's configuration knows of none
    save(autoencoder.encoder, tmp_path / "model")
    edit_config(tmp_path / "model", lambda c: c.pop("maehub"))
    write_tensors(tmp_path / "model" / "model.safetensors.new", official(autoencoder))
    (tmp_path / "model" / "model.safetensors.new").replace(tmp_path / "model" / "model.safetensors")
    assert same_weights(open_encoder(tmp_path / "model"), autoencoder.encoder)
    with pytest.raises(UsageError, match="decoder_heads="):
        open_autoencoder(tmp_path / "model")


# the other libraries read what is saved


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_transformers_loads_the_folder_and_computes_the_same(tmp_path, target, channels):
    config = replace(MAE, target=target, encoder=replace(TINY, channels=channels))
    ours = make_autoencoder(config)
    save(ours, tmp_path / "model")
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pictures = images(config.encoder)
    with torch.inference_mode():
        output = ours(pictures)
        expected = theirs.eval()(pictures, noise=noise_for(output.masked))
    assert_equal_outputs(output.prediction, expected.logits)
    assert_equal_outputs(output.loss, expected.loss)
    assert type(AutoModel.from_pretrained(tmp_path / "model")).__name__ == "ViTMAEModel"


def picture(height, width):
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin(rows / 17 + k) + 40 * np.cos(columns / (9 + 4 * k)) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("resize", ["centre-crop", "squash"])
# With an odd margin the two crops may differ by one row: torchvision, and ours, round where transformers cuts.
@pytest.mark.parametrize("size", [(300, 400), (440, 290), (64, 64)])
def test_transformers_processor_gives_the_same_pixels(tmp_path, size, resize):
    model = make_autoencoder(replace(MAE, encoder=replace(TINY, image_size=96)))
    model.encoder.preprocess = replace(model.preprocess, resize=resize)
    save(model, tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    theirs = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
    ours = model.preprocess(picture(*size))
    assert ours.shape == theirs.shape
    greys = (ours - theirs).abs() * torch.tensor(model.preprocess.std)[:, None, None] * 255
    assert greys.max() <= 2


@pytest.mark.skipif(not hasattr(timm.models._factory, "_MODEL_SOURCES"), reason="this timm reads no local-dir:")
@pytest.mark.parametrize("kind", ["encoder", "mean", "grey, wide, own mlp"])
def test_timm_loads_the_folder_of_an_encoder(tmp_path, kind):
    ours = make_encoder(OTHERS[kind])
    save(ours, tmp_path / "model")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.inference_mode():
        assert_equal_outputs(ours(images(ours.config)), theirs(images(ours.config)))
    transform = timm.data.resolve_model_data_config(theirs)
    assert transform["input_size"] == (ours.config.channels, *ours.config.size)
    short = min(ours.config.size)  # timm rounds the size that it scales to down, and ours is the nearest
    assert int(short / transform["crop_pct"]) == round(short / ours.preprocess.crop_fraction)


@pytest.mark.parametrize("kind", ["pixels", *HEADS, "non-square", "mask tokens in the encoder"])
def test_timm_loads_the_encoder_of_an_autoencoder(kind, tmp_path):
    config = OTHERS.get(kind, MAE)
    autoencoder = made(config)
    folder = save(autoencoder, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    weights = folder / layouts.TIMM_ENCODER
    assert values["pretrained_cfg"]["hf_hub_filename"] == "timm/model.bin"
    theirs = timm.create_model(
        values["architecture"], num_classes=0, checkpoint_path=str(weights), **values["model_args"]
    ).eval()
    with torch.inference_mode():
        pictures = images(config.encoder)
        assert_equal_outputs(autoencoder.encoder(pictures), theirs(pictures))


def test_the_published_shapes_need_no_arguments_in_timm(tmp_path):
    from maehub.weights.config_json import timm_config

    for name, architecture in {"vit-b": "vit_base_patch16_224", "vit-l": "vit_large_patch16_224", "vit-h": "vit_huge_patch14_224"}.items():  # fmt: skip  # noqa: E501
        config = timm_config(PRESETS[name], Preprocess(), ORIGIN, "model.safetensors")
        assert (config["architecture"], config["model_args"]) == (architecture, {})
        assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"


def test_the_card_says_what_it_is(folder, autoencoder, tmp_path):
    text = (folder / "README.md").read_text()
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == (
        "maehub",
        "cc-by-nc-4.0",
        "image-feature-extraction",
    )
    assert {"mae", "timm", "transformers"} <= set(data.tags)
    assert "sha256 " + "b" * 64 in text
    save(autoencoder, tmp_path / "b", card="## Training\n\nTrained on 3 photos; top-1 12.3 % on them.")
    assert "top-1 12.3 %" in (tmp_path / "b" / "README.md").read_text()
    assert "top-1" not in text
    texts = {kind: (save(made(OTHERS[kind]), tmp_path / kind) / "README.md").read_text() for kind in HEADS}
    assert "a linear head that predicts pixels normalised per patch" in texts["linear head"]
    assert "predicts 5 PCA coefficients of each patch's pixels" in texts["pca"]
    assert "predicts which of 17 tokens each patch is, of a tokenizer that is not part of" in texts["tokens"]
    assert "which of 512 tokens each patch is, its mean colour in 3 bits a channel" in texts["mean colours"]
    assert [kind for kind in HEADS if "reconstruct" not in texts[kind]] == ["tokens"]
    assert all("timm reads its encoder" in text and "  - timm\n" in text.replace("\n- ", "\n  - ") for text in texts.values())  # fmt: skip  # noqa: E501
    classifier = save(make_encoder(OTHERS["mean"]), tmp_path / "c")
    assert ModelCard((classifier / "README.md").read_text()).data.pipeline_tag == "image-classification"


def test_metadata_of_the_tensors(folder):
    metadata = read_tensors(folder / "model.safetensors").metadata
    assert metadata["format"] == "pt"
    assert metadata["source_sha256"] == "b" * 64
