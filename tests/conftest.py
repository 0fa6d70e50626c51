"""Eight emulated devices for every test: the flags have to be set before jax is imported."""

import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Eight devices share the machine's cores: on a busy one they wait long for each other, and the defaults
    # (40 s) would end the whole process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_cpu_collective_timeout_seconds=300",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
