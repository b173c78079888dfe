"""Recipes: functions that give a `PretrainConfig`, with where each is from, what it takes and what came out.

    from maehub.train import pretrain, recipes

    pretrain(recipes.paper("imagenet/", "runs/b"))

A setting is changed by `dataclasses.replace`. Hours marked "plan" are what `maehub plan … --images 1281167 --on h100
--compile` says: one NVIDIA H100 of 80 GB in bf16, compiled, reading not being the bottleneck. "Fine-tuned" and "linear
probe" are top-1 accuracies on ImageNet-1k at 224 pixels, in percent.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from maehub.train.pretraining import PretrainConfig

_WARMUP_EPOCHS = 40  # He et al. 2021, table 8, whatever the length


def paper(
    data: str,
    out: str | Path,
    model: Literal["vit-b", "vit-l", "vit-h"] = "vit-b",
    epochs: Literal[400, 800, 1600] = 1600,
) -> PretrainConfig:
    """The paper's recipe on ImageNet-1k.

    Source:
        He et al. 2021 (arXiv 2111.06377), table 8 and section 4; normalised pixels as in tables 3 and 7.

    Command:
        maehub pretrain DATA -o RUN --model vit-b --epochs 1600 --batch-size 4096 --warmup 0.025
        --target normalised_pixels

    Hours:
        plan: ViT-B 123 H100 hours for 1600 epochs, ViT-L 265, ViT-H 622; half and a quarter for 800 and 400.
        Paper, table 2: ViT-L 15.4 h and ViT-H 34.5 h for 800 epochs on 128 TPU v3 cores.

    Expected:
        1600 epochs: fine-tuned 83.6 (B), 85.9 (L), 86.9 (H), table 3; linear probe 68.0, 75.8, 76.6, table 12.
        800 epochs: ViT-L fine-tuned 85.4, linear probe 73.9, table 1d. 400 epochs: ViT-L on pixels that are not
        normalised 84.3 and 69.7, figure 7.

    Departures:
        None known, but for 2000 pictures that are held out of training where DATA has no folder ``val``.
    """
    return PretrainConfig(
        data,
        Path(out),
        model=model,
        epochs=epochs,
        batch_size=4096,
        warmup=_WARMUP_EPOCHS / epochs,
        target="normalised_pixels",
    )


def tiny(data: str, out: str | Path, epochs: int = 400) -> PretrainConfig:
    """A ViT-Ti for small devices, on ImageNet-1k.

    Source:
        The length is that of Wang et al. 2022 (MAE-lite, arXiv 2205.14443) for ViT-Ti; the rest is the paper's recipe.
        The decoder is ours: with the paper's it would take nine tenths of the FLOPs.

    Command:
        maehub pretrain DATA -o RUN --model vit-ti --epochs 400 --batch-size 4096 --warmup 0.1
        --target normalised_pixels --decoder-width 192 --decoder-depth 4 --decoder-heads 6

    Hours:
        plan: 2.2 H100 hours at the utilisation of ViT-B, which such narrow layers will hardly reach, and with reading
        on 215 cores: in practice reading decides.
        Wang et al.: about 40 h on 8 GPUs of type 2080.

    Expected:
        Fine-tuned 76.1 (300 epochs), 74.5 from scratch: Wang et al., with their decoder. Not measured with this one.
    """
    config = replace(paper(data, out), model="vit-ti", epochs=epochs, warmup=_WARMUP_EPOCHS / epochs)
    return replace(config, decoder_width=192, decoder_depth=4, decoder_heads=6)


def small_data(data: str, out: str | Path, steps: int = 4800) -> PretrainConfig:
    """From scratch on hundreds of photos: a small network, very small crops, every picture decoded once.

    Source:
        The embedded model, docs/vit-nano.md, trained so on 142 photos. For features that matter take
        `domain_continuation`.

    Command:
        maehub pretrain DATA -o RUN --model vit-nano --target pixels --batch-size 1024 --base-lr 3.75e-4
        --crop-scale 0.02 1 --cache --steps 4800 --validate-every 400 --checkpoint-every 800

    Hours:
        Measured: 8 min 13 s on one H100 with 16 cores, reading being the bottleneck (docs/vit-nano.md).

    Expected:
        Measured: 0.83 of the squared error of linear interpolation on photos of scenes that it never saw.
    """
    return PretrainConfig(
        data,
        Path(out),
        model="vit-nano",
        target="pixels",
        batch_size=1024,
        base_lr=3.75e-4,
        crop_scale=(0.02, 1.0),
        cache=True,
        steps=steps,
        validate_every=400,
        checkpoint_every=800,
    )


def domain_continuation(data: str, out: str | Path, from_: str = "vit-b", epochs: float = 100) -> PretrainConfig:
    """Go on from published weights with pictures of another kind: scans, slides, aerial pictures.

    Source:
        The idea is that of Reed et al. 2021 (arXiv 2103.12718): pretraining again on the domain's pictures, from
        general weights, converges faster and needs fewer of them. Settings are the paper's with half its rate, since
        the weights are trained, and a warm-up of a tenth; they were not tuned.

    Command:
        maehub pretrain DATA -o RUN --from vit-b --epochs 100 --batch-size 1024 --base-lr 7.5e-5 --warmup 0.1

    Hours:
        plan: 1.2 H100 hours for 200,000 pictures.

    Expected:
        No published number for these settings. Step 0 reports the weights' own loss on the held-out pictures: the run
        is worth its hours if ``val_loss`` falls well below it, and a probe before and after decides.
    """
    return PretrainConfig(data, Path(out), from_=from_, epochs=epochs, batch_size=1024, base_lr=7.5e-5, warmup=0.1)


def vit_masked_patch_prediction(
    data: str, out: str | Path, model: str = "vit-b", steps: int = 1_000_000
) -> PretrainConfig:
    """The masked patch prediction of the Vision Transformer's paper: BERT for patches, mean colours as words.

    Half of the patches are hidden: 80 % of them become the mask token, 10 % another patch, 10 % stay. The encoder sees
    all, and a linear head names the mean colour of each hidden patch, 3 bits a channel.

    Source:
        Dosovitskiy et al. 2020 (arXiv 2010.11929), appendix B.1.2.

    Command:
        maehub pretrain DATA -o RUN --model vit-b --steps 1000000 --batch-size 4096 --base-lr 1.25e-5 --warmup 0.01
        --mask-ratio 0.5 --corruption 0.8 0.1 0.1 --target tokens --mask-tokens encoder --decoder-depth 0

    Hours:
        plan: 450 H100 hours.

    Expected:
        Fine-tuned 79.9 (ViT-B/16, pretrained on JFT), 2 points above training from scratch: appendix B.1.2.

    Departures:
        Theirs: JFT-300M, Adam with β 0.9 and 0.999, learned positions. Ours: DATA, AdamW with β 0.9 and 0.95 and weight
        decay 0.05, fixed sine-cosine positions, MAE's initialisation. Patches are replaced before they are embedded and
        come from the same picture. The peak rate is theirs: 2e-4 at 4096.
    """
    return PretrainConfig(
        data,
        Path(out),
        model=model,
        steps=steps,
        batch_size=4096,
        base_lr=1.25e-5,
        warmup=0.01,
        mask_ratio=0.5,
        corruption=(0.8, 0.1, 0.1),
        target="tokens",
        mask_tokens="encoder",
        decoder_depth=0,
    )


def beit_like(data: str, out: str | Path, model: str = "vit-b", epochs: int = 800) -> PretrainConfig:
    """Like BEiT: blocks of patches hidden up to 40 %, mask tokens in the encoder, a linear head, cross-entropy.

    The tokenizer is the caller's: ``pretrain(beit_like(…), tokenizer=tokens_of)``, where ``tokens_of`` takes pictures
    (B, C, H, W) float32 in [0, 1] and gives (B, N) integers. At the command line, where none can be given, the tokens
    are ViT's 512 mean colours.

    Source:
        Bao et al. 2021 (BEiT, arXiv 2106.08254), section 2 and the appendix on pretraining.

    Command:
        maehub pretrain DATA -o RUN --model vit-b --epochs 800 --batch-size 2048 --base-lr 1.875e-4 --warmup 0.0125
        --mask-ratio 0.4 --strategy block --target tokens --mask-tokens encoder --decoder-depth 0
        --augment colour-jitter

    Hours:
        plan: 112 H100 hours, without the tokenizer. Bao et al.: five days on 16 V100 for ViT-B.

    Expected:
        Fine-tuned 83.2 (B), 85.2 (L), with the tokenizer of DALL·E: He et al. 2021, table 3.

    Departures:
        Exactly 40 % are hidden in every picture, theirs are up to 75 of 196. No relative position bias, no layer scale,
        no stochastic depth; β 0.95 for their 0.999; fixed sine-cosine positions; the crops of MAE.
    """
    return PretrainConfig(
        data,
        Path(out),
        model=model,
        epochs=epochs,
        batch_size=2048,
        base_lr=1.875e-4,
        warmup=10 / epochs,
        mask_ratio=0.4,
        strategy="block",
        target="tokens",
        mask_tokens="encoder",
        decoder_depth=0,
        augment="colour-jitter",
    )


RECIPES = (paper, tiny, small_data, domain_continuation, vit_masked_patch_prediction, beit_like)
"""All of them."""
