"""The writing side of the Hub on loopback: who a token belongs to, new repositories, uploads, commits, pull requests.

`hub_server` mixes it into its handler. The answers follow what the real client sends and reads. A fault whose ``done``
is set lets the request have its effect first, so that only the answer is wrong or lost.

Keys for faults: ``api/whoami-v2``, ``api/repos/create``, ``api/validate-yaml``, ``api/user/repo/auth-check/write``,
``api/user/repo/preupload/main``, ``user/repo.git/info/lfs/objects/batch`` (or ``…/verify``), ``lfs/SHA256`` (the
store; of a part ``lfs/SHA256/1``), ``lfs/SHA256/complete``, ``api/user/repo/commit/main``.
"""

import base64
import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import Repo

LARGE = 1_000_000  # bytes; from there on, and for weights of any size, files are kept by content in the store
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".h5")
SIGNATURE = "X-Amz-Signature=5ec7e7"  # marks the signed part of addresses; no text may show it
PARENT_MOVED = "A commit has happened since. Please refresh and try again."


@dataclass
class Token:
    """Whose it is and what it may do; ``repos`` are the only ones that a fine-grained token may write to."""

    user: str = "user"
    role: str = "write"  # "read", "write", "fineGrained"
    orgs: tuple[str, ...] = ()
    repos: tuple[str, ...] = ()
    name: str = "laptop"

    def identity(self) -> dict[str, Any]:
        access: dict[str, Any] = {"displayName": self.name, "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            entities = [{"type": "model" if "/" in name else "user", "name": name} for name in self.repos]
            scoped = [{"entity": one, "permissions": ["repo.content.read", "repo.write"]} for one in entities]
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.orgs]
        return {
            **{"type": "user", "id": "1", "name": self.user, "fullname": self.user, "orgs": orgs},
            "auth": {"type": "access_token", "accessToken": access},
        }

    def sees(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.user, *self.orgs)

    def writes(self, repo_id: str) -> bool:
        if self.role == "fineGrained":
            return repo_id in self.repos or repo_id.partition("/")[0] in self.repos
        return self.role == "write" and self.sees(repo_id)


