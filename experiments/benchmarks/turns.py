"""What the benchmarks share: measured processes that take turns, and what is said about the machine.

A worker builds one program, answers one JSON line when it is ready, then reads lines with a number of calls
and answers each with one JSON line. Nothing else goes to its standard output.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUIET = 0.05  # the most of the machine that others may use during a turn
TURN_SECONDS = 1.5  # a turn lasts about this long
# Each library's best form. A step's gigabytes come from the system anew each time, page by page. On Linux
# mmjax's processes keep them, as `mmjax train` does on CPU; the others get pages of 2 MiB, with which torch
# runs fastest (keeping memory slows it down), and mmjax where it writes text: a token reads all weights.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MEMORY = (
    "mmjax's processes keep freed memory as `mmjax train` does on CPU, except to write text; those and "
    f"all others ran with {' '.join(f'{name}={value}' for name, value in HUGE_PAGES.items())}"
)


def keeps_memory(library: str, form: str) -> bool:
    """Whether a process keeps the memory that its programs free."""
    return library == "mmjax" or form.endswith("memory kept")


@dataclasses.dataclass
class Program:
    """A case made ready in one library.

    Attributes:
        call: runs it once and waits for the result.
        result: numbers by which the libraries are compared; called after the first `call`s.
        compile_seconds: compiling, where that is a step of its own.
        facts: anything else worth a place in the table.
    """

    call: Callable[[], None]
    result: Callable[[], list[float]]
    compile_seconds: float | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def serve(make: Callable[[], Program]) -> None:
    """The worker: build the program, report, then time calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    program = make()
    first = timed(program.call, 1)["seconds"]
    warm = timed(program.call, 2)["seconds"]
    setup = {"first": first, "warm": warm, "compile": program.compile_seconds, "facts": program.facts}
    answer({**setup, "result": program.result()})
    for line in sys.stdin:
        answer({**timed(program.call, int(line)), "peak": peak_bytes()})


def busy_seconds() -> float | None:
    """CPU seconds that all processes of this machine have used; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """The memory that this process holds now; what it maps from files counts where it was touched."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timed(call: Callable[[], None], number: int) -> dict[str, float]:
    """Seconds and processor seconds per call, and the share of the machine that other processes took."""
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    wall = time.perf_counter() - start
    used = time.process_time() - own
    others = 0.0 if busy is None else (busy_seconds() or 0.0) - busy - used
    share = max(0.0, others) / (wall * (os.cpu_count() or 1))
    return {"seconds": wall / number, "processor": used / number, "others": share}


@dataclasses.dataclass
class Runner:
    """One measured process and what it has answered."""

    library: str
    form: str
    process: subprocess.Popen[str]
    setup: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)
    noisy: int = 0
    peak: int = 0

    @classmethod
    def start(
        cls, script: str, library: str, form: str, *arguments: str, writes_text: bool = False
    ) -> Runner:
        """Start a worker script of this folder and wait until it has compiled and run."""
        worker = [sys.executable, str(HERE / script), library, form, *arguments]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        keeps = keeps_memory(library, form) and not writes_text
        environment = {**os.environ, **({} if keeps else HUGE_PAGES)}
        process = subprocess.Popen(worker, env=environment, **pipes)
        runner = cls(library, form, process)
        runner.setup = runner._read()
        return runner

    def turn(self, retakes: int) -> None:
        """One turn of calls, taken again, up to `retakes` times, while others use the machine."""
        number = max(1, round(TURN_SECONDS / self.setup["warm"]))
        tries = []
        for _ in range(1 + retakes):
            assert self.process.stdin is not None
            print(number, file=self.process.stdin, flush=True)
            tries.append(self._read())
            self.peak = tries[-1]["peak"]
            if tries[-1]["others"] < QUIET:
                break
        best = min(tries, key=lambda t: t["others"])
        self.noisy += best["others"] >= QUIET
        self.seconds.append(best["seconds"])
        self.processor.append(best["processor"])

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    def numbers(self) -> dict[str, Any]:
        """What a results file keeps."""
        return {
            "library": self.library,
            "form": self.form,
            "median_seconds": self.median,
            "seconds": self.seconds,
            "processor_seconds": statistics.median(self.processor),
            "compile_seconds": self.setup["compile"],
            "first_call_seconds": self.setup["first"],
            "peak_bytes": self.peak,
            "noisy_turns": self.noisy,
            **self.setup["facts"],
        }

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.library} ({self.form}) ended early; its message is above")
        return json.loads(line)


def take_turns(start: Sequence[Callable[[], Runner]], rounds: int, retakes: int) -> list[Runner]:
    """Start all runners, let each take a turn `rounds` times over, and stop them."""
    runners: list[Runner] = []
    try:
        for make in start:
            runners.append(make())
            print(f"  {runners[-1].library} ({runners[-1].form}) ready", flush=True)
        for _ in range(rounds):
            for runner in runners:
                runner.turn(retakes)
    finally:
        for runner in runners:
            runner.stop()
    return runners


def ratio(ours: Runner, theirs: Runner) -> tuple[float, float, float]:
    """Median, least and largest of the turns' ratios, their time over ours."""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    flags: list[str] = []
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        model = f"{fields.get('model name', model)} (family {fields.get('cpu family', '?')})"
        present = set(fields.get("flags", "").split())
        flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in present]
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": flags,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def describe(about: dict[str, Any], rounds: int) -> str:
    """One line under a table's title."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    line = (
        f"{about['processor']}, {about['cores']} cores, {' '.join(about['instructions'])}; "
        f"Python {about['python']}, {versions}. Medians of {rounds} turns each."
    )
    return f"{line} {about['memory']}." if "memory" in about else line
