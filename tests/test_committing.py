"""Publishing through the real client of the Hub, to a Hub on loopback that misbehaves on demand."""

import gc
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import SIGNATURE, fetch_repo
from hub_writes import Token
from hypothesis import given
from hypothesis import strategies as st

from maehub.errors import CheckpointError, HubError, IntegrityError, MaehubError, UsageError
from maehub.publishing import committing, remote
from maehub.publishing.committing import commit
from maehub.publishing.remote import Hub, LocalFile, check_conditions, look, verify_remote

REPO = "user/name"
TOKEN = "hf_" + "t0k3n" * 7
CARD = "---\nlicense: cc-by-nc-4.0\n---\n\n# name\n"
WEIGHTS = bytes(range(256)) * 1200  # 307 kB
FILES = {"README.md": CARD.encode(), "config.json": b"{}", "model.safetensors": WEIGHTS, "timm/model.safetensors": WEIGHTS[:9000]}  # fmt: skip  # noqa: E501


@pytest.fixture
def hub(hub, monkeypatch):
    """The Hub on loopback knows a token that may write as user; large files are not held in memory."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(committing, "_IN_MEMORY", 100_000)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens[TOKEN] = Token()
    return hub


@pytest.fixture
def naps(monkeypatch):
    """Sleeping costs nothing; the seconds that were asked for."""
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def impatient(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(committing, "UPLOAD_SILENCE", 0.3)


@pytest.fixture
def files(tmp_path):
    return written(tmp_path / "model", FILES)


@pytest.fixture
def there(hub):
    """The repository with an older model and a file that maehub did not write: its head."""
    return hub.add_repo(REPO, {"README.md": "# old", "model.safetensors": b"old", "NOTES.txt": "mine", ".gitattributes": "x"})  # fmt: skip  # noqa: E501


def written(folder, contents):
    """Files on this machine, as what is to be published."""
    found = {}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found[name] = LocalFile(path, len(content), hashlib.sha256(content).hexdigest())
    return found


def push(files, **options):
    seen = {name: options[name] for name in ("revision", "pull_request") if name in options}
    hub = Hub(REPO)
    stated = look(hub, **seen)
    asked = {"parent": None, "private": None, "pull_request": False}
    check_conditions(hub, stated, **asked | {name: options[name] for name in asked if name in options})
    options = {name: value for name, value in options.items() if name not in ("revision", "parent")}
    return commit(hub, files, remote=stated, **{"message": "a model", "progress": False} | options)


def head(hub, revision="main"):
    return hub.repos[REPO].refs[revision]


def held(hub, at="main"):
    """What the Hub holds, by name."""
    repo = hub.repos[REPO]
    return {name: one.read() for name, one in repo.commits[repo.resolve(at)].items()}


def pushed(hub):
    """The commits that a client made."""
    return list(hub.repos[REPO].messages) if REPO in hub.repos else []


def fails(kind, call, *args, **options):
    """The text of the error, which must be ours, short, and free of secrets."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert isinstance(caught.value, MaehubError)
    assert len(text.splitlines()) <= 6
    assert SIGNATURE not in text
    assert TOKEN not in text
    return text


# -- what publishing is ------------------------------------------------------------------------------------------------


def test_a_new_repository_is_made_filled_in_one_commit_and_read_back(hub, files):
    before = look(Hub(REPO))
    assert (before.exists, before.commit, before.files) == (False, "", {})
    done = commit(Hub(REPO), files, remote=before, message="a model", progress=False)
    assert held(hub) == FILES | {".gitattributes": held(hub)[".gitattributes"]}
    assert pushed(hub) == [done.commit] == [head(hub)]
    assert hub.repos[REPO].messages[done.commit] == "a model"
    assert done.url == f"{hub.endpoint}/{REPO}/tree/{done.commit}"
    assert (done.uploaded, done.unchanged, done.pull_request_url) == (tuple(FILES), (), None)
    verify_remote(Hub(REPO), done.commit, files)
    after = look(Hub(REPO))
    assert (after.exists, after.private, after.commit, after.licence) == (True, False, done.commit, "cc-by-nc-4.0")
    assert set(after.files) == set(FILES) | {".gitattributes"}
    assert after.files["model.safetensors"].sha256 == files["model.safetensors"].sha256
    found = fetch_repo(f"{REPO}@{done.commit}")
    assert (found.path.read_bytes(), found.revision) == (WEIGHTS, done.commit)
    assert found.sha256 == files["model.safetensors"].sha256


