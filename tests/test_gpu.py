"""The same on a GPU as on the CPU; every test is skipped where there is none."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peers import images, make_autoencoder, make_encoder
from PIL import Image, ImageOps

import maehub
from maehub.cli.command_line import main
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.models.masking import kept_count, make_masks
from maehub.train import FinetuneConfig, PretrainConfig, finetune, pretrain
from maehub.train.engine.run_log import RunLog
from maehub.train.finetuning import job as finetuning
from maehub.train.pretraining import loop as pretraining
from maehub.train.pretraining.objective import Objective

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ASSETS = Path(maehub.__file__).parent / "assets"
SMALL = EncoderConfig(64, 8, 3, 128, 3, 4)
SMALL_MAE = AutoencoderConfig(SMALL, 64, 2, 4, "normalised_pixels")


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 has 10 bits; these tests compare float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.compiler.reset()


def on_gpu(model):
    return copy.deepcopy(model).cuda()


def close(ours, theirs, tolerance=1e-4):
    ours, theirs = ours.float().cpu(), theirs.float()
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= tolerance


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_masks_are_the_same(strategy):
    seeds = torch.tensor([0, 1, -5, 2**62])
    on_cpu = make_masks(strategy, seeds, (14, 14))
    on_device = make_masks(strategy, seeds.cuda(), (14, 14))
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), on_cpu)


@torch.inference_mode()
def test_forwards_are_the_same():
    encoder, mae, pictures = make_encoder(SMALL), make_autoencoder(SMALL_MAE), images(SMALL, 4)
    close(on_gpu(encoder)(pictures.cuda()), encoder(pictures))
    for pool in ("cls", "mean", "cls+mean", "tokens", "map"):
        theirs = encoder.features(pictures, pool=pool, layers=[0, -1])
        close(on_gpu(encoder).features(pictures.cuda(), pool=pool, layers=[0, -1]), theirs)
    close(on_gpu(encoder).attention(pictures.cuda()), encoder.attention(pictures))
    ours, theirs = on_gpu(mae)(pictures.cuda(), seeds=[1, 2, 3, 4]), mae(pictures, seeds=[1, 2, 3, 4])
    assert torch.equal(ours.masked.cpu(), theirs.masked)
    close(ours.prediction, theirs.prediction)
    close(ours.loss, theirs.loss)
    wide = images(SMALL, 2, (64, 96))
    close(on_gpu(encoder)(wide.cuda()), encoder(wide))  # positions are resized on the device


def test_losses_and_gradients_are_the_same():
    mae, pictures = make_autoencoder(SMALL_MAE), images(SMALL, 4)
    other = on_gpu(mae)
    masked = make_masks("random", torch.arange(4), SMALL.grid)
    loss, on_device = mae.loss(pictures, masked), other.loss(pictures.cuda(), masked.cuda())
    close(on_device, loss)
    loss.backward()
    on_device.backward()
    largest = max(value.grad.abs().max().item() for value in mae.parameters() if value.grad is not None)
    for value, same in zip(mae.parameters(), other.parameters(), strict=True):
        if value.grad is not None:
            assert (value.grad - same.grad.cpu()).abs().max().item() <= 1e-3 * largest


def test_bfloat16_is_near():
    """A fresh model, as training begins with; peaked attention would enlarge every rounding."""
    torch.manual_seed(0)
    mae, pictures = MaskedAutoencoder(SMALL_MAE).cuda(), images(SMALL, 16).cuda()
    masked = make_masks("random", torch.arange(16), SMALL.grid).cuda()
    with torch.no_grad():
        exact = mae.loss(pictures, masked)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            near = mae.loss(pictures, masked)
    assert near.dtype == torch.float32  # losses are
    assert abs(near.item() / exact.item() - 1) < 0.01


@torch.inference_mode()
def test_an_encoder_compiles_in_one_graph():
    encoder, pictures = on_gpu(make_encoder(SMALL)), images(SMALL, 4).cuda()
    close(torch.compile(encoder, fullgraph=True)(pictures), encoder(pictures).cpu())


def test_the_training_loss_compiles_in_one_graph():
    mae, pictures = on_gpu(make_autoencoder(SMALL_MAE)), images(SMALL, 4).cuda()
    masked = make_masks("random", torch.arange(4), SMALL.grid).cuda()
    kept = kept_count(masked.shape[1], 0.75)
    loss = torch.compile(mae.loss, fullgraph=True)(pictures, masked, kept=kept)
    close(loss, mae.loss(pictures, masked, kept=kept).detach().cpu())
    loss.backward()
    assert all(value.grad.isfinite().all() for value in mae.parameters() if value.grad is not None)


def test_features_and_reconstructions_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = maehub.load("vit-nano")
    on_device = maehub.load("vit-nano", device="cuda")
    assert isinstance(on_device, Encoder)
    assert {value.device.type for value in on_device.parameters()} == {"cuda"}
    options = {"workers": 0, "progress": False}
    ours = maehub.extract_features(on_device, ASSETS, **options).features
    theirs = maehub.extract_features(encoder, ASSETS, **options).features
    assert not ours.is_cuda
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9999
    half = maehub.load("vit-nano", device="cuda", dtype=torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(
        maehub.extract_features(half, ASSETS, **options).features, theirs
    ).min() > 0.99  # fmt: skip
    panels = [
        maehub.reconstruct(maehub.load_autoencoder("vit-nano", device=device), ASSETS / "cat.jpg")
        for device in ("cuda", "cpu")
    ]
    assert (panels[0].mask == panels[1].mask).all()
    assert panels[0].psnr == pytest.approx(panels[1].psnr, abs=0.05)


def test_training_on_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", str(ASSETS), "-o", "run", "--steps", "3", "--batch-size", "4", "--workers", "0", "--json"]
    assert main([*words, "--device", "cuda"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 3
    assert main([*words, "--device", "cuda", "--resume"]) == 0


def run_of(tmp_path, name, *more):
    words = [
        "pretrain",
        str(ASSETS),
        "-o",
        str(tmp_path / name),
        "--steps",
        "24",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    assert main([*words, "--holdout", "0", "--validate-every", "100", "--device", "cuda", "--quiet", *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """From the learning rate to the log, once everything is warm; micro-batches and clipping included."""
    real_rate, real_log = pretraining.engine.learning_rate, RunLog.log

    def rate(step, *rest):
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        return real_rate(step, *rest)

    def log(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        real_log(self, *arguments)

    monkeypatch.setattr(pretraining.engine, "learning_rate", rate)
    monkeypatch.setattr(RunLog, "log", log)
    try:
        run_of(tmp_path, "run", "--micro-batch", "4", "--clip-grad", "1", "--augment", "colour-jitter")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_deterministic_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    whole = run_of(tmp_path, "whole", "--deterministic")
    real = pretraining.engine.learning_rate

    def dies(step, *rest):
        if step == 13:
            raise MemoryError
        return real(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.engine, "learning_rate", dies)
        with pytest.raises(AssertionError):
            run_of(tmp_path, "cut", "--deterministic", "--checkpoint-every", "8")
    assert run_of(tmp_path, "cut", "--deterministic", "--checkpoint-every", "8", "--resume") == whole
    states = [maehub.load_autoencoder(tmp_path / name).state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_bad_step_is_skipped_on_the_device(tmp_path, monkeypatch):
    real_rate, real_normalise, at = pretraining.engine.learning_rate, Objective.normalise, []

    def rate(step, *rest):
        at.append(step)
        return real_rate(step, *rest)

    def normalise(self, pixels):
        return real_normalise(self, pixels) * (torch.nan if at and at[-1] == 5 else 1)

    monkeypatch.setattr(pretraining.engine, "learning_rate", rate)
    monkeypatch.setattr(Objective, "normalise", normalise)
    with pytest.raises(AssertionError):
        run_of(tmp_path, "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "diverged"
    assert (tmp_path / "run" / "checkpoints" / "step-5").is_dir()
    assert len(at) > 6  # the host was ahead


def test_a_batch_that_does_not_fit_is_accumulated(tmp_path, monkeypatch, caplog):
    real = Objective.forward

    def small(self, pixels, *rest):
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels, *rest)

    monkeypatch.setattr(Objective, "forward", small)
    with caplog.at_level("INFO", "maehub"):
        pretrain(PretrainConfig(ASSETS, tmp_path / "run", steps=2, batch_size=8, workers=0, device="cuda", quiet=True))
    assert "gradients are accumulated over 2 × 4" in caplog.text


def labelled(folder):
    """Two classes: the photos of maehub, and their negatives."""
    for number in range(6):
        for path in ASSETS.glob("*.jpg"):
            picture = Image.open(path).convert("RGB").resize((80 + number, 80))
            for name, image in (("plain", picture), ("negative", ImageOps.invert(picture))):
                (folder / name).mkdir(parents=True, exist_ok=True)
                image.save(folder / name / f"{path.stem}-{number}.png")
    return folder


def finetuned(data, out, **changes):
    usual = {"steps": 24, "batch_size": 8, "workers": 0, "device": "cuda", "quiet": True, "skip_twins": True}
    return finetune(FinetuneConfig(str(data), out, **(usual | {"precision": "fp32"} | changes)))


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_fine_tuning_is_that_of_the_cpu(tmp_path):
    data = labelled(tmp_path / "data")
    plain = {"mixup": 0, "cutmix": 0, "erasing": 0, "drop_path": 0, "steps": 8}
    on_gpu_, on_cpu = (finetuned(data, tmp_path / name, device=name, **plain) for name in ("cuda", "cpu"))
    assert losses_of(on_gpu_.run) == pytest.approx(losses_of(on_cpu.run), rel=1e-3)


def test_a_deterministic_fine_tuning_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    data, full = labelled(tmp_path / "data"), {"deterministic": True, "checkpoint_every": 8, "ema": 0.9, "mixup": 0.8}
    whole = finetuned(data, tmp_path / "whole", **full)
    real = finetuning.engine.learning_rate

    def dies(step, *rest):
        if step == 13:
            raise MemoryError
        return real(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.engine, "learning_rate", dies)
        with pytest.raises(MemoryError):
            finetuned(data, tmp_path / "cut", **full)
    cut = finetuned(data, tmp_path / "cut", resume=True, **full)
    assert losses_of(cut.run) == losses_of(whole.run)
    states = [maehub.load(result.run).state_dict() for result in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_step_of_fine_tuning_never_waits_for_the_device(tmp_path, monkeypatch):
    real_rate, real_log = finetuning.engine.learning_rate, RunLog.log

    def rate(step, *rest):
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        return real_rate(step, *rest)

    def log(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")
        real_log(self, *arguments)

    monkeypatch.setattr(finetuning.engine, "learning_rate", rate)
    monkeypatch.setattr(RunLog, "log", log)
    try:
        finetuned(labelled(tmp_path / "data"), tmp_path / "run", micro_batch=4, clip_grad=1.0, ema=0.9, mixup=0.8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
