"""The memory of a process stays with it: one heap for all threads, which nobody makes smaller."""

import ctypes
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_info"), reason="there is no glibc"
)

COUNT = """
import ctypes, os, sys, threading
from pathlib import Path

libc = ctypes.CDLL(None)

def count_heaps(file):
    done = threading.Event()
    for _ in range(2):
        threading.Thread(target=done.wait, daemon=True).start()
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    stream = libc.fopen(file.encode(), b"w")
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    return Path(file).read_text().count("<heap nr=")
"""


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", COUNT + script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_threads_of_an_entry_point_share_one(tmp_path):
    """XLA's would be given the heap of any that came first, whose memory is not kept."""
    script = """
from slam_jax import command_line
command_line.run(lambda arguments: print(count_heaps(arguments[0])))
"""
    assert run(script, tmp_path / "told") == "1\n"


def test_threads_of_a_worker_share_one(tmp_path):
    script = """
from slam_jax.rocket import worker
worker.TASKS["count"] = (lambda *_: count_heaps(sys.argv[1] + ".told"), dict)
sys.argv.append(str(os.getppid()))
worker.main()
"""
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    job.write_text(json.dumps({"what": "count", "system": "", "settings": {}, "arguments": {}}))
    run(script, job, out)
    assert json.loads(out.read_text()) == 1


def test_a_library_that_gives_memory_back_leaves_it_large():
    """As protobuf does while a data set is built; what came afterwards was not of huge pages."""
    script = """
from slam_jax.heap import keep_memory

def size():
    ends = [line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ends)

keep_memory()
before = size()
libc.malloc_trim(0)
print(size() / before, before / os.sysconf("SC_PHYS_PAGES") / os.sysconf("SC_PAGE_SIZE"))
"""
    kept, share = map(float, run(script).split())
    assert kept > 0.99 and share > 0.5


# Places of chunks in a heap that is full of holes.
HOLES = """
from slam_jax import heap
heap.keep_memory()
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def place(size):
    found = libc.malloc(size)
    libc.free(found)
    return found

sizes = [1_100 + 9 * i for i in range(200)] + [3_500 + 700 * i for i in range(300)]
def in_holes():
    found = [libc.malloc(size) for size in sizes[::2]]
    for each in found:
        libc.free(each)
    return sum(each < large for each in found)

chunks = [libc.malloc(size) for size in sizes]
large, _ = libc.malloc(40 << 20), libc.malloc(1_500)
for chunk in [*chunks[::2], large]:
    libc.free(chunk)
"""


@pytest.mark.parametrize("done", [["plug"], ["plug", "plug"], ["plug", "open", "plug"]])
def test_holes_are_plugged_until_they_are_opened(done):
    script = """
before = in_holes()
for do in sys.argv[1:]:
    getattr(heap, do + "_holes")()
plugged, left = in_holes(), place(39 << 20) - large
heap.open_holes()
print(before, plugged, left, in_holes(), len(heap._plugs))
"""
    before, plugged, left, after, kept = map(int, run(HOLES + script, *done).split())
    # Lists take some as they grow, and leave some.
    assert min(before, after) > 240 and plugged < 5 and kept == 0
    assert 0 <= left < 1 << 20  # the large one serves, as it did


def test_a_compilation_takes_the_holes_and_leaves_none():
    """Programs of any length here; those that are quickly compiled do not care."""
    script = """
import jax
import jax.numpy as jnp
from slam_jax.training import host

host._LONG_LOWERING = host._LONG_COMPILATION = 0.0
host.tune_host()
lowered, seen = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((9, 9))), [len(heap._plugs)]
compiled = lowered.compile()
seen += [len(heap._plugs), in_holes()]
print(*seen)
"""
    open_at_first, plugged, in_holes = map(int, run(HOLES + script).split())
    assert open_at_first == 0 and plugged > 0 and in_holes < 5