def test_contents_go_to_the_store_without_the_token_and_with_maehubs_name(hub, files):
    push(files)
    sent = hub.asked("PUT")
    assert len(sent) == 2
    assert all(one.store and "authorization" not in one.headers for one in sent)
    assert all(one.headers["user-agent"].startswith("maehub/") for one in hub.asked(contains="/api/"))


def test_a_token_may_be_given(hub, files, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    at = Hub(REPO, TOKEN)
    done = commit(at, files, remote=look(at), message="m", progress=False)
    verify_remote(at, done.commit, files)
    assert TOKEN not in repr(look(at))


def test_what_is_on_the_hub_already_is_not_sent_again(hub, files, caplog):
    caplog.set_level(logging.INFO, "maehub")
    first = push(files)
    requests = len(hub.log)
    again = push(files)
    assert {one.method for one in hub.log[requests:]} == {"GET"}
    assert (again.commit, again.uploaded, again.unchanged) == (first.commit, (), tuple(FILES))
    assert pushed(hub) == [first.commit]
    assert "nothing was sent" in caplog.text


def test_only_what_changed_is_sent(hub, files, tmp_path):
    push(files)
    requests = len(hub.log)
    changed = files | written(tmp_path / "next", {"config.json": b'{"a": 1}'})
    done = push(changed)
    assert (done.uploaded, len(done.unchanged)) == (("config.json",), 3)
    assert not [one for one in hub.log[requests:] if one.method == "PUT"]
    assert held(hub)["config.json"] == b'{"a": 1}'
    assert held(hub)["model.safetensors"] == WEIGHTS


def test_large_files_are_sent_in_parts_where_the_store_wants_them_so(hub, files):
    hub.part_size = 100_000
    done = push(files)
    assert len([one for one in hub.asked("PUT") if "/model" not in one.path]) == 5  # four parts, and the small one
    assert held(hub)["model.safetensors"] == WEIGHTS
    verify_remote(Hub(REPO), done.commit, files)


def test_empty_files_and_odd_names_arrive(hub, tmp_path):
    contents = {"empty.txt": b"", "figures/a b ü.png": b"\x89PNG", "model.safetensors": b""}
    done = push(written(tmp_path, contents))
    assert {name: held(hub)[name] for name in contents} == contents
    verify_remote(Hub(REPO), done.commit, written(tmp_path, {name: contents[name] for name in ("empty.txt",)}))


def test_a_list_of_left_out_files_on_the_hub_leaves_none_out(hub, files):
    hub.add_repo(REPO, {".gitignore": "*.safetensors\n*.json"})
    push(files)
    assert {name: held(hub)[name] for name in FILES} == FILES


def test_a_new_branch_begins_at_the_head_of_main(hub, there, files):
    seen = look(Hub(REPO), revision="flowers/2")
    assert (seen.has_revision, seen.commit) == (False, there)
    done = push(files, revision="flowers/2")
    assert head(hub, "flowers/2") == done.commit
    assert head(hub) == there
    assert held(hub, "flowers/2")["NOTES.txt"] == b"mine"
    assert push(files, revision="flowers/2").uploaded == ()
    hub.add_repo(REPO, held(hub, "flowers/2"))
    assert push(files, revision="flowers/3").uploaded == ()
    assert head(hub, "flowers/3") == head(hub)


def test_a_new_repository_may_begin_with_a_branch(hub, files):
    push(files, revision="v2")
    assert set(held(hub)) == {".gitattributes"}
    assert held(hub, "v2")["model.safetensors"] == WEIGHTS


def test_tags_and_commits_are_not_written_to(hub, there, files):
    hub.add_repo(REPO, {}, revision="v1")
    hub.repos[REPO].tags.add("v1")
    assert "is a tag" in fails(UsageError, push, files, revision="v1")
    assert "is a commit" in fails(UsageError, push, files, revision=there)
    assert not pushed(hub)


def test_a_pull_request_leaves_the_branch_alone(hub, there, files):
    hub.tokens[TOKEN] = Token(user="guest")  # proposing needs no right to write
    done = push(files, pull_request=True)
    assert head(hub) == there
    assert head(hub, "refs/pr/1") == done.commit
    assert done.pull_request_url == f"{hub.endpoint}/{REPO}/discussions/1"
    verify_remote(Hub(REPO), done.commit, files)


def test_a_pull_request_needs_a_repository(hub, files):
    assert "no repository" in fails(UsageError, push, files, pull_request=True)
    hub.add_repo(REPO, {})
    assert "main branch" in fails(UsageError, push, files, pull_request=True, revision="v2")


def test_a_card_that_the_hub_refuses(hub, tmp_path):
    files = written(tmp_path, {"README.md": b"---\nlicense: [\n---\n"})
    assert "refuses the head of the card" in fails(HubError, push, files)
    assert not pushed(hub)


def test_what_the_hub_says_about_a_card_is_told(hub, tmp_path, caplog):
    push(written(tmp_path, {"README.md": b"# bare\n"}))
    assert "empty or missing yaml metadata" in caplog.text


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_file_that_changes_while_it_is_published(hub, there, files, name):
    files[name].path.write_bytes(files[name].path.read_bytes()[:-1] + b"!")
    assert name in fails(IntegrityError, push, files)
    assert head(hub) == there


def test_no_repository_is_made_for_files_that_are_not_as_they_were(hub, files):
    files["README.md"].path.write_bytes(b"other")
    fails(IntegrityError, push, files)
    assert REPO not in hub.repos


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_file_that_is_gone(hub, there, files, name):
    files[name].path.unlink()
    assert name in fails((CheckpointError, UsageError), push, files)
    assert head(hub) == there


def test_small_files_count_as_git_counts_them(hub, tmp_path):
    """git itself is the judge of what the Hub's hash of a small file means."""
    contents = {str(size): os.urandom(size) for size in (0, 1, 255, 4096, 70_000)}
    files = written(tmp_path, contents)
    push(files)
    for name, stated in look(Hub(REPO)).files.items():
        if name in contents:
            command = ["git", "hash-object", files[name].path]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == stated.git
            assert remote.same(files[name], stated)


@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans())
def test_files_are_the_same_only_if_their_bytes_are(tmp_path_factory, here, there, large):
    file = written(tmp_path_factory.mktemp("same"), {"file": here})["file"]
    git = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
    sha256 = hashlib.sha256(there).hexdigest()
    stated = remote.RemoteFile(len(there), sha256 if large else "", "" if large else git)
    assert remote.same(file, stated) == (here == there)


