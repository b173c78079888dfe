"""Loads model folders with transformers and timm, without maehub, and says how far they are from what maehub computed.

    python tests/library_reader.py WORK

WORK has ``plan.json`` ({name: {"kind": "autoencoder" or "encoder", "transformers": true}}) and for each name a folder
``folders/NAME`` and ``expected/NAME.safetensors``; ``picture.png``; and ``hub``, a cache of the Hub laid out by hand
that holds the folders as ``maehub/NAME``. The last line of stdout is one JSON object. tests/test_libraries.py runs this
with old and new versions of both libraries.
"""

import json
import os
import sys
from pathlib import Path

WORK = Path(sys.argv[1])
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(WORK / "hub"), "HF_HOME": str(WORK / "home")}
sys.modules["maehub"] = None  # not even where it is installed

import huggingface_hub  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# What a folder of MAE does not hold: ViTModel's pooler, and the head of a new classifier.
FRESH = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}


class Report:
    """Differences by name, relative to the largest output, and keys that were not as they should be."""

    def __init__(self):
        self.differences, self.keys = {}, {}

    def compare(self, name, theirs, expected):
        assert theirs.shape == expected.shape, f"{name}: {tuple(theirs.shape)} instead of {tuple(expected.shape)}"
        self.differences[name] = ((theirs - expected).abs().max() / expected.abs().max()).item()

    def loaded(self, name, kind, where, decoder=False, **options):
        """A network of transformers; missing keys, and unexpected ones that are not the decoder's, are reported."""
        theirs, info = kind.from_pretrained(where, output_loading_info=True, **options)
        missing = sorted(set(info["missing_keys"]) - FRESH)
        unexpected = sorted(key for key in info["unexpected_keys"] if decoder or not key.startswith("decoder."))
        if found := missing + unexpected + [str(key) for key in info.get("mismatched_keys", ())]:
            self.keys[name] = found
        assert not theirs.training
        return theirs


def read_with_transformers(report, name, where, expected, again):
    images, noise = expected["images"], expected["noise"]
    for place, label in ((str(where), "folder"), (f"maehub/{name}", "hub")):
        for kind in (transformers.ViTMAEForPreTraining, transformers.AutoModelForPreTraining):
            title = f"{name} {kind.__name__} {label}"
            theirs = report.loaded(title, kind, place, decoder=True)
            assert type(theirs).__name__ == "ViTMAEForPreTraining", type(theirs)
            output = theirs(images, noise=noise)
            report.compare(f"{title} mask", output.mask, expected["mask"])
            report.compare(f"{title} prediction", output.logits, expected["prediction"])
            report.compare(f"{title} loss", output.loss[None], expected["loss"])
    theirs.save_pretrained(again)
    for options in ({}, {"add_pooling_layer": False}):
        title = f"{name} ViTModel {options}"
        theirs = report.loaded(title, transformers.ViTModel, where, **options)
        report.compare(title, theirs(images).last_hidden_state, expected["tokens"])
    theirs = report.loaded(f"{name} classifier", transformers.ViTForImageClassification, where, num_labels=3)
    report.compare(f"{name} classifier", theirs.vit(images).last_hidden_state, expected["tokens"])
    theirs = report.loaded(f"{name} AutoModel", transformers.AutoModel, where, mask_ratio=0.0)
    assert type(theirs).__name__ == "ViTMAEModel", type(theirs)
    ascending = torch.arange(noise.shape[1], dtype=torch.float32).expand_as(noise)  # it masks, and shuffles, otherwise
    report.compare(f"{name} AutoModel", theirs(images, noise=ascending).last_hidden_state, expected["tokens"])
    if "pixels" not in expected:
        return
    for place, label in ((where, "folder"), (f"maehub/{name}", "hub")):
        processor = transformers.AutoImageProcessor.from_pretrained(place)
        with Image.open(WORK / "picture.png") as picture:
            pixels = processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        assert pixels.shape == expected["pixels"].shape, f"{type(processor).__name__}: {tuple(pixels.shape)}"
        # in grey levels of 255, which rounding at another place of the resize costs
        off = (pixels - expected["pixels"]) * torch.tensor(processor.image_std).reshape(3, 1, 1) * 255
        report.differences[f"{name} {label} AutoImageProcessor, grey levels"] = off.abs().max().item()


def read_with_timm(report, name, where, expected, kind):
    places = [f"hf-hub:maehub/{name}"]
    if kind != "autoencoder" and hasattr(timm.models._factory, "_MODEL_SOURCES"):  # or this timm reads no local-dir:
        places.append(f"local-dir:{where}")
    for place in places:
        theirs = timm.create_model(place, pretrained=True).eval()
        title = f"{name} timm {place.partition(':')[0]}"
        if "tokens" in expected:
            report.compare(title, theirs.forward_features(expected["images"]), expected["tokens"])
        report.compare(f"{title} forward", theirs(expected["images"]), expected["output"])
        data = timm.data.resolve_model_data_config(theirs)
        assert tuple(data["input_size"]) == tuple(expected["images"].shape[1:]), data


@torch.inference_mode()
def main():
    report = Report()
    for name, plan in json.loads((WORK / "plan.json").read_text()).items():
        where, expected = WORK / "folders" / name, load_file(WORK / "expected" / f"{name}.safetensors")
        if plan["transformers"]:
            again = WORK / "again" / f"{name}-{transformers.__version__}"
            read_with_transformers(report, name, where, expected, again)
        read_with_timm(report, name, where, expected, plan["kind"])
    versions = {module.__name__: module.__version__ for module in (transformers, timm, huggingface_hub, torch)}
    print(json.dumps({"versions": versions, "differences": report.differences, "keys": report.keys}))


main()
