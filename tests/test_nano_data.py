"""The photo list of vit-nano: splits that share no scene, licences, credits.

Reads the manifest and the embedded photos only; nothing is downloaded.
"""

import importlib.machinery
import importlib.util
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
NEAR = 9  # bits of 64: two hashes this near are taken for the same picture
NEAR_GREY = 5  # bits of the 34 of brightness, for a grey copy of a whole picture
ALLOWED = {
    "CC0-1.0",
    "PDDL-1.0",
    "CC-BY-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "BSD-3-Clause",
    "MIT",
    "LicenseRef-public-domain",
}


def load_script():
    loader = importlib.machinery.SourceFileLoader("nano_data", str(ROOT / "scripts" / "nano-data"))
    spec = importlib.util.spec_from_loader("nano_data", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


nano = load_script()
PHOTOS = nano.load()
TEST = [p for p in PHOTOS if p["split"] == "test"]
REST = [p for p in PHOTOS if p["split"] != "test"]
ASSETS = sorted((ROOT / "maehub" / "assets").glob("*.jpg"))


def whole(photo):
    return np.array([int(photo["phash"], 16), int(photo["phash_mirror"], 16)], np.uint64)


def relation(photo, test_scene):
    """How a picture resembles a test scene, or None."""
    if nano.distances(whole(photo), nano.unpack_hashes(test_scene["crops"])).min() <= NEAR:
        return "is the scene or a crop of it"
    if nano.distances(whole(test_scene), nano.unpack_hashes(photo["crops"])).min() <= NEAR:
        return "contains the scene"
    light = (whole(photo)[:, None] ^ whole(test_scene)[None, :]) >> np.uint64(30)
    if np.bitwise_count(light).min() <= NEAR_GREY:
        return "is the scene in grey"
    return None


def resembling(photo):
    found = {scene["scene"]: relation(photo, scene) for scene in TEST}
    return {name: how for name, how in found.items() if how}


def planted(image, quality=50):
    """A picture as it would come into the training list: encoded, then hashed."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return nano.entry_hashes(Image.open(buffer), "train")


def test_no_train_or_val_picture_shows_a_test_scene():
    leaks = [f"{p['split']}/{p['scene']}: {resembling(p)}" for p in REST if resembling(p)]
    assert leaks == []


def test_splits():
    scenes = Counter(p["scene"] for p in PHOTOS)
    assert [name for name, n in scenes.items() if n > 1] == []
    sources = Counter((p["package"], p["path"]) for p in PHOTOS)
    assert [source for source, n in sources.items() if n > 1] == []
    digests = Counter(p["sha256"] for p in PHOTOS)
    assert [digest for digest, n in digests.items() if n > 1] == []
    counts = Counter(p["split"] for p in PHOTOS)
    assert set(counts) == {"train", "val", "test"}
    assert counts["test"] >= 6
    assert counts["val"] >= 4
    assert counts["train"] >= 40


def test_entries_are_complete():
    for p in PHOTOS:
        assert re.fullmatch(r"[a-z0-9-]+", p["scene"])
        assert re.fullmatch(r"[0-9a-f]{64}", p["sha256"]), p["scene"]
        assert re.fullmatch(r"[0-9a-f]{16}", p["phash"]), p["scene"]
        assert p["registry"] in nano.REGISTRIES, p["scene"]
        assert p["version"], p["scene"]
        assert p["path"], p["scene"]
        assert min(p["size"]) >= 150, p["scene"]


def test_licences_are_allowed():
    for p in PHOTOS:
        assert set(p["license"].split(" AND ")) <= ALLOWED, (p["scene"], p["license"])


def test_every_author_is_credited():
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    for p in PHOTOS:
        for author in p["author"].split("; "):
            assert author in notice, (p["scene"], author)
        assert p["scene"] in notice


def test_every_photo_is_documented():
    text = (ROOT / "docs" / "nano-data.md").read_text()
    for p in PHOTOS:
        assert f"\n| {p['scene']} | {p['split']} | " in text, p["scene"]


def test_there_are_embedded_photos():
    assert len(ASSETS) >= 2


@pytest.mark.parametrize("path", ASSETS, ids=lambda p: p.stem)
def test_embedded_photos_are_test_scenes(path):
    scene = next((p for p in TEST if p["scene"] == path.stem), None)
    assert scene is not None, f"{path.name} is no test scene"
    with Image.open(path) as image:
        assert max(image.size) <= 1000
        assert path.stat().st_size <= 250_000
        now = nano.phashes(nano.thumb(image))
    assert nano.distances(now, whole(scene)[:1]).min() <= 2


CONTROLS = {
    "re-encoded": lambda im: im,
    "halved": lambda im: im.resize((im.width // 2, im.height // 2)),
    "stretched": lambda im: im.resize((im.width, int(im.height * 1.15))),
    "mirrored": ImageOps.mirror,
    "grey": lambda im: im.convert("L"),
    "cropped left": lambda im: im.crop((0, 0, int(im.width * 0.7), int(im.height * 0.7))),
    "cropped middle": lambda im: im.crop(
        (int(im.width * 0.2), int(im.height * 0.2), int(im.width * 0.8), int(im.height * 0.8))
    ),
    "cropped square": lambda im: im.crop((im.width - im.height, 0, im.width, im.height)),
    "cropped, mirrored, halved": lambda im: ImageOps.mirror(
        im.crop((int(im.width * 0.3), 0, im.width, int(im.height * 0.7)))
    ).resize((im.width // 2, im.height // 2)),
}


@pytest.mark.parametrize("change", CONTROLS)
@pytest.mark.parametrize("path", ASSETS, ids=lambda p: p.stem)
def test_a_planted_copy_is_found(path, change):
    with Image.open(path) as image:
        copy = planted(CONTROLS[change](image.convert("RGB")))
    assert path.stem in resembling(copy)


@pytest.mark.parametrize("path", ASSETS, ids=lambda p: p.stem)
def test_a_planted_collage_is_found(path):
    with Image.open(path) as image:
        canvas = Image.new("RGB", (image.width * 2, image.height * 2), "gray")
        canvas.paste(image, (image.width, 0))
    assert path.stem in resembling(planted(canvas))


def test_a_changed_source_is_refused():
    photo = {**PHOTOS[0], "sha256": "0" * 64}
    with pytest.raises(nano.DataError, match="sha256"):
        nano.source_bytes(photo, lambda member: b"not the picture")
    with pytest.raises(nano.DataError, match="no file"):
        nano.source_bytes(photo, {}.__getitem__)