@given(st.text(max_size=30).filter(lambda text: text.count("/") != 1))
def test_what_names_no_repository_is_refused_before_any_request(name):
    with pytest.raises(UsageError):
        Hub(name, TOKEN)


# -- row 75: connections that break ------------------------------------------------------------------------------------

BEFORE = ["api/whoami-v2", "api/user/name/revision/main", "api/user/name/auth-check/write"]
UPLOAD = ["api/user/name/preupload/main", "user/name.git/info/lfs/objects/*", "lfs/*"]
CALLS = [*BEFORE, "api/repos/create", *UPLOAD, "api/validate-yaml", "api/user/name/commit/main"]
FAULTS = {"dropped": ("hang", {"seconds": 0}), "cut": ("cut", {"after": 300}), "503": ("status", {"status": 503})}


def break_off(hub, call, fault, times):
    mode, options = FAULTS[fault]
    return hub.fault(call, mode, times=times, methods=("GET", "POST", "PUT"), **options)


@pytest.mark.parametrize(("call", "fault"), [(call, fault) for call in CALLS for fault in FAULTS if call not in BEFORE or fault != "cut"])  # fmt: skip  # noqa: E501
def test_row_75_a_call_that_fails_once_is_made_again(hub, files, naps, call, fault):
    if call != "api/repos/create":
        hub.add_repo(REPO, {"NOTES.txt": "mine"})
    broken = break_off(hub, call, fault, 1)
    done = push(files)
    assert broken.times == 0
    assert pushed(hub) == [done.commit] == [head(hub)]
    assert {name: held(hub)[name] for name in FILES} == FILES


