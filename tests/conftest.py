"""No test reaches the network or the user's caches; `hub` is a Hub on loopback."""

import json
import os
import sys
import tempfile

import pytest
from hub_server import HubServer

_HOME = tempfile.TemporaryDirectory(prefix="maehub-tests-")
os.environ.update(
    {
        "HF_HOME": f"{_HOME.name}/hf",
        "HF_HUB_CACHE": f"{_HOME.name}/hf/hub",
        "MAEHUB_CACHE": f"{_HOME.name}/maehub",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
)
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

# With real processes or large networks: they start first, or one of two processes of pytest has nothing left to do.
LONG = "distributed training faults finetuning cli publishing surface validation finetuning_distributed probing cache"


def pytest_collection_modifyitems(items):
    first = [f"test_{name}.py" for name in LONG.split()]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that every client in this process talks to, with caches of this test's own.

    Child processes: `env=hub.env()`, which names the same caches.
    """
    from huggingface_hub import close_session, constants, hf_api

    with HubServer() as server:
        for name, value in server.env().items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)  # what transformers asks through
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", server.env()["HF_HUB_CACHE"])
        # The hub-wide cache folder is a default argument in some clients' modules.
        transformers_hub = sys.modules.get("transformers.utils.hub")
        if transformers_hub is not None and hasattr(transformers_hub, "HF_HUB_CACHE"):
            monkeypatch.setattr(transformers_hub, "HF_HUB_CACHE", server.env()["HF_HUB_CACHE"])
        yield server
        close_session()


@pytest.fixture
def told(capsys):
    """What a command says for programs, or its error."""
    from maehub.cli import command_line as cli

    def read(*line):
        code = cli.main([*map(str, line), "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out.splitlines()[-1]) if printed.out else printed.err

    return read
