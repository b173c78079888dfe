"""What must not be published: secrets, paths and user names of the author's machine, names of the author's data."""

import getpass
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from PIL import Image

from maehub.errors import UsageError, first_names
from maehub.weights import read_header

_TEXTS = {".json", ".jsonl", ".md", ".txt", ".csv", ".sha256", ""}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}

_SECRETS = (
    ("a token of the Hub", re.compile(r"\bhf_[A-Za-z0-9]{16,}")),
    ("a token of GitHub", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})")),
    ("a key of AWS", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{20,}")),
    ("a token of Slack", re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")),
    ("a password in an address", re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@")),
)
# Two parts at least, since "/16" is a patch size; not inside an address.
_PATHS = (
    re.compile(r"(?:^|(?<=[\s\"'`=(,;<>\[{|]))(?:/[\w.@+~-]+){2,}", re.MULTILINE),
    re.compile(r"(?:^|(?<=[\s\"'`=(,;<>\[{|]))~/[\w.@+~-]+", re.MULTILINE),
    re.compile(r"\bfile://\S+"),
    re.compile(r"\b[A-Za-z]:\\\\?[\w.~-]+"),
)
_SHORTEST_NAME = 4  # letters; shorter names are words of the page by chance


def refuse_leaks(files: dict[str, Path], *, token: str | None = None, names: Collection[str] = ()) -> None:
    """Look through text, the headers of tensor files and what is written inside of pictures, by name in the repository.

    ``token`` is the one in use, in whatever form it is; ``names`` are of the author's files and folders. A UsageError
    says what must not leave and, but of secrets, enough of it to find it.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a process without a user entry
        user = ""
    leaks = []
    for name, path in files.items():
        text = "\n".join(_texts(path))
        found = [what for what, pattern in _SECRETS if pattern.search(text)]
        if token and token in text:
            found.append("the token in use")
        paths = [match[0] for pattern in _PATHS if (match := pattern.search(text))]
        found += [f"a path of a machine ({one:.80})" for one in paths]
        if (home := str(Path.home())) != "/" and home in text and not paths:
            found.append(f"the home folder ({home:.80})")
        known = [one for one in names if len(one) >= _SHORTEST_NAME and one in text]
        found += [f"a name of the data ({one:.80})" for one in known[:3]]
        if user and re.search(rf"(?<![\w-]){re.escape(user)}@[\w-]+", text):
            found.append(f"a user name and host ({user:.80})")
        leaks += [f"{name}: {what}" for what in found]
    if leaks:
        raise UsageError(
            "this must not be published; nothing was sent:\n" + first_names(leaks, 4, "\n") + "\n"
            "Take it out of the text that you give or of the folder's files, then push again"
        )


def _texts(path: Path) -> Iterator[str]:
    """Everything in a file that a person could read."""
    ending = path.suffix.lower()
    if ending == ".safetensors":
        header = read_header(path)
        yield json.dumps([header.metadata, list(header.tensors)])
    elif ending in _PICTURES:
        with Image.open(path) as picture:
            picture.load()
            yield from (str(value) for value in picture.info.values())
            yield from (str(value) for value in picture.getexif().values())
    elif ending in _TEXTS:
        yield path.read_text(encoding="utf-8", errors="replace")
    else:
        raise UsageError(f"{path.name} is no file that a model repository has; nothing was sent")
