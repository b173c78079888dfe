"""A small Hub on loopback: what the real one answers to its client, with faults on demand; its writing: `hub_writes`.

Two servers: the Hub itself, and the store that it redirects large files to, as the real one does. Files
below `LARGE` bytes that are not weights are stored in git (ETag: git's sha1) and sent by the Hub; the others are
stored by content (X-Linked-Etag: sha256, X-Linked-Size) and answered with 302 to a signed address at the store.

    with HubServer() as hub:
        commit = hub.add_repo("user/repo", {"config.json": b"{}", "model.safetensors": Path("x.safetensors")})
        hub.fault("user/repo/model.safetensors", "cut", after=700_000, times=1)
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_writes import LARGE, SIGNATURE, WEIGHTS, Token, Writing, card_facts

from maehub.hub import fetching
from maehub.hub.cache import cache_paths


def fetch(info, *, revision=None, look_here=True, **where):
    """`maehub.hub.fetching.fetch` with the caches that ``where`` says."""
    return fetching.fetch(info, cache_paths(**where), revision=revision, look_here=look_here)


def fetch_repo(repo_id, *, want="encoder", revision=None, **where):
    return fetching.fetch_repo(repo_id, cache_paths(**where), want=want, revision=revision)


Mode = Literal["cut", "corrupt", "short", "html", "status", "hang", "redirect", "commit", "norange", "slow", "drip"]


@dataclass
class Request:
    """One line of the log; header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    store: bool  # asked at the store, not at the Hub


@dataclass
class Fault:
    """What goes wrong with paths that match ``pattern``, for the first ``times`` requests of ``methods``."""

    pattern: str
    mode: Mode
    times: float = float("inf")
    methods: tuple[str, ...] = ("GET",)
    after: int = 0  # cut, slow: bytes sent before; short: bytes left out
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    location: str = ""
    seconds: float = 60.0
    done: bool = False  # of a request that writes: it has its effect before it goes wrong


@dataclass
class Content:
    """Bytes, in memory or in a file, and the hashes that the Hub states for them."""

    source: bytes | Path
    weights: bool

    def read(self, start: int = 0, count: int = -1) -> bytes:
        if isinstance(self.source, bytes):
            return self.source[start : start + count if count >= 0 else None]
        with self.source.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def __post_init__(self) -> None:
        self.size = len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size
        self.large = self.weights or self.size >= LARGE
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for start in range(0, self.size, 1 << 20):
            chunk = self.read(start, 1 << 20)
            sha256.update(chunk)
            git.update(chunk)
        self.sha256, self.git = sha256.hexdigest(), git.hexdigest()


