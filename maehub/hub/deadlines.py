"""How long a server may take: the clients bound the wait for each byte alone, not for an answer."""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from maehub.errors import HubError
from maehub.files import byte_text

Answer = TypeVar("Answer")

PATIENCE = 60  # seconds within which an answer is whole, or another `CHUNK` of it has come
CHUNK = 65_536  # bytes that are received at once


class Unreachable(HubError):
    """The place did not answer, or not in a usable way; a copy on this machine may do."""


def bound(call: Callable[[], Answer], host: str, about: str = "", received: Callable[[], int] = int) -> Answer:
    """The answer to a call, or Unreachable where for `PATIENCE` nothing more of it is ``received``, in bytes.

    One byte a second, or one interim answer after another, would hold the clients for ever, so the call has a thread of
    its own. Where it is given up, that ends at its next byte.
    """
    future: Future[Answer] = Future()

    def answer() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    before = received()
    try:
        while not wait([future], PATIENCE).done:
            if (now := received()) - before < CHUNK:
                raise Unreachable(
                    f"{host} was given up{about}: no answer and no {byte_text(CHUNK)} of a file in {PATIENCE:g} s\n"
                    "nothing half is kept; try again later, or on another network"
                )
            before = now
        return future.result()
    finally:
        if not future.done():  # else the Hub's client would ask again and again, and close what others use
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
