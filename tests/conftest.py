"""Eight emulated devices for every test: what stands here has to be set before jax is imported."""

import os
import signal
from collections.abc import Iterator

# A shell's background job starts with Ctrl-C ignored, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # The devices share the machine's cores and wait long for each other on a busy one; the defaults (40 s)
    # would end the whole process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_cpu_collective_timeout_seconds=300",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
# Each waiting collective holds a thread of XLA's pool. With one thread per device the devices can wait for
# collectives in different orders until no thread is left: a deadlock that a larger pool does not have.
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

# What these folders hold against float64 and against another library are the numbers that users get.
OPTIMISED = {"losses", "parity"}
QUICK = "jax_disable_most_optimizations"


@pytest.fixture(scope="module", autouse=True)
def _quick_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of the tests' time would be LLVM's, which optimises programs that run once: it is asked not to.

    Compiled programs of one file are of no use to the next; kept, they would fill gigabytes.
    """
    jax.config.update(QUICK, request.path.parent.name not in OPTIMISED)
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Compile what a test jits as users do."""
    jax.config.update(QUICK, False)
    yield
    jax.config.update(QUICK, True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dear files first: a worker that gets one of them last leaves the other alone for minutes."""
    items.sort(key=lambda item: item.path.parent.name != "training")