@dataclass
class Repo:
    """Commits and what points to them."""

    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "main", a tag, "refs/pr/1"
    gated: bool = False
    private: bool = False
    tags: set[str] = field(default_factory=set)  # those of ``refs`` that are no branches
    messages: dict[str, str] = field(default_factory=dict)  # commit → its first line, of those that were pushed

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class HubServer:
    """The Hub and its store; see the module."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.pages: dict[str, Content] = {}  # plain files at plain addresses, for what does not come from the Hub
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.tokens: dict[str, Token] = {}  # those that may write; for reading, any will do
        self.objects: dict[str, bytes] = {}  # what was uploaded to the store, by sha256
        self.parts: dict[tuple[str, str], bytes] = {}
        self.part_size: float = float("inf")  # larger uploads are asked for in parts
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.folder = tempfile.TemporaryDirectory(prefix="hub-server-")
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, store)) for store in (False, True)]
        # two names of one host: clients tell hosts apart by name, and must not send tokens from one to the other
        self.endpoint, self.store = (
            f"http://{name}:{server.server_port}"
            for name, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self.folder.cleanup()

    def add_repo(self, repo_id: str, files: dict[str, bytes | str | Path], revision: str = "main") -> str:
        """A commit with exactly these files, and ``revision`` pointing to it: its 40 digits."""
        return self.add_commit(repo_id, self.contents(files), revision)

    def add_commit(self, repo_id: str, contents: dict[str, Content], revision: str) -> str:
        repo = self.repos.setdefault(repo_id, Repo())
        listing = json.dumps([repo_id, len(repo.commits), {name: one.sha256 for name, one in contents.items()}])
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repo.commits[commit] = contents
        repo.refs[revision] = commit
        return commit

    @staticmethod
    def contents(files: dict[str, bytes | str | Path]) -> dict[str, Content]:
        sources = {name: one.encode() if isinstance(one, str) else one for name, one in files.items()}
        return {name: Content(one, name.endswith(WEIGHTS)) for name, one in sources.items()}

    def add_page(self, path: str, source: bytes | Path) -> str:
        """A file at a plain address of this server: the address."""
        self.pages[path] = Content(source, weights=True)
        return self.endpoint + path

    def fault(self, pattern: str, mode: Mode, **options: Any) -> Fault:
        """Let requests go wrong; ``pattern`` is matched with ``repo/file``, an API path or a page's path."""
        fault = Fault(pattern, mode, **options)
        self.faults.append(fault)
        return fault

    def env(self) -> dict[str, str]:
        """Environment of a child process whose client talks to this Hub, with caches of its own."""
        return {
            **{name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": f"{self.folder.name}/hf",
            "HF_HUB_CACHE": f"{self.folder.name}/hf/hub",
            "MAEHUB_CACHE": f"{self.folder.name}/maehub",
            "HF_HUB_DISABLE_XET": "1",  # large files are sent as Git LFS does
        }

    def asked(self, method: str = "", contains: str = "", store: bool | None = None) -> list[Request]:
        """Requests so far that match."""
        return [
            one
            for one in list(self.log)
            if method in ("", one.method) and contains in one.path and store in (None, one.store)
        ]

    def take_fault(self, method: str, key: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if method in fault.methods and fault.times > 0 and fnmatch.fnmatchcase(key, fault.pattern):
                    fault.times -= 1
                    return fault
        return None


def _handler(hub: HubServer, store: bool) -> type[BaseHTTPRequestHandler]:
    """The handler of one of the two servers."""

    class Handler(Writing, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.log.append(Request(self.command, self.path, headers, store))
            with contextlib.suppress(ConnectionError):
                if self.command in ("POST", "PUT"):
                    self.write_path()
                elif store:
                    self.store_file()
                else:
                    self.hub_path()

        # -- the Hub

        def hub_path(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path in hub.pages:
                self.page(path)
            elif path == "/api/whoami-v2":
                self.whoami()
            elif path.startswith("/api/models/"):
                self.api(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                # the revision may hold slashes, which the client quotes: split before unquoting
                raw_repo, _, rest = urlsplit(self.path).path.partition("/resolve/")
                revision, _, name = rest.partition("/")
                self.resolve(unquote(raw_repo).strip("/"), unquote(revision), unquote(name))
            else:
                self.fail(404, "", "not found")

        def page(self, path: str) -> None:
            fault = hub.take_fault(self.command, path)
            if not self.faulty(fault):
                self.body(hub.pages[path], fault, {})

        def resolve(self, repo_id: str, revision: str, name: str) -> None:
            fault = hub.take_fault(self.command, f"{repo_id}/{name}")
            if fault and fault.mode in ("status", "hang", "redirect") and self.faulty(fault):
                return
            repo, commit = self.open_repo(repo_id, revision)
            if repo is None or commit is None:
                return
            content = repo.commits[commit].get(name)
            stated = {"X-Repo-Commit": "f" * 40 if fault and fault.mode == "commit" else commit}
            if content is None:
                self.fail(404, "EntryNotFound", "Entry not found", stated)
            elif content.large:
                stated |= {"X-Linked-Etag": f'"{content.sha256}"', "X-Linked-Size": str(content.size)}
                where = f"{hub.store}/{quote(repo_id)}/{commit}/{quote(name)}?{SIGNATURE}"
                self.send(302, {**stated, "Location": where})
            elif not self.faulty(fault):
                self.body(content, fault, {**stated, "ETag": f'"{content.git}"'})

        def open_repo(self, repo_id: str, revision: str) -> tuple[Repo | None, str | None]:
            repo, known = hub.repos.get(repo_id), "authorization" in {name.lower() for name in self.headers}
            if repo is None or not self.sees(repo_id, repo):
                self.fail(404 if known else 401, "RepoNotFound", "Repository not found")
            elif repo.gated:
                self.fail(403 if known else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
            elif (commit := repo.resolve(revision)) is None:
                self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return repo, commit
            return None, None

        def api(self, path: str) -> None:
            if self.faulty(hub.take_fault(self.command, f"api/{path}")):
                return
            owner, _, rest = path.partition("/")
            name, _, rest = rest.partition("/")
            raw = urlsplit(self.path).path.removeprefix("/api/models/").split("/", 2)
            kind, _, raw_revision = (raw[2] if len(raw) > 2 else "").partition("/")
            # of a tree, a path may follow; the client quotes slashes inside the revision
            revision = unquote(raw_revision.partition("/")[0] or "main")
            revision = "main" if kind in ("refs", "auth-check") else revision
            repo, commit = self.open_repo(f"{owner}/{name}", revision)
            if repo is None or commit is None:
                return
            query = parse_qs(urlsplit(self.path).query)
            if kind in ("", "revision"):
                self.json(self.info(f"{owner}/{name}", repo, commit, blobs="blobs" in query))
            elif kind == "tree":
                self.json([self.entry(path, one) for path, one in repo.commits[commit].items()])
            elif kind == "refs":
                refs = {key: [] for key in ("branches", "tags", "converts", "pullRequests")}
                for ref, target in repo.refs.items():
                    group = "tags" if ref in repo.tags else "branches"
                    group = "pullRequests" if ref.startswith("refs/pr/") else group
                    full = "" if group == "pullRequests" else "refs/heads/"
                    refs[group].append({"name": ref, "ref": full + ref, "targetCommit": target})
                self.json(refs)
            elif kind == "auth-check":
                self.may_write(f"{owner}/{name}")
            else:
                self.fail(404, "", "not found")

        @staticmethod
        def info(repo_id: str, repo: Repo, commit: str, blobs: bool) -> dict[str, Any]:
            siblings = []
            for path, one in repo.commits[commit].items():
                sibling: dict[str, Any] = {"rfilename": path}
                if blobs:
                    sibling |= {"size": one.size, "blobId": one.git}
                    sibling |= (
                        {"lfs": {"sha256": one.sha256, "size": one.size, "pointerSize": 130}} if one.large else {}
                    )
                siblings.append(sibling)
            facts = {"private": repo.private, "gated": repo.gated, "disabled": False, "tags": [], "siblings": siblings}
            facts |= card_facts(repo.commits[commit])
            return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, **facts}

        @staticmethod
        def entry(path: str, one: Content) -> dict[str, Any]:
            lfs = {"lfs": {"oid": one.sha256, "size": one.size, "pointerSize": 130}} if one.large else {}
            return {"type": "file", "oid": one.git, "size": one.size, "path": path, **lfs}

        # -- the store

        def store_file(self) -> None:
            owner, name, commit, file = unquote(urlsplit(self.path).path).strip("/").split("/", 3)
            content = hub.repos[f"{owner}/{name}"].commits[commit][file]
            fault = hub.take_fault(self.command, f"{owner}/{name}/{file}")
            if not self.faulty(fault):
                self.body(content, fault, {"ETag": f'"{content.sha256}"'})

        # -- answers

        def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: object) -> None:
            self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

        def fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
            error = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self.send(status, {**error, **(headers or {})}, json.dumps({"error": message}).encode())

        def faulty(self, fault: Fault | None) -> bool:
            """Answer with a fault that replaces the whole answer."""
            if fault is None:
                return False
            if fault.mode == "status":
                self.send(fault.status, fault.headers, b"{}")
            elif fault.mode == "hang":
                hub.stopping.wait(fault.seconds)
                self.close_connection = True
            elif fault.mode == "redirect":
                self.send(302, {**fault.headers, "Location": fault.location})
            elif fault.mode == "html":
                self.send(200, {"Content-Type": "text/html"}, b"<html>please sign in</html>")
            return fault.mode in ("status", "hang", "redirect", "html")

        def body(self, content: Content, fault: Fault | None, headers: dict[str, str]) -> None:
            """A file, or the part of it that is asked for, with the fault that its bytes have."""
            mode = fault.mode if fault else ""
            start, end = self.wanted_range(content.size) if mode != "norange" else (0, content.size)
            part = (
                {"Content-Range": f"bytes {start}-{end - 1}/{content.size}"}
                if (start, end) != (0, content.size)
                else {}
            )
            sent = content.read(start, end - start) if self.command != "HEAD" else b""
            if fault and mode == "corrupt":
                sent = bytes(byte ^ 0x55 for byte in sent[:16]) + sent[16:]
            if fault and mode == "short":
                sent = sent[: -fault.after]
            length = str(len(sent) if self.command != "HEAD" else end - start)
            self.send_response(206 if part else 200)
            for key, value in {**headers, **part, "Accept-Ranges": "bytes", "Content-Length": length}.items():
                self.send_header(key, value)
            self.end_headers()
            if fault and mode == "cut":
                self.wfile.write(sent[: fault.after])
                self.wfile.flush()
                self.close_connection = True
            elif fault and mode == "slow":
                self.wfile.write(sent[: fault.after])
                self.wfile.flush()
                hub.stopping.wait(fault.seconds)
                self.wfile.write(sent[fault.after :])
            elif fault and mode == "drip":
                for start in range(0, len(sent), 100_000):
                    self.wfile.write(sent[start : start + 100_000])
                    self.wfile.flush()
                    hub.stopping.wait(fault.seconds)
            else:
                self.wfile.write(sent)

        def wanted_range(self, size: int) -> tuple[int, int]:
            text = self.headers.get("Range", "").removeprefix("bytes=")
            first, _, last = text.partition("-")
            return int(first or 0), min(size, int(last) + 1) if last else size

    Handler.hub = hub
    return Handler
