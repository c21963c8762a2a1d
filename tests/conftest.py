"""Runs Triton kernels in the interpreter where there is no GPU; decided here, before anything can import Triton.

And the invariant of every test, whatever it is about: no engine and no server that it leaves behind owns anything.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import pytest


def has_gpu() -> bool:
    """Asks the driver itself: neither torch nor Triton may be imported before the environment is settled."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


HAS_GPU = has_gpu()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"  # tests run beside each other: more threads would only wait for one another
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton 3.6; later versions warn and change it
# numpy's products carry the interpreter's; with several threads their last bits depend on how busy the machine is.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

CORES: pytest.StashKey[Any] = pytest.StashKey()
TESTS_OF_ENGINES = ("engine", "parallel", "specdec")


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: a process per core, of which each may hold a GiB; alone where all would share a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if HAS_GPU or cores == 1 else min(4, cores)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    torch = pytest.importorskip("torch")
    return torch.device("cuda" if HAS_GPU else "cpu")


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    # No engine is built before, and where no test has imported torch none will be.
    if "torch" in sys.modules:
        from leak_check import Cores

        session.config.stash[CORES] = cores = Cores()
        cores.watch()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After every test no engine or server owns a block or a request; where engines are tested, nothing is held."""
    before = None
    if request.path.parent.name in TESTS_OF_ENGINES:
        from leak_check import Holdings

        before = Holdings.now()
    yield
    if CORES in request.config.stash:
        request.config.stash[CORES].check()
    servers = sys.modules.get("server_process")
    for server in list(servers.ServerProcess.running) if servers is not None else ():
        server.check_idle()
    if before is not None:
        before.check()
