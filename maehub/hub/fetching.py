"""From a catalog name, a Hub id, a folder or a file to verified files on this machine. Imports no torch.

Only safetensors are taken from the Hub. Nothing here reads a tensor or runs code that came with a model: config.json is
read as plain values, to find the weights beside it.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from maehub.errors import HubError, IntegrityError, UsageError, first_names, log
from maehub.files import read_json
from maehub.hub.cache import LOCK_TIMEOUT, CachePaths, PathLike, cache_paths
from maehub.hub.catalog import ModelInfo, Source, Want, check_supported, is_model, model_info, no_model, resolve
from maehub.hub.client import NoFile, NotThere, check_filename, list_hub_files
from maehub.hub.deadlines import Unreachable
from maehub.hub.downloading import COMMIT, Fetched, cached_path, from_here, from_there, not_here
from maehub.hub.verification import Differs, check, expected_bytes, expected_here, stated_hash

_REPO = re.compile(r"[A-Za-z0-9]([\w.-]*\w)?/[A-Za-z0-9]([\w.-]*\w)?", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
PICKLE_ENDINGS = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


class Verified(NamedTuple):
    """One file that was hashed anew."""

    path: Path
    sha256: str
    compared_with: str  # "the catalog", "the Hub", "the first download", or "nothing"


@dataclass(frozen=True)
class Located:
    """Files of a model on this machine."""

    name: str
    path: Path  # a folder, or a file of weights
    info: ModelInfo | None = None  # the catalog's row
    fetched: Fetched | None = None  # where it was downloaded from


def fetch(info: ModelInfo, paths: CachePaths, *, revision: str | None = None, look_here: bool = True) -> Fetched:
    """The file of a catalog row: from the cache if it is there, else from the first source that has it.

    At another ``revision`` (branch, tag or commit) of the row's Hub repository nothing is pinned. Unless it is to
    ``look_here`` first, a Hub is asked even for what is in the cache.

    A HubError says that no source has it or answers, an IntegrityError that the bytes are not the expected ones twice,
    a CheckpointError that the disk is full or the cache may not be written.
    """
    sources = list(info.sources)
    if revision is not None:
        _check_revision(revision)
        bare = [replace(one, revision=revision, commit="", sha256="") for one in sources if one.kind == "hub"]
        if not bare:
            raise UsageError(
                f"{info.name} does not come from the Hub, so it has no revision {revision!r}; leave it out"
            )
        sources = list(dict.fromkeys(bare))
    for source in sources if look_here or paths.offline else []:
        if cached := from_here(info.name, source, paths):
            return _told(replace(cached, licence=info.licence))
    if paths.offline:
        raise not_here(info.name, sources[0], paths)
    missing: list[NotThere] = []
    for source in sources:
        try:
            return _told(replace(from_there(info.name, source, paths), licence=info.licence))
        except NotThere as error:
            missing.append(error)
            log.info("%s: %s", info.name, str(error).splitlines()[0])
    if len(missing) == 1:
        raise missing[0]
    lines = [str(error).splitlines()[0] for error in missing]
    raise HubError(f"no source of {info.name} has it any more:\n" + "\n".join(lines)) from missing[0]


def fetch_repo(repo_id: str, paths: CachePaths, *, want: Want = "encoder", revision: str | None = None) -> Fetched:
    """Weights and config.json of any repository on the Hub, ``user/repo`` or ``user/repo@revision``, at one commit.

    Asked for an encoder, the weights with fused qkv that config.json names for timm are taken, if it does and they are
    there; else ``model.safetensors``. A branch is looked up on the Hub at each call, and taken from the cache, with a
    warning, where the Hub does not answer.

    Errors are those of `fetch`; IntegrityError also for a repository without safetensors, or with names that lead out
    of its folder.
    """
    repo, revision = _split(repo_id, revision)
    config, pretrained = None, None
    with contextlib.suppress(NoFile):
        config = _repo_file(repo_id, Source("hub", "config.json", "safetensors", repo, revision), paths)
    if config:
        try:  # whatever it asks to import or run is ignored: it is only read
            pretrained = read_json(config.path).get("pretrained_cfg")
        except IntegrityError as error:
            raise IntegrityError(f"config.json of {repo} cannot be read: {error}\nnothing of it was loaded") from error
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    candidates, other = ["model.safetensors"], pretrained.get("hf_hub_filename")
    if want == "encoder" and isinstance(other, str):
        other = re.sub(r"\.bin$", ".safetensors", other)  # timm, too, looks for the safetensors file beside it
        if other.endswith(".safetensors"):
            check_filename(other, repo)
            candidates = list(dict.fromkeys([other, *candidates]))  # its fused qkv needs no renaming
    at = config.revision if config else revision
    weights = _first_file(repo_id, [Source("hub", one, "safetensors", repo, at) for one in candidates], paths)
    licence = pretrained.get("license")
    licence = licence if isinstance(licence, str) else ""
    return _told(replace(weights, licence=licence, config=config.path if config else None))


def fetch_folder(repo_id: str, also: Sequence[str]) -> Path:
    """The folder of a repository's encoder, config.json and the files ``also``, all of one commit; see `fetch_repo`."""
    paths = cache_paths()
    fetched = fetch_repo(repo_id, paths)
    repo, _ = _split(repo_id, None)
    found = [_repo_file(repo_id, Source("hub", one, "safetensors", repo, fetched.revision), paths) for one in also]
    return found[0].path.parent


