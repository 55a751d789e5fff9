"""The findings of `python -m tests.gpu`: measurements, targets that are met or missed, and failures."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.tables import show


@dataclass
class Report:
    """The findings of all parts. A failure is an error of correctness; a missed target of speed is none."""

    judged: bool = True
    """Whether targets are met or missed; without a GPU they are only listed."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What each part measured, by the part's name."""
    targets: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each part."""

    def fail(self, message: str) -> None:
        """Note a failure, and print it at once."""
        self.failures.append(message)
        print(f"FAILED: {message}", flush=True)

    def skip(self, message: str) -> None:
        """Note what is not measured, and why."""
        self.skipped.append(message)
        print(f"skipped: {message}", flush=True)

    def target(self, name: str, value: float, limit: float, at_least: bool = False) -> None:
        """Note a measurement and its target: `limit` at most, or at least."""
        is_met = value >= limit if at_least else value <= limit
        result = ("met" if is_met else "missed") if self.judged else "not judged"
        bound = "at least" if at_least else "at most"
        self.targets.append({"target": name, "measured": value, "bound": bound, "limit": limit, "result": result})

    def run(self, part: str, measure: Callable[[], Any]) -> None:
        """Run one part. An exception is a failure of this part, and the parts after it still run."""
        print(f"\n{part} ...", flush=True)
        began = time.perf_counter()
        try:
            self.measured[part] = measure()
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{part}: {type(error).__name__}: {error}")
        self.seconds[part] = time.perf_counter() - began
        print(f"{part}: {self.seconds[part]:.1f} s", flush=True)

    def close(self) -> int:
        """Print targets, seconds and failures as tables; return the command's exit code."""
        if self.targets:
            show("Targets", self.targets)
        show("Seconds", [{"part": part, "s": seconds} for part, seconds in self.seconds.items()])
        if self.skipped:
            show("Skipped", [{"skipped": message} for message in self.skipped])
        if self.failures:
            show("Failures", [{"failure": message} for message in self.failures])
        return 1 if self.failures else 0

    def as_json(self) -> dict[str, Any]:
        """Return everything for the last line."""
        return {
            "measured": self.measured, "targets": self.targets, "seconds": self.seconds, "skipped": self.skipped,
            "failures": self.failures,
        }  # fmt: skip
