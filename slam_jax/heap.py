"""The memory of the process as XLA:CPU's temporaries need it. Nothing heavy is imported here: entry
points ask for one heap before anything starts a thread."""

import ctypes
import os
import threading
from typing import Any

# Of glibc's malloc.h, and of Linux's mman.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20
_BEHIND = 64 << 20  # larger than any gap in a young heap, and never touched
# Holes of less than 1 KiB are kept by their size, and malloc need not search them. A little more
# than powers of two, so that no plug is of a size that a thread keeps for itself (tcache).
_HEADER = 16  # what glibc adds to requests of these sizes
_PLUGS = tuple((1 << power) + _HEADER for power in range(20, 9, -1))
_MOST = 1 << 30  # bytes in plugs of one size
_plugs: list[int] = []
_plugging = threading.Lock()


def one_heap() -> None:
    """Has malloc give all threads the one heap of the process.

    A thread that came before keeps its own, and later ones, XLA's among them, may be given that.
    Such heaps map whatever is large anew each time, whatever M_MMAP_MAX is.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 1)


def keep_memory() -> None:
    """`one_heap`, which never gives any of it back, and is of huge pages where Linux has them."""
    one_heap()
    if (libc := _glibc()) is None:
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
    # The heap is made large once and asked to be of huge pages; none is there until it is touched.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if (start := libc.malloc(size)) is not None:
        # What stays behind it keeps the end of the heap where it is, even if a library asks malloc
        # to give back all that is free, as protobuf does while a data set is built.
        libc.malloc(_BEHIND)
        first = -(-start // _HUGE) * _HUGE
        libc.madvise(first, size - 2 * _HUGE, _MADV_HUGEPAGE)
        libc.free(start)


def plug_holes() -> None:
    """Has malloc forget the holes of 1 KiB to 2 MiB in the heap, until `open_holes`.

    A compiler leaves tens of thousands, of all sizes. Malloc keeps those of similar sizes in order,
    in lists that it walks whenever it gives or takes some: in every operation of XLA:CPU.
    """
    if (libc := _glibc()) is None:
        return
    with _plugging:
        for size in _PLUGS:
            plugs = []
            while len(plugs) < _MOST // size and (plug := libc.malloc(size)) is not None:
                plugs.append(plug)
                # The smallest hole that will do is taken first. So two side by side are in one that
                # is too large to be plugged, and both are given back.
                if plugs[-2:] == [plug - size - _HEADER, plug]:
                    libc.free(plugs.pop())
                    libc.free(plugs.pop())
                    break
            _plugs.extend(plugs)


def open_holes() -> None:
    """Gives the plugs back, for the next program to be compiled in their place."""
    if (libc := _glibc()) is not None:
        with _plugging:
            while _plugs:
                libc.free(_plugs.pop())


def _glibc() -> Any:
    """None on macOS, on Linuxes without glibc and with another malloc, where nothing needs to be
    done."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_usable_size.restype = ctypes.c_size_t
    libc.malloc_usable_size.argtypes = [ctypes.c_void_p]
    # One that is preloaded, such as tcmalloc, rounds sizes in another way.
    some = libc.malloc(_PLUGS[-1])
    more = libc.malloc_usable_size(some) - _PLUGS[-1]
    libc.free(some)
    return libc if more in (8, 24) else None
