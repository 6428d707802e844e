"""A finished run, and up to which step two of them are trained alike but for the norm."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

# These may differ: they are what is compared, and what a native run's own parameters need.
COMPARED_KEYS = {"model.norm", "parameterization", "model.norm_affine", "model.final_norm_affine"}
COMPARED_KEYS |= {"model.coordinates", "model.coordinates_entry"}
COMPARED_KEYS |= {"model.reader_bias", "model.qkv_bias", "model.head_bias", "model.layer_scale"}

# These leave the losses as they are but for rounding; where they do not, each start of a run has them in its settings.
BOOKKEEPING_KEYS = {"stop_at", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
BOOKKEEPING_KEYS |= {"profile", "on_nonfinite", "grace_seconds", "data.cache"}
BOOKKEEPING_KEYS |= {"accumulate", "mesh.fsdp", "mesh.tensor", "mesh.largest_replicated"}
BOOKKEEPING_KEYS |= {"model.scan", "model.remat", "model.attention_kernel"}

# Where the data lie, which are the same data if their digests are.
PLACES = {"data.path", "data.eval_path", "data.tokenizer"}

SAME_RATE = 1e-6  # by more of the largest learning rate two of one schedule do not differ, on whatever device


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a workdir say. `config` and `info` (run.json) are flat: {"model.norm": ...}."""

    name: str
    workdir: Path
    config: dict[str, Any]
    info: dict[str, Any]
    sessions: list[dict[str, Any]]  # the starts of run.json, as they are
    unit: str  # what a loss is the mean over, and speed counts: token, image
    losses: dict[int, float]  # by step; NaN or infinite where training diverged
    evals: dict[int, float]
    top1s: dict[int, float]  # of images: the share classified correctly
    rates: dict[int, float]  # units per second
    learning_rates: dict[int, float]
    skipped: dict[int, bool]  # whether the update was left out, since loss, gradient or update were not finite

    @functools.cached_property
    def starts(self) -> list[dict[str, Any]]:
        """The sessions that later ones left standing: each has overwritten those that started no earlier."""
        kept: list[dict[str, Any]] = []
        for session in self.sessions:
            kept = [earlier for earlier in kept if earlier["step"] < session["step"]] + [session]
        return kept

    def changes(self) -> list[dict[str, Any]]:
        """What is computed otherwise after which step: {"step", "key", "from", "to"}."""
        return [
            {"step": after["step"], "key": key, "from": before["settings"][key], "to": value}
            for before, after in itertools.pairwise(self.starts)
            for key, value in after.get("settings", {}).items()
            if before.get("settings", {}).get(key, value) != value
        ]

    def settings_after(self, step: int) -> dict[str, Any]:
        """Those of the start that trained the step after this one, as far as they are known."""
        return next((start.get("settings", {}) for start in reversed(self.starts) if start["step"] <= step), {})


def alike_until(run: Run, base: Run) -> tuple[int | None, str]:
    """The last step up to which two runs are trained alike but for the norm, and what parts them. (None, ""): nothing.

    A loss that is not finite in one of them does not part them: that is a difference of their curves.
    """
    found = [(0, f"their configurations differ in {', '.join(keys)}")] if (keys := parting_keys(run, base)) else []
    for step in sorted({start["step"] for start in (*run.starts, *base.starts)}):
        one, other = run.settings_after(step), base.settings_after(step)
        known = one.keys() & other.keys() - {"steps"}  # which the learning rates tell
        if keys := sorted(key for key in known if one[key] != other[key]):
            found.append((step, f"they differ in {', '.join(keys)}"))
    steps = sorted(run.losses.keys() & base.losses.keys())
    rates = [(step, run.learning_rates.get(step), base.learning_rates.get(step)) for step in steps]
    rates = [pair for pair in rates if None not in pair]
    least = SAME_RATE * max((max(map(abs, pair)) for _, *pair in rates), default=0)
    found += [(step - 1, "their learning rates differ") for step, one, other in rates if abs(one - other) > least][:1]
    found += [
        (step - 1, f"{run.name if run.skipped[step] else base.name} left out the update of step {step:,}")
        for step in steps
        if run.skipped[step] != base.skipped[step] and math.isfinite(run.losses[step] + base.losses[step])
    ][:1]
    until, parted_by = min(found, default=(math.inf, ""))
    return (None, "") if until >= max(steps) else (until if until >= min(steps) else 0, parted_by)


def parting_keys(run: Run, base: Run) -> list[str]:
    """The keys, norm aside, that part two runs from the start; "data": what lies there differs.

    A key that one of them lacks, being of an earlier version, is at its default there, as far as is known.
    """
    data = [one.info.get("data") for one in (run, base)]
    known = None not in data
    ignored = COMPARED_KEYS | BOOKKEEPING_KEYS | (PLACES if known else set())
    ignored |= {"steps"} if run.learning_rates and base.learning_rates else set()
    keys = (run.config.keys() & base.config.keys()) - ignored
    differing = sorted(key for key in keys if run.config[key] != base.config[key])
    return differing + (["data"] if known and data[0] != data[1] else [])