def is_hub_id(source: PathLike) -> bool:
    """Whether a source that is no file or folder here is a name of the Hub, ``user/repo[@revision]``."""
    return isinstance(source, str) and bool(_HUB_ID.fullmatch(source)) and not os.path.exists(source)


def locate(
    source: PathLike | Located,
    want: Want,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    verify: bool = False,
) -> Located:
    """Find a model, downloading and verifying it where it is not on this machine.

    ``source`` is a catalog name, whose meaning if it is short follows from ``want``, a Hub id ``user/repo[@revision]``,
    a model or run folder, or a ``.safetensors`` file; or what this function returned before. A `Path`, or a string such
    as ``./vit-b``, is never a name. Of ``revision`` see `fetch`, of the others `cache_paths`.
    """
    if isinstance(source, Located):
        return source
    name, path = os.fspath(source), Path(os.path.expanduser(source))
    if isinstance(source, str) and is_model(name):
        info = resolve(name, want)
        fetched = fetch(info, cache_paths(cache_dir, offline, verify), revision=revision)
        return Located(info.name, fetched.path, info, fetched)
    if path.suffix in PICKLE_ENDINGS and os.path.isfile(path):
        raise IntegrityError(
            f"{path} is a pickle, which can run code when it is opened, so it is not loaded. Nothing was read.\n"
            f"Convert it once, which does not run code: maehub convert {quote(str(path))} -o FOLDER"
        )
    if os.path.exists(path):  # unlike the method of a path, False for a name that is too long
        return Located(name, path)
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and path.suffix not in (".safetensors", *PICKLE_ENDINGS):
        fetched = fetch_repo(name, cache_paths(cache_dir, offline, verify), want=want, revision=revision)
        return Located(name, fetched.path, fetched=fetched)
    if not isinstance(source, str) or path.suffix in (".safetensors", *PICKLE_ENDINGS) or "/" in name:
        raise UsageError(f"there is no file or folder {name}, and it is no Hub id, which looks like user/repo")
    raise no_model(name)


def download(
    name: str, *, revision: str | None = None, cache_dir: PathLike | None = None, lock_timeout: float = LOCK_TIMEOUT
) -> Path:
    """Bring a model's files to this machine and verify them, so that it loads without a network.

    Args:
        name: a catalog name, or a Hub id ``user/repo[@revision]``.
        revision: branch, tag or commit on the Hub, instead of the catalog's.
        cache_dir: the Hub's cache folder; None is its own ($HF_HOME, $HF_HUB_CACHE).
        lock_timeout: seconds to wait for another process that downloads the same file, before it is downloaded beside
            that one.

    Returns:
        The path of the weights; of a repository with several layouts, of the one that `maehub.load` reads.

    Raises:
        UsageError: no such name, or a row whose file is not fetched by itself.
    """
    paths = cache_paths(cache_dir, lock_timeout=lock_timeout)
    if "/" not in name:
        check_supported(info := model_info(name))
        return fetch(info, paths, revision=revision, look_here=False).path
    encoder = fetch_repo(name, paths, revision=revision)
    if encoder.source.filename != "model.safetensors":
        fetch_repo(name, paths, want="autoencoder", revision=revision)
    return encoder.path


