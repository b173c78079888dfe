"""What a pretraining run will need, before anything is spent: memory, time, disk, and what to change."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

import maehub.train.pretraining as pretraining
from maehub.data import Key, Source, worker_count
from maehub.errors import DataError, UsageError
from maehub.hub import is_model, model_info
from maehub.models import AutoencoderConfig
from maehub.train.engine import peak_rate
from maehub.train.networks import costs
from maehub.train.planning.devices import Device, device_row
from maehub.train.planning.estimate import Plan, Reading, Utilisation, byte_words
from maehub.train.pretraining import PlanConfig

_USABLE_GPU, _USABLE_CPU = 0.9, 0.5
"""Share of the memory that a plan fills; the rest is for the driver and the allocator's gaps, or the readers and the
system."""

_MEASURED = "docs/performance.md"
# Share of the peak rate that training FLOPs reached: bf16 on the H100 rows of docs/performance.md (ViT-B 0.20 at batch
# 256, ViT-L 0.21 at 128; ViT-B compiled 0.27), float32 on a CPU in docs/scaling.md (vit-nano, vit-ti, vit-s, vit-b).
_GPU_UTILISATION, _COMPILED_UTILISATION, _CPU_UTILISATION = 0.20, 0.27, 0.8
_ASSUMED_UTILISATION = 0.5  # float32 on a GPU, which was not measured
_READING = 3.34  # ms of one core for a JPEG of 500×375 to 224 px, docs/performance.md
_TIMED_PICTURES = 24
_ADAMW_TRAFFIC = 28  # bytes a parameter: weight, gradient and both moments are read, all but the gradient written


def plan(config: PlanConfig) -> Plan:
    """Estimate what a pretraining run needs.

    FLOPs are those of matrix products; the rate is the device's peak times ``utilisation``, and AdamW takes the time
    that its memory traffic takes. Communication between processes, validation and checkpoints are not in the time.

    Raises:
        UsageError: a setting that cannot be, an unknown model or device, or no number of images.
        DataError: there are no pictures in DATA.
    """
    network = network_of(config)
    device = device_row(config.on, config.device)
    precision = _precision(config, device)
    utilisation = _utilisation(config, device, precision)
    images, source = _images(config)
    batch_size = config.batch_size or pretraining.batch_size_of(config, images, config.processes)
    per_step = batch_size / config.masks_per_image
    steps = config.steps or math.ceil((config.epochs or 0) * images / per_step)

    parameters = costs.count_parameters(network)
    kept = pretraining.kept_patches(pretraining.view_of(config, network))
    corrupts = config.corruption[0] < 1
    work = costs.work_of(network, kept, share=config.predict_share, loss_on=config.loss_on, corrupts=corrupts)
    forward = costs.forward_flops(network, work)
    training = forward * (1 + costs.BACKWARD + config.checkpoint_activations)
    view_bytes = costs.activation_bytes(network, work, precision, checkpoint=config.checkpoint_activations)
    shards = config.processes if config.fsdp else 1
    fixed = costs.fixed_bytes(parameters, precision, shards=shards, largest_block=costs.block_parameters(network))

    share = math.ceil(batch_size / config.processes)
    capacity = max(0, math.floor((_usable(device) - fixed) / view_bytes))  # views
    largest = next((size for size in range(min(share, capacity), 0, -1) if share % size == 0), 0)
    micro = min(share, config.micro_batch) if config.micro_batch else largest
    seconds = share * training / (device.rate(precision) * 1e12 * utilisation.share)
    seconds += _ADAMW_TRAFFIC * parameters.trained / shards / (device.bandwidth * 1e9)
    speed = batch_size / seconds

    checkpoint = costs.checkpoint_bytes(parameters)
    exported = 4 * (2 * parameters.encoder + parameters.decoder + parameters.fixed)
    estimate = Plan(
        network=config.from_ or config.model,
        parameters=parameters,
        view=network.encoder.size,
        work=work,
        forward_flops=forward,
        training_flops=training,
        decoder_share=costs.decoder_flops(network, work) / forward,
        device=device,
        precision=precision,
        utilisation=utilisation,
        processes=config.processes,
        fixed_bytes=fixed,
        view_bytes=view_bytes,
        micro_batch=micro,
        accumulation=math.ceil(share / micro) if micro else 0,
        images=images,
        steps=steps,
        batch_size=batch_size,
        learning_rate=peak_rate(config.base_lr, batch_size),
        step_seconds=seconds,
        images_per_second=speed,
        hours=steps * seconds / 3600,
        reading=_reading(config, network, source, speed / config.masks_per_image),
        checkpoint_bytes=checkpoint,
        disk_bytes=(config.keep + 1) * checkpoint + exported,
        advice=(),
    )
    return replace(estimate, advice=tuple(_advice(config, network, estimate, capacity)))


def network_of(config: PlanConfig) -> AutoencoderConfig:
    """The network that a run trains. Of a published model the catalog's row is enough, so nothing is downloaded."""
    name = config.from_
    if is_model(name) and model_info(name).sources[0].kind != "package":
        info = model_info(name)
        config = replace(
            config,
            from_="",
            model=info.architecture,
            image_size=config.image_size or info.image_size,
            target=config.target or info.target,
        )
    elif name and not is_model(name) and not Path(name).exists():
        raise UsageError(
            f"--from {name} is neither in `maehub list` nor here, and a plan downloads nothing; "
            f"`maehub download {name}` fetches it and says where: --from its folder"
        )
    with torch.device("cpu" if config.from_ else "meta"):
        return pretraining.autoencoder_of(config, pretraining.find_weights(config.from_)).config


