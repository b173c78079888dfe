"""What matrices are multiplied in: bf16 in commands where this machine does it fast, fp32 in Python unless asked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run as run
from test_finetuning import fill, settings_of
from test_finetuning import tiny as tiny
from torch.nn import functional as F

import maehub
from maehub.errors import UsageError
from maehub.models import devices
from maehub.models.encoder import PRESETS, Encoder
from maehub.train import ProbeConfig, finetune, probe

SHORT = ("--steps", 2, "--batch-size", 8, "--workers", 0, "--validate-every", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"), range(8))


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def tiles(request, monkeypatch):
    """Whether the commands find tile units here."""
    monkeypatch.setattr(maehub.models, "multiplies_in_tiles", lambda: request.param)
    return request.param


@pytest.fixture
def tell(run):
    """Run a command in an empty folder: exit code, the last line of stdout, and stderr."""

    def told(*words):
        code, out, err = run(*words)
        return code, [*out, ""][-2 if out else -1], "\n".join(err)

    return told


def test_tile_units_are_found_where_the_system_names_them():
    flags = Path("/proc/cpuinfo")
    if not flags.is_file():
        pytest.skip("nothing here says what the CPU has")
    assert devices.multiplies_in_tiles() == ("amx_bf16" in flags.read_text())


@pytest.mark.parametrize("name", ["vit-nano", "vit-b"])
def test_features_of_both_precisions_point_the_same_way(name):
    generator = torch.Generator().manual_seed(0)
    if name == "vit-nano":
        encoder = maehub.load(name)
    else:
        torch.manual_seed(0)
        encoder = Encoder(PRESETS[name]).eval()
    size = encoder.config.image_size[0]
    photo = F.interpolate(torch.rand(4, 3, size // 8, size // 8, generator=generator), size, mode="bicubic")
    pictures = (photo.clamp(0, 1) * 255).to(torch.uint8)
    for pool in ("cls", "mean", "tokens"):
        precise, fast = (
            maehub.extract_features(encoder, pictures, pool=pool, precision=kind, progress=False).features
            for kind in ("fp32", "bf16")
        )
        assert not torch.equal(precise, fast)
        assert fast.dtype == torch.float32
        assert F.cosine_similarity(precise, fast, dim=-1).min() > 0.999


def test_a_table_says_what_it_was_computed_in_and_is_not_taken_for_the_other(tell, pictures, tiles):
    features = ("features", pictures, "-o", "f.safetensors", "--workers", 0)
    assert tell(*features)[0] == 0
    made = maehub.FeatureTable.load("f.safetensors")
    assert made.provenance.get("precision", "fp32") == ("bf16" if tiles else "fp32")
    assert tell(*features)[0] == 0  # it is done
    other = "fp32" if tiles else "bf16"
    code, _, err = tell(*features, "--precision", other)
    assert code == 2
    assert "made with another precision" in err
    python = maehub.extract_features(maehub.load("vit-nano"), pictures, workers=0, progress=False)
    assert torch.equal(python.features, made.features) is not tiles
    assert "precision" not in python.provenance


def test_what_measures_says_it_and_python_stays_precise(tell, pictures, tiles):
    code, line, _ = tell("probe", pictures, "--workers", 0, "--skip-twins", "-o", "probed", "--json")
    assert (code, json.loads(line)["precision"]) == (0, "bf16" if tiles else "fp32")
    result = probe(ProbeConfig(str(pictures), workers=0, skip_twins=True, quiet=True))
    assert result.precision == "fp32"
    assert "s in fp32" in str(result)
    code, line, _ = tell("knn", pictures, "--workers", 0, "--skip-twins", "--json", "--precision", "fp32")
    assert (code, json.loads(line)["precision"]) == (0, "fp32")
    code, line, _ = tell("evaluate", pictures, "-m", "probed/model", "--workers", 0, "--json")
    assert (code, json.loads(line)["precision"]) == (0, "bf16" if tiles else "fp32")
    shares = []
    for kind in ("fp32", "bf16", "auto"):
        assert tell("predict", pictures, "-m", "probed/model", "-o", f"{kind}.json", "--precision", kind)[0] == 0
        rows = json.loads(Path(f"{kind}.json").read_text())["predictions"]
        shares.append([guess["probability"] for row in rows for guess in row["top"]])
    assert shares[2] == shares[tiles]
    assert 0 < np.abs(np.subtract(*shares[:2])).max() < 0.05


@pytest.mark.parametrize("command", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_a_run_says_it_and_resumes_in_the_same_alone(tell, pictures, tiles, command, monkeypatch, caplog):
    start = ("--from", "vit-nano") if command == "pretrain" else ("--skip-twins", "--image-size", 32)
    line = (command, pictures, "-o", "run", *SHORT, *start)
    assert tell(*line)[0] == 0
    asked = "bf16" if tiles else "fp32"
    assert f"on cpu in {asked}" in caplog.text
    assert json.loads(Path("run/config.json").read_text())["precision"] == asked
    monkeypatch.setattr(maehub.models, "multiplies_in_tiles", lambda: not tiles)  # on another machine
    assert tell(*line, "--resume")[0] == 0
    code, _, err = tell(*line, "--resume", "--precision", "fp32" if tiles else "bf16")
    assert code == 2
    assert "precision" in err


def test_in_python_a_run_is_precise_on_a_cpu(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(maehub.models, "multiplies_in_tiles", lambda: pytest.fail("asked"))
    settings = settings_of(pictures, tmp_path / "run", steps=2)
    assert finetune(settings).exit_code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "fp32"


def test_a_precision_that_is_none_is_refused(pictures):
    with pytest.raises(UsageError, match="one of auto, fp32, bf16"):
        maehub.extract_features(maehub.load("vit-nano"), pictures, precision="fp16")