@pytest.mark.parametrize("fault", ["dropped", "503"])
@pytest.mark.parametrize("call", CALLS)
def test_row_75_a_call_that_always_fails_publishes_nothing(hub, files, naps, call, fault):
    if call != "api/repos/create":
        hub.add_repo(REPO, {"NOTES.txt": "mine"})
    break_off(hub, call, fault, float("inf"))
    text = fails(HubError, push, files)
    assert not pushed(hub)
    assert hub.endpoint.removeprefix("http://") in text
    assert "nothing was published" in text
    assert ("HTTP 503" in text) == (fault == "503")
    if call in UPLOAD:
        assert "not sent again" in text
    assert sum(naps) < 120


@pytest.mark.parametrize("fault", [("status", 500), ("status", 504), ("hang", 0), ("html", 0)])
def test_row_75_a_commit_whose_answer_is_lost_is_not_made_twice(hub, there, files, naps, fault):
    mode, status = fault
    hub.fault("api/*/commit/*", mode, methods=("POST",), status=status, seconds=0, done=True, times=1)
    done = push(files)
    assert pushed(hub) == [done.commit] == [head(hub)]
    assert len(hub.asked("POST", "/commit/")) == 1
    assert done.uploaded == tuple(FILES)
    verify_remote(Hub(REPO), done.commit, files)


def test_row_75_a_commit_that_arrives_late_is_not_made_twice(hub, there, files, naps, monkeypatch):
    """The head is still the old one when it is read; then the first request has its effect after all."""
    hub.fault("api/*/commit/*", "status", methods=("POST",), status=502, times=1)
    real = committing._create_commit
    calls = []

    def slow(hub_, operations, *rest, **options):
        calls.append(1)
        if len(calls) == 2:
            hub.repos[REPO].messages["late"] = "late"
            hub.add_commit(REPO, hub.repos[REPO].commits[there] | hub.contents(FILES), "main")
        return real(hub_, operations, *rest, **options)

    monkeypatch.setattr(committing, "_create_commit", slow)
    done = push(files)
    assert done.commit == head(hub)
    assert pushed(hub) == ["late"]


def test_row_75_somebody_elses_commit_is_not_taken_for_ours(hub, there, files, naps, monkeypatch):
    hub.fault("api/*/commit/*", "status", methods=("POST",), status=502, times=1)
    real = committing._arrived
    monkeypatch.setattr(committing, "_arrived", lambda *args: hub.add_repo(REPO, {"other": "x"}) and real(*args))
    text = fails(HubError, push, files)
    assert f"remote changed: {there[:12]} -> {head(hub)[:12]}" in text
    assert not pushed(hub)


@pytest.mark.parametrize("done", [False, True])
def test_row_75_the_hub_is_gone_after_the_commit_was_sent(hub, there, files, naps, done):
    seen = look(Hub(REPO))
    hub.fault("api/*/commit/*", "hang", methods=("POST",), seconds=0, done=done)
    hub.fault("api/*", "status", status=503)
    text = fails(HubError, commit, Hub(REPO), files, remote=seen, message="m", progress=False)
    assert "not known" in text
    assert "running this again is safe" in text
    assert len(hub.asked("POST", "/commit/")) == 1
    hub.faults.clear()
    again = push(files)
    assert len(pushed(hub)) == 1
    assert again.commit == head(hub)
    assert again.uploaded == (() if done else tuple(FILES))


def test_row_75_contents_that_arrived_are_not_sent_again(hub, there, files, naps):
    hub.fault("api/*/commit/*", "status", methods=("POST",), status=503)
    fails(HubError, push, files)
    hub.faults.clear()
    requests = len(hub.log)
    push(files)
    assert not [one for one in hub.log[requests:] if one.method == "PUT"]


