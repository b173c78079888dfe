"""Fine-tuning steps of ViT-B beside timm's own training step, with the same augmentation switched on.

    python benchmarks/finetuning.py                         # CPU, two threads
    python benchmarks/finetuning.py --device cuda --batch 128

Both sides start from the same uint8 crops on the device and do what their training loop does with them: normalise,
erase, mix, forward with stochastic depth, soft-target loss, backward, AdamW with layer decay of the rate. Ours also
computes the norm of the gradient and guards the update. timm's side is its ViT, its PrefetchLoader's arithmetic,
RandomErasing, Mixup, SoftTargetCrossEntropy and create_optimizer_v2. Steps are taken in turns, medians are compared.

Per-image augmentation is timed apart, since it runs beside the steps in other processes: timm's transform of a decoded
photo, and ours, which reads the JPEG no further than the crop.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import maehub
from maehub.data.loader import Key
from maehub.images.augment import Augmentation
from maehub.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from maehub.models.encoder import PRESETS, Encoder
from maehub.train.engine.optim import decayed_groups, gradient_norm, set_rates, update
from maehub.train.finetuning.classifier import Objective, as_classifier, drop_paths
from maehub.train.finetuning.mixing import Mixing, seeded_torch
from maehub.train.finetuning.recipes import Settings
from maehub.train.finetuning.views import LabelledBatch, TrainTransform, policy_of

PHOTO = Path(maehub.__file__).parent / "assets" / "cat.jpg"
CLASSES, RATE = 1000, 1e-5
SETTINGS = Settings("official", 100, 1024, 5e-4, 5, 0.05, 0.65, 0.1, erasing=0.25)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_step(batch: LabelledBatch, device: torch.device, precision: torch.dtype | None) -> Callable[[], None]:
    network = as_classifier(Encoder(PRESETS["vit-b"]), [str(number) for number in range(CLASSES)], pool="mean")
    drop_paths(list(network.blocks), SETTINGS.drop_path)
    network.to(device).train()
    objective = Objective(network, None, multi_label=False)
    groups = decayed_groups(network, 12, SETTINGS.weight_decay, SETTINGS.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    mixing = Mixing(SETTINGS, Preprocess.evaluation(224), device)
    bad = torch.zeros((), device=device)
    parameters = list(network.parameters())

    def step() -> None:
        set_rates(optimizer, RATE)
        with seeded_torch(1, device):
            images, targets = mixing(batch, 1)
            with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
                loss = objective(images, targets)
            loss.backward()
            norm = gradient_norm(parameters)
        flag = torch.maximum(bad, (~torch.isfinite(loss.detach() + norm)).float())
        update(optimizer, parameters, norm, flag)

    return step


def timm_step(batch: LabelledBatch, device: torch.device, precision: torch.dtype | None) -> Callable[[], None]:
    network = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, global_pool="avg", drop_path_rate=0.1)
    network.to(device).train()
    optimizer = create_optimizer_v2(network, opt="adamw", lr=RATE, weight_decay=0.05, layer_decay=0.65)
    mean = torch.tensor([255 * value for value in IMAGENET_MEAN], device=device).view(1, 3, 1, 1)
    std = torch.tensor([255 * value for value in IMAGENET_STD], device=device).view(1, 3, 1, 1)
    erase = RandomErasing(0.25, mode="pixel", device=device.type)
    mix = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    criterion = SoftTargetCrossEntropy()
    pixels = batch.pixels.permute(0, 3, 1, 2).contiguous()
    labels = batch.targets.argmax(dim=1)

    def step() -> None:
        images, targets = mix(erase(pixels.float().sub_(mean).div_(std)), labels)
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = criterion(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def compared(batch_size: int, rounds: int, device: torch.device, precision: torch.dtype | None) -> None:
    pixels = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8, device=device)
    targets = torch.nn.functional.one_hot(torch.arange(batch_size) % CLASSES, CLASSES).float()
    batch = LabelledBatch(pixels, targets.to(device), torch.arange(batch_size))
    sides = {"timm": timm_step(batch, device, precision), "maehub": our_step(batch, device, precision)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 0):
            synchronise(device)
            start = time.perf_counter()
            sides[name]()
            synchronise(device)
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    words = "fp32" if precision is None else str(precision).removeprefix("torch.")
    print(f"\n### ViT-B, {batch_size} crops a step, {words}, {rounds} steps each, in turns\n")
    print("| | median s | least | most |\n|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {medians[name]:.4g} | {min(values):.4g} | {max(values):.4g} |")
    print(f"\nSpeed: {medians['timm'] / medians['maehub']:.3f} of timm's (goal: at least 0.97).")


def augmented(rounds: int) -> None:
    """One core, one photo of 1500 pixels at most: what a reading process does for a crop."""
    preprocess = Preprocess.evaluation(224)
    ours = TrainTransform(preprocess, Augmentation(crop_scale=(0.08, 1.0)), policy_of(SETTINGS.randaugment, preprocess))
    transform = create_transform(
        224, is_training=True, auto_augment=SETTINGS.randaugment, interpolation="bicubic", use_prefetcher=True
    )
    ours, theirs = [], []
    seed = 0
    while len(ours) < rounds:
        seed += 1
        start = time.perf_counter()
        ours.crop(str(PHOTO), Key(0, seed, 0))
        middle = time.perf_counter()
        try:
            transform(Image.open(PHOTO).convert("RGB"))
        except ValueError:  # timm's Posterize asks Pillow 12 for no bits at all
            continue
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    size = "×".join(map(str, Image.open(PHOTO).size))
    print(f"\n### A crop of a JPEG of {size}: read, cropped, flipped, RandAugment\n")
    print("| | median ms |\n|---|---|")
    print(f"| timm | {1000 * statistics.median(theirs):.2f} |\n| maehub | {1000 * statistics.median(ours):.2f} |")
    print(f"\nSpeed: {statistics.median(theirs) / statistics.median(ours):.2f} of timm's.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
        compared(arguments.batch, arguments.rounds, device, torch.bfloat16)
    else:
        compared(arguments.batch, arguments.rounds, device, None)
    augmented(200)


if __name__ == "__main__":
    main()