def verify(source: PathLike, *, cache_dir: PathLike | None = None) -> list[Verified]:
    """Hash files again and compare.

    Args:
        source: a catalog name or Hub id that was downloaded, or a file or folder.
        cache_dir: as in `download`.

    Raises:
        HubError: nothing of it is on this machine.
        IntegrityError: some files are not what they should be; the text names them. They are left as they are.
    """
    paths = cache_paths(cache_dir, offline=True, verify=True)
    text, path = os.fspath(source), Path(source)
    if path.exists() or not is_model(text):
        if path.exists():
            below = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        else:
            config = cached_path(Source("hub", "config.json", "safetensors", *_split(text, None)), paths)
            below = sorted(path for path in config.parent.rglob("*") if path.is_file()) if config else []
        files = [(path, expected_bytes(None, stated_hash(path))) for path in below]
    else:
        rows = [(cached_path(one, paths), one) for one in model_info(text).sources]
        files = [(path, expected_here(one, path, paths.own)) for path, one in rows if path]
    if not files:
        raise HubError(f"nothing of {text} is on this machine, so there is nothing to verify; `maehub download {text}`")
    checked, wrong = [], []
    for path, expected in files:
        try:
            checked.append(Verified(path, check(path, expected, paths.own, paths.verify), expected.by))
        except Differs as difference:
            wrong.append(f"{path}: {difference}")
    if wrong:
        raise IntegrityError(first_names(wrong, 3, "\n") + "\ndelete what differs; it is downloaded again when needed")
    return checked


def _told(files: Fetched) -> Fetched:
    source = files.source
    at = f"{source.repo}@{files.revision[:7]} {source.filename}" if source.repo else source.url or str(files.path)
    log.info("%s: %s%s", files.name, at, f", licence {files.licence}" if files.licence else "")
    return files


def _repo_file(name: str, source: Source, paths: CachePaths) -> Fetched:
    """A file of a repository: a commit from the cache, a branch from the Hub, and from the cache if that is silent."""
    if (paths.offline or COMMIT.fullmatch(source.revision)) and (cached := from_here(name, source, paths)):
        return cached
    if paths.offline:
        raise NoFile(str(not_here(name, source, paths)))
    try:
        return from_there(name, source, paths)
    except Unreachable as error:
        cached = from_here(name, source, paths)
        if not cached:
            raise
        first = str(error).splitlines()[0]
        log.warning("%s; taking the copy on this machine, commit %s", first, cached.revision[:12])
        return cached


def _first_file(name: str, sources: list[Source], paths: CachePaths) -> Fetched:
    """The first of several files of one repository."""
    for source in sources:
        if COMMIT.fullmatch(source.revision) and (cached := from_here(name, source, paths)):
            return cached
    repo, revision = sources[0].repo, sources[0].revision
    names = [] if paths.offline else list_hub_files(repo, revision)
    for source in sources:
        if not names or source.filename in names:
            with contextlib.suppress(NoFile):
                return _repo_file(name, source, paths)
    if paths.offline:
        raise not_here(name, sources[0], paths)
    if any(one.endswith(".safetensors.index.json") for one in names):
        raise HubError(f"the weights of {repo} are cut into several files, which maehub does not read yet")
    if pickles := [one for one in names if one.endswith(PICKLE_ENDINGS)]:
        raise IntegrityError(
            f"maehub loads only safetensors from the Hub, and {repo} has {', '.join(sorted(pickles)[:3])}: pickles can "
            "run code when they are read, so nothing was downloaded\n"
            "ask its owner for model.safetensors, or download the file yourself and run `maehub convert FILE -o FOLDER`"
        )
    asked = " or ".join(source.filename for source in sources)
    raise HubError(f"{repo}@{revision[:12]} has no {asked}\nits files: {first_names(names, 12) or 'not to be had'}")


def _split(repo_id: str, revision: str | None) -> tuple[str, str]:
    """``user/repo[@revision]`` and an argument to repository and revision."""
    repo, _, own = repo_id.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 96:
        raise UsageError(f"{repo_id!r} is not a Hub id; one looks like user/repo or user/repo@revision")
    if own and revision and own != revision:
        raise UsageError(f"{repo_id!r} and revision={revision!r} name two revisions; give one")
    return repo, _check_revision(own or revision or "main")


def _check_revision(revision: str) -> str:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision) or ".." in revision:
        raise UsageError(f"revision={revision!r} is not a branch, tag, commit or reference such as refs/pr/1")
    return revision
