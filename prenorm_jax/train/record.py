"""`run.json`: what is known about a run beside its configuration."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import read_json, write_json
from prenorm_jax.train.run import Run

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


class RunRecord:
    """`run.json`: what is known about a run beside its configuration. One that is damaged is said, and starts anew."""

    def __init__(self, workdir: Path):
        self._path = workdir / "run.json"
        self._values: dict[str, Any] = {}
        if self._path.exists():
            try:
                self._values = read_json(self._path)
            except PrenormError as error:
                say(f"warning: {error}; the run's history starts anew")

    @property
    def last_saved(self) -> int:
        """The last step whose checkpoint is known to be complete; 0 if none is."""
        return self._values.get("last_saved", 0)

    @property
    def first_step(self) -> int:
        """Where the training in this folder began: 0, or the step of a converted checkpoint."""
        return self._values["sessions"][0]["step"]

    def start(self, run: Run, step: int, counts: dict[str, int]) -> None:
        """Adds a start at `step`; says so if the norm is another than before."""
        sessions = self._values.get("sessions", [])
        norm = run.computed.norm
        if sessions and sessions[-1]["norm"] != norm:
            say(f"the norm is switched from {sessions[-1]['norm']} to {norm} after step {step}")
        made_with = {"device": device_name(), "versions": {name: version(name) for name in LIBRARIES}}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        session = {"step": step, "norm": norm, "date": date, **made_with}
        summary = {"norm": norm, "parameters": counts, **made_with, "last_saved": step}
        self._values = {**self._values, **summary, "sessions": [*sessions, session]}
        write_json(self._path, self._values)

    def saved(self, steps: list[int]) -> None:
        """Notes that the checkpoints of these steps are complete."""
        if steps and steps[-1] > self.last_saved:
            self._values["last_saved"] = steps[-1]
            write_json(self._path, self._values)


def device_name() -> str:
    """Such as "2 × NVIDIA H100", or "1 × cpu"."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
