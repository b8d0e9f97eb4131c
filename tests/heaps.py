"""Into how many heaps malloc divides the threads of a process; nothing heavy is imported here."""

import ctypes
import tempfile
import threading
from pathlib import Path

THERE = hasattr(ctypes.CDLL(None), "malloc_info")


def count_heaps() -> int:
    """Of the process, once two more threads have come."""
    done = threading.Event()
    for _ in range(2):
        threading.Thread(target=done.wait, daemon=True).start()
    libc = ctypes.CDLL(None)
    libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    with tempfile.NamedTemporaryFile() as told:
        file = libc.fopen(told.name.encode(), b"w")
        libc.malloc_info(0, file)
        libc.fclose(file)
        return Path(told.name).read_text().count("<heap nr=")