def _usable(device: Device) -> float:
    """Bytes that training may take."""
    return device.memory * 2**30 * (_USABLE_CPU if device.name == "cpu" else _USABLE_GPU)


def _precision(config: PlanConfig, device: Device) -> Literal["bf16", "fp32"]:
    if config.precision == "bf16" and not device.bf16:
        raise UsageError(f"--precision bf16: {device.name} does not compute in bf16; leave it at auto")
    chosen = config.precision == "bf16" or (config.precision == "auto" and device.name != "cpu" and device.bf16 > 0)
    return "bf16" if chosen else "fp32"


def _utilisation(config: PlanConfig, device: Device, precision: str) -> Utilisation:
    if config.utilisation is not None:
        return Utilisation(config.utilisation, "--utilisation")
    if device.name == "cpu":
        return Utilisation(_CPU_UTILISATION, "measured on a CPU, docs/scaling.md")
    if precision == "fp32":
        return Utilisation(_ASSUMED_UTILISATION, "assumed: fp32 was not measured on a GPU")
    share = _COMPILED_UTILISATION if config.compile else _GPU_UTILISATION
    kind = "compiled" if config.compile else "not compiled"
    return Utilisation(share, f"measured on an H100, {kind}, {_MEASURED}")


def _images(config: PlanConfig) -> tuple[int, Source | None]:
    """How many pictures are trained on, and where they are."""
    if not config.data:
        if config.images is None:
            raise UsageError("how many images? Give --images, or DATA, where they are counted")
        held_out = min(config.images // 20, 2000) if config.holdout is None else config.holdout  # as `split_data`
        if held_out >= config.images:
            raise UsageError(f"--holdout {held_out} leaves nothing of {config.images} images to train on")
        return config.images - held_out, None
    training = pretraining.split_data(config.data, config.holdout, config.group).training
    return config.images or len(training), training


def _reading(config: PlanConfig, network: AutoencoderConfig, source: Source | None, rate: float) -> Reading:
    """What reading must give, and how many cores that takes; timed on pictures of DATA."""
    milliseconds, words = _READING, f"JPEGs of 500×375, {_MEASURED}"
    if source is not None:
        crops = pretraining.Crops(source, pretraining.view_of(config, network), cache=False)
        count = min(len(source), _TIMED_PICTURES)
        start = time.process_time()
        for number in range(count):
            if isinstance(made := crops[Key(number * len(source) // count, number, number)], DataError):
                raise made
        milliseconds = 1000 * (time.process_time() - start) / count
        words = f"timed on {count} pictures of DATA"
    return Reading(rate, milliseconds, words, max(1, math.ceil(rate * milliseconds / 1000)))


def _advice(config: PlanConfig, network: AutoencoderConfig, run: Plan, capacity: int) -> list[str]:
    """What to change, most pressing first."""
    advice = [*_memory_advice(config, network, run, capacity)]
    cores = worker_count(None) + 1 if config.on == "auto" else None
    reading = run.reading
    if cores is not None and reading.cores > cores * run.processes:
        advice.append(
            f"Reading needs {reading.cores} cores and this machine has {cores}: the device will wait for pictures. "
            "Shrink them on the disk, --cache a small data set, or "
            f"--masks-per-image {2 * config.masks_per_image}, which halves the reading."
        )
    elif reading.cores > 16 * run.processes:
        advice.append(
            f"Reading needs {reading.cores:,} cores, {reading.cores / run.processes:.0f} for each device: shrink the "
            f"pictures on the disk, or --masks-per-image {2 * config.masks_per_image}, which halves the reading."
        )
    if run.precision == "fp32" and config.precision == "fp32" and run.device.name != "cpu" and run.device.bf16:
        gain = run.device.bf16 / run.device.fp32
        advice.append(f"--precision bf16: {run.device.name} computes it up to {gain:.0f} times faster than fp32.")
    if run.precision == "bf16" and not config.compile and config.utilisation is None:
        advice.append("--compile: 1.37 times the images/s for ViT-B on an H100 (docs/performance.md).")
    if run.decoder_share > 0.4 and network.decoder_depth > 1:
        shallow = replace(network, decoder_depth=1)
        ratio = run.forward_flops / costs.forward_flops(shallow, run.work)
        advice.append(
            f"The decoder takes {run.decoder_share:.0%} of the FLOPs: --decoder-depth 1 makes a step {ratio:.1f} "
            "times cheaper. For ViT-L the paper lost 0.1 points fine-tuned and 8.0 of the linear probe (table 1a)."
        )
    if not config.from_ and run.images < 100_000:
        advice.append(
            f"{run.images:,} images are few to start from nothing: --from vit-b goes on from published weights."
        )
    if run.steps < 20 / max(config.warmup, 0.05):
        words = "one step" if run.steps == 1 else f"{run.steps:,} steps"
        advice.append(f"Only {words}: a smaller --batch-size makes more of the same images.")
    if run.hours > 7 * 24:
        needed = math.ceil(run.processes * run.hours / (7 * 24))
        advice.append(f"About {needed:,} devices like this one would do it within a week, if they share the work well.")
    return advice


def _memory_advice(config: PlanConfig, network: AutoencoderConfig, run: Plan, capacity: int) -> list[str]:
    share = math.ceil(run.batch_size / run.processes)
    advice = []
    if run.batch_size % run.processes:
        advice.append(f"--batch-size {run.batch_size} is no multiple of {run.processes} processes: it must be one.")
    if capacity < 1:
        shard = "" if config.fsdp else ", or --fsdp over several --processes, which share weights and optimizer"
        advice.append(
            f"Not even one view fits: {byte_words(run.fixed_bytes)} of weights, gradients and optimizer and "
            f"{byte_words(run.view_bytes)} a view, on {run.device.memory:,.0f} GiB. Take a device with more{shard}."
        )
    elif config.micro_batch and config.micro_batch > capacity:
        advice.append(f"--micro-batch {config.micro_batch} does not fit: {capacity:,} views do. Leave it out.")
    elif share > capacity:
        small = costs.activation_bytes(network, run.work, run.precision, checkpoint=True)
        larger = (_usable(run.device) - run.fixed_bytes) // small
        again = f" --checkpoint-activations would fit {larger:,.0f}, for a third more time."
        advice.append(
            f"{share:,} views a process do not fit at once, {capacity:,} do: gradients are accumulated over "
            f"{run.accumulation:,} micro-batches, with the same result.{'' if config.checkpoint_activations else again}"
        )
    return advice