def test_row_75_a_repository_whose_making_was_not_answered(hub, files, naps):
    hub.fault("api/repos/create", "status", methods=("POST",), status=500, done=True, times=1)
    push(files, private=True)
    assert hub.repos[REPO].private
    assert len(pushed(hub)) == 1


def test_row_75_a_repository_that_somebody_made_meanwhile_is_not_taken(hub, files):
    seen = look(Hub(REPO))
    before = hub.add_repo(REPO, {"theirs": "x"})
    text = fails(HubError, commit, Hub(REPO), files, remote=seen, message="m", progress=False)
    assert "did not a moment ago" in text
    assert head(hub) == before


@pytest.mark.parametrize("done", [False, True])
def test_row_75_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, there, files, naps, done):
    hub.fault("api/*/commit/*", "status", methods=("POST",), status=500, done=done)
    hub.add_commit(REPO, hub.repos[REPO].commits[there] | hub.contents(FILES), "refs/pr/1")  # an earlier one, the same
    if done:
        made = push(files, pull_request=True)
        assert made.commit == head(hub, "refs/pr/2")
        assert made.pull_request_url == f"{hub.endpoint}/{REPO}/discussions/2"
    else:
        assert "before running this again" in fails(HubError, push, files, pull_request=True)
    assert len(hub.asked("POST", "/commit/")) == 1
    assert head(hub) == there


@pytest.mark.parametrize("call", ["api/whoami-v2", "api/repos/create", *UPLOAD, "api/user/name/commit/main"])
def test_row_75_a_server_that_hangs(hub, files, naps, impatient, call):
    hub.fault(call, "hang", methods=("GET", "POST", "PUT"))
    begin = time.monotonic()
    text = fails(HubError, push, files)
    assert "no data for 0.3 s" in text
    assert time.monotonic() - begin < 30  # a guard; the server hangs for 60
    assert not pushed(hub)


def test_row_75_a_limit_of_the_users_own_client_is_kept(hub, files):
    from huggingface_hub.utils import get_session, httpx

    get_session().timeout = httpx.Timeout(33)
    push(files)
    assert get_session().timeout == httpx.Timeout(33)


