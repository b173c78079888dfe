"""Publish a model: build the repository here, let every library that it names read it, show the plan, send one commit.

    source ─ model, provenance ─ repository in a temporary folder ─ gate ─ plan ─ one commit ─ what arrived

Nothing is sent before the plan was shown, nothing on the Hub is ever deleted, and nothing of the author's data leaves
the machine but pictures that the author names.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token

from maehub.dense import Detector, Segmenter, load_detector, load_segmenter
from maehub.errors import HubError, IntegrityError, UsageError, first_names
from maehub.files import byte_text, free_space_guard, is_detector, is_segmenter, own_folder, read_json, sha256_file
from maehub.models import Encoder, EncoderConfig, MaskedAutoencoder, Origin
from maehub.publishing.committing import Committed, commit
from maehub.publishing.gate import Verdict
from maehub.publishing.leaks import refuse_leaks
from maehub.publishing.licences import Licence, settle_licence
from maehub.publishing.provenance import Provenance, base_model_of, public_origin, read_run
from maehub.publishing.remote import Hub, LocalFile, Remote, check_conditions, check_name, look, same, verify_remote
from maehub.publishing.repository import build_repository, files_of
from maehub.weights import check_finite, find_model_folder, open_autoencoder, open_encoder, read_block


@dataclass(frozen=True)
class PlannedFile:
    """A file of the repository."""

    name: str
    size: int  # bytes
    sha256: str
    on_hub: str  # "new", "changed", "same"; empty where the Hub was not looked at


@dataclass(frozen=True)
class Plan:
    """What would be sent, and where to."""

    repo_id: str
    revision: str
    visibility: str
    files: tuple[PlannedFile, ...]
    licence: Licence
    base_model: str
    verified: dict[str, str]
    missing: dict[str, str]
    left_alone: tuple[str, ...]
    """Files there that are none of these; they stay."""
    notes: tuple[str, ...]

    def describe(self) -> str:
        """A table, and under it what one should know before saying yes."""
        width = max(len(file.name) for file in self.files)
        checked = ", ".join(f"{library} {version}" for library, version in self.verified.items())
        lines = [
            f"{self.repo_id} ({self.visibility}), branch {self.revision}: {len(self.files)} files, "
            f"{byte_text(sum(file.size for file in self.files))}",
            *(
                f"{file.name:<{width}}  {byte_text(file.size):>9}  {file.sha256[:12]}  {file.on_hub}".rstrip()
                for file in self.files
            ),
            f"licence {self.licence.identifier}, {self.licence.reason}",
            f"trained from {self.base_model}" if self.base_model else "",
            f"the same outputs in {checked}",
            *(f"not in {library}, since {reason}" for library, reason in self.missing.items()),
            f"there already and left alone: {first_names(self.left_alone, 5)}" if self.left_alone else "",
            *self.notes,
        ]
        return "\n".join(line for line in lines if line)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"licence": self.licence.identifier}


@dataclass(frozen=True)
class Pushed:
    """What `push` did."""

    plan: Plan
    committed: Committed | None
    """None where nothing was sent: a dry run, or the answer was no."""

    def describe(self) -> str:
        """Where it lies now, in a line or two."""
        done = self.committed
        if done is None:
            return "nothing was sent"
        if not done.uploaded:
            return f"{done.repo_id}@{done.commit}: all files were there already, nothing was sent"
        where = done.pull_request_url or done.url
        return f"{done.repo_id}@{done.commit}: {len(done.uploaded)} files sent and compared\n{where}"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        done = self.committed
        sent = None if done is None else done._asdict() | {"uploaded": list(done.uploaded)}
        return {"plan": self.plan.to_dict(), "committed": sent}


def push(
    source: str | Path | Encoder | MaskedAutoencoder,
    repo_id: str,
    *,
    licence: str | None = None,
    about: str = "",
    dataset: str = "",
    with_pictures: Sequence[str | Path] = (),
    revision: str = "main",
    parent: str | None = None,
    private: bool | None = None,
    pull_request: bool = False,
    dry_run: bool = False,
    confirm: Callable[[Plan], bool] | None = None,
    message: str = "",
    token: str | None = None,
    progress: bool = True,
) -> Pushed:
    """Publish a model on the Hub, so that maehub and every other library that has its network can load it.

    The repository is built in a temporary folder: weights, configuration, model card, figures of the photos that come
    with maehub, curves, numbers, recipe, checksums. Then it is read back, by each library in a process of its own, and
    what it computes is compared with the model. One commit is made on top of the head that was looked at, and what
    arrived is compared with what was sent.

    Args:
        source: a run folder, a model folder, or a model.
        repo_id: ``user/name``; made if it does not exist.
        licence: an identifier of the Hub, such as "apache-2.0"; None is that of the weights that it was trained from.
        about: Markdown for the card: what the data are, what the model is for.
        dataset: what the data are called, for the numbers in the card.
        with_pictures: pictures to publish beside the model; no other picture of the author's is.
        revision: branch to write.
        parent: the head that is expected there, or the first digits of its commit.
        private: who may see a repository that is made; None is the default of its owner.
        pull_request: propose the commit instead of making it.
        dry_run: stop before anything is sent. Needs no login; without a network the plan says so.
        confirm: shown the plan, also of a dry run; a no ends it. None is yes.
        message: of the commit.
        token: of the Hub; None is the login's.
        progress: show bars while files are sent.

    Raises:
        UsageError: no model, no licence or one that the base does not allow, or something that must not be published.
        IntegrityError: NaN in the weights, bytes that are not those recorded, or a library computes something else.
        HubError: no login, no right to write, the head moved, or no answer; the text says what is there.
    """
    check_name(repo_id)
    model, dense, folder = _open(source)
    _check_weights(model)
    encoder = model if isinstance(model, Encoder) else model.encoder
    provenance = read_run(folder, encoder.origin) if folder is not None else Provenance()
    origin = encoder.origin = public_origin(encoder.origin, provenance.weights)
    settled = settle_licence(licence, origin)
    remote: Remote | HubError
    try:
        hub = Hub(repo_id, token)
        remote = look(hub, revision=revision, pull_request=pull_request)
    except HubError as error:
        if not dry_run:
            raise
        remote = error
    else:
        check_conditions(hub, remote, parent=parent, private=private, pull_request=pull_request)
    kind = "a masked autoencoder"
    if isinstance(model, Encoder):
        kind = f"a classifier of {model.config.classes} classes" if model.config.classes else "an encoder"
        kind = f"an encoder that predicts {model.config.classes} numbers" if model.config.numeric else kind
    if dense is not None:
        kind = f"a {type(dense).__name__.lower()} of {len(dense.config.classes.names)} classes"
    needed = 2 * sum(value.numel() * 4 for value in (dense or model).state_dict().values())
    with own_folder(Path(tempfile.gettempdir(), "maehub-push"), 0o700) as staging:
        free_space_guard(staging, needed)
        verdict = build_repository(staging, model, repo_id, settled, provenance, about, dataset, with_pictures, dense)
        paths = files_of(staging)
        refuse_leaks(paths, token=token or get_token(), names=provenance.names)
        files = {name: LocalFile(path, path.stat().st_size, sha256_file(path)) for name, path in paths.items()}
        plan = _plan(repo_id, remote, files, settled, origin, verdict, private, revision, pull_request)
        agreed = confirm is None or confirm(plan)
        if dry_run or isinstance(remote, HubError) or not agreed:
            return Pushed(plan, None)
        made = commit(
            hub,
            files,
            remote=remote,
            private=private,
            pull_request=pull_request,
            message=message or f"maehub push: {kind}",
            progress=progress,
        )
        verify_remote(hub, made.commit, files)
    return Pushed(plan, made)


def _open(
    source: str | Path | Encoder | MaskedAutoencoder,
) -> tuple[Encoder | MaskedAutoencoder, Segmenter | Detector | None, Path | None]:
    """The model on the CPU, in eval mode, the segmenter or detector that it is the encoder of, and the folder that it
    came from."""
    if isinstance(source, Encoder | MaskedAutoencoder):
        return copy.deepcopy(source).cpu().float().eval(), None, None
    folder = Path(source)
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {source}: push takes a run folder or a model folder, or in Python a model; "
            "`maehub convert FILE -o FOLDER` makes a model folder of a file of weights"
        )
    home = find_model_folder(folder)
    if not (home / "config.json").is_file():
        raise UsageError(f"{home} has no config.json, so it is no run folder and no model folder; nothing was sent")
    values = read_json(home / "config.json")
    if "maehub" not in values:
        raise UsageError(
            f"{home} is no model folder of maehub: `maehub convert MODEL -o FOLDER` makes one of what can be read; "
            "networks that maehub does not have are published by the library that made them"
        )
    block = read_block(values["maehub"], str(home / "config.json"))
    for name, recorded in block.sha256.items():
        path = home / name
        if not path.is_file():
            raise IntegrityError(f"{home} lacks {name}, which its config.json names; nothing was sent")
        if sha256_file(path) != recorded:
            raise IntegrityError(
                f"{path} is not the file that was saved: its sha256 differs from the one in config.json. Nothing was "
                "sent; export the model again"
            )
    model: Encoder | MaskedAutoencoder
    model = open_encoder(home) if isinstance(block.config, EncoderConfig) else open_autoencoder(home)
    dense: Segmenter | Detector | None = None
    if is_segmenter(folder) or is_detector(folder):
        dense = load_segmenter(folder) if is_segmenter(folder) else load_detector(folder)
    return model.float().eval(), dense, folder


def _check_weights(model: Encoder | MaskedAutoencoder) -> None:
    """Refuse weights, and a forward of them, that are not finite."""
    check_finite(model.state_dict(), "the weights to publish")
    encoder = model if isinstance(model, Encoder) else model.encoder
    images = torch.zeros(1, encoder.config.channels, *encoder.config.size)
    with torch.inference_mode():
        output = model(images) if isinstance(model, Encoder) else model(images).prediction
    if not output.isfinite().all():
        raise IntegrityError("the model computes NaN or infinity of a grey picture; nothing was sent")


def _plan(
    repo_id: str,
    remote: Remote | HubError,
    files: dict[str, LocalFile],
    licence: Licence,
    origin: Origin | None,
    verdict: Verdict,
    private: bool | None,
    revision: str,
    pull_request: bool,
) -> Plan:
    """What would be sent; ``remote`` is the error of a dry run that could not look at the Hub."""
    there = {} if isinstance(remote, HubError) else remote.files
    visibility = {True: "private", False: "public", None: "as its owner's settings say"}[private]
    if isinstance(remote, HubError):
        notes = [f"the Hub was not looked at: {str(remote).splitlines()[0]}"]
    else:
        notes = []
        visibility = f"new, {visibility}" if not remote.exists else "private" if remote.private else "public"
        if remote.licence and remote.licence != licence.identifier:
            notes.append(f"NOTE: the card there says licence {remote.licence}, this one says {licence.identifier}")
        if pull_request:
            notes.append("proposed as a pull request")
        if remote.commit:
            notes.append(f"on top of {remote.commit[:12]}")
    planned = []
    for name, file in files.items():
        on_hub = "new" if name not in there else "same" if same(file, there[name]) else "changed"
        planned.append(PlannedFile(name, file.size, file.sha256, "" if isinstance(remote, HubError) else on_hub))
    return Plan(
        repo_id,
        revision,
        visibility,
        tuple(planned),
        licence,
        base_model_of(origin) or origin.name if origin else "",
        verdict.verified,
        verdict.missing,
        tuple(sorted(set(there) - set(files))),
        tuple(notes),
    )
