"""Load a model repository with another library and write what it computes.

Run as a file in a process of its own, so that maehub is not there to help: ``python round_trip.py JOB``, JOB being a
JSON file with ``library``, ``repo`` (a Hub id that lies in the cache of this process), ``inputs`` and ``outputs``
(tensor files). What does not load ends the process with the error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def with_transformers(repo: str, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The autoencoder: ``images`` (B, C, H, W) and ``noise`` (B, N), whose smallest values stay visible.

    To ``prediction``, and as what reads the encoder alone, ``tokens`` (B, N + 1, D) without masking.
    """
    from transformers import AutoModel, ViTMAEForPreTraining

    opened: Any = ViTMAEForPreTraining.from_pretrained(repo, output_loading_info=True)
    autoencoder, report = opened
    unknown = {name: sorted(report[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(unknown.values()):
        raise ValueError(f"transformers does not find its tensors: {unknown}")
    encoder = AutoModel.from_pretrained(repo, mask_ratio=0.0).eval()
    ascending = torch.arange(noise.shape[1], dtype=torch.float32).expand_as(noise)
    return {
        "prediction": autoencoder.eval()(images, noise=noise).logits,
        "tokens": encoder(images, noise=ascending).last_hidden_state,
    }


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    inputs = load_file(settings["inputs"])
    with torch.inference_mode():
        if settings["library"] == "timm":  # the encoder or classifier: logits or the pooled feature
            import timm

            network = timm.create_model(f"hf-hub:{settings['repo']}", pretrained=True).eval()
            outputs = {"forward": network(inputs["images"])}
        else:
            outputs = with_transformers(settings["repo"], inputs["images"], inputs["noise"])
    save_file({name: tensor.float().contiguous() for name, tensor in outputs.items()}, settings["outputs"])