class Writing:
    """What a handler answers to POST and PUT; `hub_server._handler` gives it ``hub`` and the plain answers."""

    hub: Any

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def token(self) -> Token | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def sees(self, repo_id: str, repo: "Repo") -> bool:
        token = self.token()
        return not repo.private or (token is not None and token.sees(repo_id))

    def whoami(self) -> None:
        if self.faulty(self.hub.take_fault("GET", "api/whoami-v2")):
            return
        token = self.token()
        if token is None:
            self.fail(401, "", "Invalid credentials in Authorization header")
        else:
            self.json(token.identity())

    def may_write(self, repo_id: str) -> None:
        token = self.token()
        if token is None or not token.writes(repo_id):
            self.fail(403, "", "You have no permission to write to this repository")
        else:
            self.send(200, {"Content-Type": "text/plain"}, b"OK")

    def write_path(self) -> None:
        """Answer to one request that writes."""
        path = unquote(urlsplit(self.path).path)
        key = path.strip("/").replace("api/models/", "api/", 1)
        fault = self.hub.take_fault(self.command, key)
        if fault and fault.mode == "cut" and not fault.done:
            self.rfile.read(min(fault.after, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True  # with the rest unread, which resets the connection
            return
        body = self.take_body()
        if fault is None or fault.done:
            answer = self.carried_out(path, body)
            if fault is None:
                self.send(*answer)
        if fault is not None and not self.faulty(fault):
            self.close_connection = True

    def take_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def carried_out(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Do what is asked: status, headers and body of the answer."""
        with self.hub.lock:
            if path.startswith("/lfs/"):
                return self.stored(path.removeprefix("/lfs/"), body)
            if path == "/api/validate-yaml":
                return self.checked_card(json.loads(body))
            if path == "/api/repos/create":
                return self.created(json.loads(body))
            if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/(batch|verify)", path):
                return self.batched(found[1], json.loads(body)) if found[2] == "batch" else self.held(json.loads(body))
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/paths-info/(.+)", path):
                return self.listed(found[1], found[2], parse_qs(body.decode())["paths"])
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|branch)/(.+)", path):
                return self.changed(found[1], found[2], found[3], body)
        return _told(404, "not found")

    def listed(self, repo_id: str, revision: str, names: list[str]) -> tuple[int, dict[str, str], bytes]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or not self.sees(repo_id, repo):
            return _told(404, "Repository not found", "RepoNotFound")
        if (commit := repo.resolve(revision)) is None:
            return _told(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return _json([self.entry(name, one) for name, one in repo.commits[commit].items() if name in names])

    def changed(self, repo_id: str, kind: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        repo, token = self.hub.repos.get(repo_id), self.token()
        proposed = "create_pr" in parse_qs(urlsplit(self.path).query)
        if token is None:
            return _told(401, "Invalid username or password.")
        if repo is None or not self.sees(repo_id, repo):
            return _told(404, "Repository not found", "RepoNotFound")
        if token.role == "read" or not (proposed or token.writes(repo_id)):
            return _told(403, f"you don't have the rights to write to {repo_id}")
        if kind == "branch":
            if revision in repo.refs:
                return _told(409, "Reference already exists")
            repo.refs[revision] = repo.resolve(json.loads(body).get("startingPoint", "main"))
            return _json({})
        if repo.resolve(revision) is None:
            return _told(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if kind == "preupload":
            return self.preuploaded(repo, revision, json.loads(body))
        return self.committed(repo_id, repo, revision, body, proposed)

    def preuploaded(self, repo: "Repo", revision: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        now = repo.commits[repo.resolve(revision)]
        ignored = now[".gitignore"].read().decode() if ".gitignore" in now else ""
        patterns = asked.get("gitIgnore", ignored).split()
        files = []
        for one in asked["files"]:
            old = now.get(one["path"])
            files.append(
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(WEIGHTS) or one["size"] >= LARGE else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(one["path"], pattern) for pattern in patterns),
                    "oid": (old.sha256 if old.large else old.git) if old else None,
                }
            )
        return _json({"files": files})

    def committed(
        self, repo_id: str, repo: "Repo", revision: str, body: bytes, proposed: bool
    ) -> tuple[int, dict[str, str], bytes]:
        head, *lines = [json.loads(line) for line in body.splitlines()]
        parent = head["value"].get("parentCommit")
        if parent and parent != repo.resolve(revision) and not proposed:
            return _told(412, PARENT_MOVED)
        added: dict[str, bytes] = {}
        deleted = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return _told(400, f"LFS object {value['oid']} was not uploaded")
                added[value["path"]] = self.hub.objects[value["oid"]]
            else:
                deleted.append(value["path"])
        before = repo.commits[repo.resolve(parent or revision)]
        contents = {name: one for name, one in before.items() if name not in deleted} | self.hub.contents(added)
        ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}" if proposed else revision
        commit = self.hub.add_commit(repo_id, contents, ref)
        repo.messages[commit] = head["value"]["summary"]
        page = f"{self.hub.endpoint}/{repo_id}"
        request = {"pullRequestUrl": f"{page}/discussions/{ref.rpartition('/')[2]}"} if proposed else {}
        return _json({"success": True, "commitOid": commit, "commitUrl": f"{page}/commit/{commit}", **request})

    def created(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        token = self.token()
        if token is None:
            return _told(401, "Invalid username or password.")
        owner = asked.get("organization") or token.user
        repo_id = f"{owner}/{asked['name']}"
        if token.role == "read" or not (token.writes(repo_id) if token.role == "write" else owner in token.repos):
            return _told(403, f"You don't have the rights to create a model under the namespace {owner}")
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            return _json({"error": "You already created this model repo", "url": url}, 409)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.hub.add_repo(repo_id, {".gitattributes": attributes})
        self.hub.repos[repo_id].private = bool(asked.get("private")) or asked.get("visibility") == "private"
        return _json({"url": url, "name": repo_id, "id": "0"})

    @staticmethod
    def checked_card(asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        head = _card_data(asked["content"])
        if head is None:
            return _json({"errors": [{"message": "the YAML head is not valid"}], "warnings": []}, 400)
        warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": warnings})

    # -- the store of large files

    def batched(self, repo_id: str, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if self.token() is None:
            return _told(401, "Invalid username or password.")
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            upload: dict[str, Any] = {"href": f"{self.hub.store}/lfs/{oid}?{SIGNATURE}"}
            if size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                parts = {str(k): f"{self.hub.store}/lfs/{oid}/{k}?{SIGNATURE}" for k in range(1, count + 1)}
                upload = {
                    "href": f"{self.hub.endpoint}/lfs/{oid}/complete",
                    "header": {"chunk_size": str(self.hub.part_size), **parts},
                }
            verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
            actions = {} if oid in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": oid, "size": size, **actions})
        return _json({"transfer": "basic", "objects": objects})

    def held(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        return _json({}) if asked["oid"] in self.hub.objects else _told(404, "no such object")

    def stored(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """A whole object, a part of one, or the word that all parts are there."""
        oid, _, part = path.partition("/")
        if part == "complete":
            wanted = [self.hub.parts.get((oid, str(one["partNumber"]))) for one in json.loads(body)["parts"]]
            if None in wanted:
                return _told(400, "a part is missing")
            body = b"".join(wanted)
        elif SIGNATURE not in self.path or "Authorization" in self.headers:
            return _told(403, "not signed, or a token was sent to the store")
        elif part:
            self.hub.parts[oid, part] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        if hashlib.sha256(body).hexdigest() != oid:
            return _told(400, "the content does not match its sha256")
        self.hub.objects[oid] = body
        return _json({})


def card_facts(contents: dict[str, Any]) -> dict[str, Any]:
    """What the Hub tells of a repository's card."""
    data = _card_data(contents["README.md"].read().decode()) if "README.md" in contents else {}
    return {"cardData": data} if data else {}


def _card_data(text: str) -> dict[str, Any] | None:
    import yaml

    found = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return None
    return data if isinstance(data, dict) else None


def _json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _told(status: int, message: str, code: str = "") -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return status, headers, json.dumps({"error": message}).encode()