def test_row_75_nobody_answers(hub, files, naps, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in fails(HubError, look, Hub(REPO))
    assert naps == []


def test_row_75_no_network_is_wanted(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in fails(HubError, look, Hub(REPO))
    assert not hub.log


@pytest.mark.parametrize("wanted", [{"whoami-v2"}, {"whoami-v2", "revision/main"}])
def test_row_75_a_login_page_instead_of_the_hub(hub, there, wanted):
    for one in wanted:
        hub.fault(f"api/*{one}", "html")
    assert "does not answer like a Hub" in fails(HubError, look, Hub(REPO))


def test_row_75_a_store_that_does_not_speak_xet(hub, there, files, monkeypatch):
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    text = fails(HubError, push, files)
    assert "HF_HUB_DISABLE_XET=1" in text
    assert head(hub) == there


def test_row_75_the_hub_limits_requests(hub, there, files, naps):
    hub.fault("api/whoami-v2", "status", status=429, headers={"Retry-After": "7"}, times=1)
    hub.fault("api/*/commit/*", "status", methods=("POST",), status=429, headers={"Retry-After": "9"}, times=1)
    push(files)
    assert naps == [7, 9]
    hub.fault("api/whoami-v2", "status", status=429, headers={"Retry-After": "3600"})
    assert "limits requests" in fails(HubError, look, Hub(REPO))


def test_row_84_ctrl_c_while_sending_ends_at_once_and_publishes_nothing(hub, there, files):
    hub.fault("lfs/*", "hang", methods=("PUT",))

    def interrupt():
        while not hub.asked("PUT"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    gc.disable()  # hypothesis hooks into collections, and an interrupt that meets a hook is lost
    try:
        with pytest.raises(KeyboardInterrupt):
            push(files)
    finally:
        gc.enable()
    assert time.monotonic() - begin < 30  # a guard; the server hangs for 60
    thread.join()
    assert (head(hub), pushed(hub)) == (there, [])


# -- row 76: the head moved --------------------------------------------------------------------------------------------


def test_row_76_a_head_that_moved_is_not_overwritten(hub, there, files):
    seen = look(Hub(REPO))
    now = hub.add_repo(REPO, {"README.md": "# theirs"})
    text = fails(HubError, commit, Hub(REPO), files, remote=seen, message="m", progress=False)
    assert f"remote changed: {there[:12]} -> {now[:12]}" in text
    assert f"--parent {now}" in text
    assert (head(hub), held(hub)) == (now, {"README.md": b"# theirs"})
    done = push(files, parent=now[:8])
    assert head(hub) == done.commit


def test_row_76_another_parent_than_the_head_is_refused_before_anything_is_sent(hub, there, files):
    now = hub.add_repo(REPO, {"README.md": "# theirs"})
    assert f"remote changed: {there[:12]} -> {now[:12]}" in fails(HubError, push, files, parent=there)
    assert {one.method for one in hub.log} == {"GET"}
    assert "hexadecimal" in fails(UsageError, push, files, parent="main")


def test_row_76_a_new_repository_has_no_head(hub, files):
    assert "no repository" in fails(UsageError, push, files, parent="a" * 40)
    assert REPO not in hub.repos


# -- row 77: what is there already -------------------------------------------------------------------------------------


def test_row_77_files_of_others_survive(hub, there, files):
    push(files)
    assert held(hub) == FILES | {"NOTES.txt": b"mine", ".gitattributes": b"x"}
    assert held(hub, there)["README.md"] == b"# old"


@pytest.mark.parametrize("private", [True, False])
def test_row_77_the_other_visibility_is_refused(hub, there, files, private):
    hub.repos[REPO].private = not private
    text = fails(UsageError, push, files, private=private)
    assert ("is public" in text) == private
    assert {one.method for one in hub.log} == {"GET"}
    assert hub.repos[REPO].private is not private
    push(files, private=not private)
    push(files)


@pytest.mark.parametrize("private", [True, False, None])
def test_row_77_a_new_repository_is_seen_by_whom_it_was_asked_for(hub, files, private):
    done = push(files, private=private)
    assert hub.repos[REPO].private is bool(private)
    assert look(Hub(REPO)).private is bool(private)
    verify_remote(Hub(REPO), done.commit, files)


def test_row_77_the_licence_that_is_stated_there(hub, there):
    assert look(Hub(REPO)).licence == ""
    hub.add_repo(REPO, {"README.md": "---\nlicense: mit\n---\n"})
    assert look(Hub(REPO)).licence == "mit"


# -- row 81: what arrived ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
@pytest.mark.parametrize("damage", ["other", "short", "missing"])
def test_row_81_what_arrived_is_compared(hub, files, name, damage):
    done = push(files)
    contents = held(hub) | {name: FILES[name][:-1] + (b"!" if damage == "other" else b"")}
    if damage == "missing":
        del contents[name]
    hub.repos[REPO].commits[done.commit] = hub.contents(contents)
    text = fails(IntegrityError, verify_remote, Hub(REPO), done.commit, files)
    assert name in text
    assert done.commit[:12] in text


def test_row_81_the_hub_does_not_tell_what_arrived(hub, files, naps):
    done = push(files)
    hub.fault("api/*", "status", status=503, methods=("POST",))
    text = fails(HubError, verify_remote, Hub(REPO), done.commit, files)
    assert f"the commit {done.commit[:12]} was made" in text


# -- row 82: tokens ----------------------------------------------------------------------------------------------------

TOKENS = {
    "none": (None, "there is no token"),
    "unknown": (None, "does not accept the token"),
    "read": (Token(role="read"), "may only read"),
    "other": (Token(user="guest"), "may publish as guest"),
    "fine": (Token(role="fineGrained", repos=("user/other",)), "may not make repositories of user"),
}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kind", TOKENS)
def test_row_82_a_token_that_may_not_write_is_told_before_anything_is_read(hub, files, monkeypatch, kind, exists):
    token, says = TOKENS[kind]
    hub.tokens = {TOKEN: token} if token else {}
    if kind == "none":
        monkeypatch.delenv("HF_TOKEN")
    if exists:
        hub.add_repo(REPO, {"README.md": "# old"})
        says = "may not write there (HTTP 403)" if kind in ("other", "fine") else says
    monkeypatch.setattr(remote, "file_hashes", lambda *_: pytest.fail("a file was read"))
    monkeypatch.setattr(Path, "read_bytes", lambda *_: pytest.fail("a file was read"))
    text = fails(HubError, push, files)
    assert says in text
    assert "hf auth login" in text
    assert {one.method for one in hub.log} <= {"GET"}
    assert HubError.exit_code == 3


@pytest.mark.parametrize("token", [Token(role="fineGrained", repos=("user",)), Token(user="guest", orgs=("user",))])
def test_row_82_tokens_of_a_member_and_for_a_part(hub, files, token):
    hub.tokens[TOKEN] = token
    push(files)
    assert push(files).uploaded == ()


def test_row_82_a_token_for_this_repository_alone(hub, there, files):
    hub.tokens[TOKEN] = Token(role="fineGrained", repos=(REPO,))
    assert push(files).commit == head(hub)


def test_row_82_a_private_repository_of_others(hub, there, files):
    hub.repos[REPO].private = True
    hub.tokens[TOKEN] = Token(user="guest")
    assert "may publish as guest" in fails(HubError, push, files)


def test_row_82_a_mirror_that_does_not_know_the_question_is_asked_by_doing(hub, there, files):
    hub.fault("api/*/auth-check/write", "status", status=404)
    push(files)


@pytest.mark.parametrize("call", ["preupload", "commit"])
def test_row_82_rights_that_are_taken_away_meanwhile(hub, there, files, call):
    hub.fault(f"api/*/{call}/*", "status", methods=("POST",), status=403)
    assert "HTTP 403" in fails(HubError, push, files)
    assert len(hub.asked("POST", f"/{call}/")) == 1
    assert head(hub) == there


@pytest.mark.parametrize("token", ["hf_with\nline", "hf_ü" * 9, "two words"])
def test_row_82_what_cannot_be_a_token_is_not_shown_either(hub, token):
    with pytest.raises(HubError) as caught:
        Hub(REPO, token)
    assert token not in str(caught.value)
    assert caught.value.__cause__ is None


CHILD = """
import json, logging, sys, traceback
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from pathlib import Path
from maehub.publishing import committing
from maehub.publishing.committing import commit
from maehub.publishing.remote import Hub, LocalFile, look
committing._IN_MEMORY = 1000
files = {name: LocalFile(Path(path), size, sha256) for name, (path, size, sha256) in json.loads(sys.argv[1]).items()}
for repo in ("user/bars", "user/none", "user/refused", "stranger/name"):
    print("##", file=sys.stderr)
    try:
        hub = Hub(repo)
        print(commit(hub, files, remote=look(hub), message="m", progress=repo == "user/bars"))
    except Exception:
        traceback.print_exc()
"""


def test_row_82_no_output_shows_the_token_or_a_signed_address_and_bars_are_as_wanted(hub, tmp_path):
    """In a process of its own, with every log line and traceback there is."""
    files = written(tmp_path, {"README.md": FILES["README.md"], "model.safetensors": WEIGHTS})
    hub.fault("lfs/*", "status", status=500, methods=("PUT",), times=1)
    hub.fault("api/user/refused/commit/*", "status", status=403, methods=("POST",))
    environment = hub.env() | {"HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS")
    plain = {name: [str(one.path), one.size, one.sha256] for name, one in files.items()}
    command = [sys.executable, "-c", CHILD, json.dumps(plain)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    said = ran.stdout + ran.stderr
    assert said.count("Committed(") == 2
    assert "user/refused failed" in ran.stderr
    assert "may publish as user" in ran.stderr
    assert TOKEN[3:] not in said
    assert "500 thrown while requesting PUT" in said  # the client's own words
    assert SIGNATURE not in "".join(line for line in said.splitlines(True) if ":httpcore" not in line)
    _, bars, none, *_ = ran.stderr.split("##\n")
    assert "model.safetensors:   0%" in bars
    assert "B/s]" in bars
    assert "B/s]" not in none
