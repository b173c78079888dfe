"""The processes of a run: how they find each other, agree, wait and fail together.

torchrun starts them and says in the environment who is who; without it a run is one process, and everything here costs
nothing. A wait of one process for the others is bounded and has a name, so that an error says what was waited for, at
which step, and which process did not come.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from maehub import errors
from maehub.errors import DistributedError, MaehubError, UsageError
from maehub.models import usable_device

Value = TypeVar("Value")

START_TIMEOUT = 600.0
"""Seconds that processes wait for each other to start, to scan the data, to save and to validate."""

_REPORTS = 3.0  # seconds in which the survivors of a failure say what they know
_WAITED = "waited for the others"
_RUNS = itertools.count()  # of this process
_FAILED = 1 << 16  # an exit code fits below
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe", "socket")


@dataclass
class Group:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this host."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 120.0
    """Seconds to wait for the others within a step."""
    step: int = 0
    """What the process is doing, for error messages: the loop keeps it current."""
    step_group: dist.ProcessGroup | None = None
    """What steps communicate through, with the short timeout."""
    store: Store | None = None
    _shared: list[BaseException] = field(default_factory=list, init=False)  # errors that every process has

    def __deepcopy__(self, memo: dict[int, object]) -> "Group":
        """Itself: a copy of a network runs in the same processes."""
        return self

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do something in every process; if it fails in one, all raise that error, the lowest rank's.

        The error if a process does not come says ``what``: "saving the checkpoint".
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if caught in self._shared:
                raise  # all have it already
            error = caught
        self.all(None, what, error)

    def first(self, value: Value, what: str) -> Value:
        """Rank 0's value, in every process."""
        sent: Any = value if self.is_main else None
        return self.all(sent, what)[0]

    def host_first(self, make: Callable[[], Value], what: str) -> Value:
        """Made by the first process of each host, and then by its others, which find what that one fetched."""
        made = [make()] if self.local_rank == 0 else []
        self.all(None, what)
        return made[0] if made else make()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were told, or see, different things."""
        everyone = self.all({name: str(value) for name, value in facts.items()}, "comparing their settings")
        differing = []
        for name in facts:
            values = [one.get(name, "nothing") for one in everyone]
            if len(set(values)) > 1:
                odd = next(rank for rank, value in enumerate(values) if value != values[0])
                differing.append(f"{name}: rank 0 has {values[0]:.80}, rank {odd} has {values[odd]:.80}")
        if differing:
            disagreement = DistributedError(
                f"the processes do not agree: {'; '.join(differing[:4])}. Nothing was changed. Start all of them with "
                "the same command, code and data."
            )
            disagreement.told_by = 0
            self._shared.append(disagreement)
            raise disagreement

    def exchange(self, stop: int | None, failed: bool) -> tuple[int, bool]:
        """Tell the others at the beginning of a step, and hear from them; on the CPU, the GPU goes on working.

        Said are the exit code to stop with after this step, 0 to go on, and whether some process cannot do it; the
        error is then raised in `together`.
        """
        if self.size == 1:
            return stop or 0, failed
        self._leave("pulse")
        said = torch.tensor([(stop or 0) + failed * _FAILED], dtype=torch.int64)
        with self.waiting("the beginning of a step"):
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.step_group)
        return int(said) % _FAILED, bool(int(said) & _FAILED)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Name what is waited for; a lost connection or a timeout becomes a `DistributedError` that says who."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            # a broken connection or a timeout, and not a mistake in a computation
            is_loss = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
            if self.size == 1 or isinstance(error, MaehubError) or not is_loss:
                raise
            lost = DistributedError(self._loss(what, error))
            self._shared.append(lost)
            raise lost from error

    def all(self, value: Value, what: str, error: Exception | None = None) -> list[Value]:
        """Every process's value, by rank; or the lowest rank's error, raised in all of them."""
        if self.size == 1:
            return [value]
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        text = str(error) if kinds else f"{what} failed: {type(error).__name__}: {error}"
        kind = kinds[0] if kinds else "DistributedError"
        everyone: list[Any] = [None] * self.size
        self._leave("pulse")
        with self.waiting(what):
            dist.all_gather_object(everyone, (value, (kind, text) if error else None))
        for rank, (_, failure) in enumerate(everyone):
            if failure:
                kind, text = failure
                shared = getattr(errors, kind)(text if text.startswith("rank ") else f"rank {rank}: {text}")
                shared.told_by = rank
                self._shared.append(shared)
                raise shared from error
        return [value for value, _ in everyone]

    def _leave(self, sign: str, error: str = "") -> None:
        """Leave a sign of life with the step, or of failure with its error, where all can read it."""
        facts = {"step": self.step, "pid": os.getpid(), "host": socket.gethostname(), "at": time.time()}
        with contextlib.suppress(Exception):  # the wait that follows has the better error
            if self.store is not None:
                self.store.set(f"{sign}/{self.rank}", json.dumps(facts | {"error": error}))

    def report_failure(self, error: BaseException) -> None:
        """Say why this process ends, for the others, whose connections to it will break."""
        self._leave("failure", f"{type(error).__name__}: {error}"[:500])

    def _loss(self, what: str, error: BaseException) -> str:
        """Who is to blame for a wait that failed."""
        assert self.store is not None
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        silent, told = self._survey()
        where = f"rank {self.rank} waited for {what}, step {self.step}"
        lines = [f"{where}, and the others did not come ({'timeout' if timed_out else 'connection lost'})."]
        for rank, facts in told.items():
            if not facts["error"].endswith(_WAITED):
                lines.append(f"Rank {rank} failed: {facts['error']}")
        for rank, facts in silent.items():
            state = f"last seen at step {facts['step']}, pid {facts['pid']} on {facts['host']}" if facts else "not seen"
            how = "hangs or cannot be reached" if timed_out else "died or was killed"
            lines.append(f"Rank {rank} {how}: {state}.")
        if len(lines) == 1:
            lines.append(f"The reason given: {reason}.")
        return " ".join(lines) + " Checkpoints are kept: start the same command again with --resume."

    def _survey(self) -> tuple[dict[int, Any], dict[int, Any]]:
        """What the others left in the store, by rank: the last sign of life of those that say nothing, None where there
        is none, and why the others ended. Nothing where it cannot be reached, which may take it minutes to say."""
        silent: dict[int, Any] = {}
        told: dict[int, Any] = {}

        def ask() -> None:
            self.report_failure(DistributedError(_WAITED))
            until = time.monotonic() + _REPORTS
            others = [rank for rank in range(self.size) if rank != self.rank]
            silent.update(dict.fromkeys(others))
            silent.update({rank: self._read(f"pulse/{rank}") for rank in others})
            while silent and time.monotonic() < until:
                for rank in list(silent):
                    if facts := self._read(f"failure/{rank}"):
                        told[rank] = facts
                        del silent[rank]
                time.sleep(0.1)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_REPORTS + 2)
        return dict(silent), dict(told)

    def _read(self, key: str) -> Any:
        assert self.store is not None
        with contextlib.suppress(Exception):
            if self.store.check([key]):
                return json.loads(self.store.get(key))
        return None


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[Group]:
    """This process's `Group`, from what torchrun says in the environment; a group of one without torchrun.

    Several processes take a GPU each. They have ``timeout`` seconds to wait for the others within a step, and
    `START_TIMEOUT` to start and to save.
    """
    told = os.environ
    many = "RANK" in told or "WORLD_SIZE" in told
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in told]
    numbers = [
        name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if not told.get(name, "0").isdigit()
    ]
    if many and (missing or numbers):
        wrong = f"{', '.join(missing)} missing" if missing else f"{', '.join(numbers)} no number"
        raise UsageError(
            f"the environment describes a run of many processes, but with {wrong}. Start it by torchrun, which sets "
            "all of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; or unset them for one process."
        )
    if not many or int(told["WORLD_SIZE"]) == 1:
        yield Group(device=usable_device(device), timeout=timeout)
        return
    rank, size, local = int(told["RANK"]), int(told["WORLD_SIZE"]), int(told.get("LOCAL_RANK", told["RANK"]))
    if rank >= size:
        raise UsageError(f"RANK={rank} must be below WORLD_SIZE={size}; start the run by torchrun, which sets both")
    chosen = usable_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # A restarted process, and a second run in one process, must not read what the one before left in the store.
    store = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_RUNS)}", _meet(rank, size))
    here = int(told.get("LOCAL_WORLD_SIZE", "1"))
    group = Group(rank, size, local, here, chosen, timeout, store=PrefixStore("maehub", store))
    try:
        with group.waiting("the start"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=START_TIMEOUT),
            )
            step_group = dist.new_group(timeout=timedelta(seconds=timeout))
            assert isinstance(step_group, dist.ProcessGroup)
            group.step_group = step_group
        store.set_timeout(timedelta(seconds=timeout))
        yield group
    except BaseException as error:
        if error not in group._shared:  # of a lost connection the others cannot be told
            group.report_failure(error)
        raise
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):  # of a connection that is lost already
                dist.destroy_process_group()


def _meet(rank: int, size: int) -> Store:
    """The key-value store at the address that the environment says."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.getaddrinfo(host, int(port))
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=START_TIMEOUT))))
    except (OSError, RuntimeError, OverflowError, dist.DistError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error).lower()
        remedy = (
            "choose another MASTER_PORT" if taken else "check MASTER_ADDR and MASTER_PORT, or let torchrun set them"
        )
        raise DistributedError(
            f"rank {rank} cannot meet the others at {host}:{port}: {reason}. Nothing was changed; {remedy}."
        ) from error
    return store
