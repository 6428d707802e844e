"""Whether the rates of a run depend on its evaluations and saves, as JSON: runs with and without take turns.

    PYTHONPATH=. python tests/measure_rates.py FOLDER [ROUNDS [KEY=VALUE of the configuration ...]]

tokens_per_s: the median over all lines of metrics.jsonl, of runs without any and of runs with both at every second
step; compared: the median of what `compare` says of each. ratios: the median over rounds of with / without, since a
machine that others use too is not equally quick in all; within: whether they are within a tenth. The machine must be
quiet: what waited for a disk is given the cores before what did not. After any pause, a sleep too, the system runs a
process's threads on one core for some 50 ms: the first step takes 8 ms more, the second 4. Of steps of 20 ms that would
be seen, so these take longer.
"""

import json
import statistics
import sys
from pathlib import Path

import jax

from configs.gpt_stdlib import get_config
from prenorm_jax.report.runs import compare
from prenorm_jax.train.loop import train
from prenorm_jax.train.workdir import configure_jax

folder, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
EVERY = {"without": 0, "with": 2}  # steps
found = {key: {name: [] for name in EVERY} for key in ("tokens_per_s", "compared")}
lines: dict[str, list[float]] = {name: [] for name in EVERY}
jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))

for number in range(rounds):
    for name in sorted(EVERY, reverse=bool(number % 2)):
        config = get_config()
        config.update({"steps": 20, "log_every": 2, "eval_every": EVERY[name], "checkpoint_every": EVERY[name]})
        config.data.update({"seq_len": 128, "holdout": 0.0005})
        config.model.update({"depth": 4, "d_model": 128})
        config.update_from_flattened_dict(
            {key: json.loads(value) for key, value in (a.split("=") for a in sys.argv[3:])}
        )
        configure_jax(config)
        train(config, workdir := folder / f"{name}-{number}")
        written = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_s"] for line in written if "tokens_per_s" in line]
        lines[name] += rates
        found["tokens_per_s"][name].append(statistics.median(rates))
        found["compared"][name].append(compare([workdir], folder / "report")["runs"][0]["units_per_s"])

result = {key: {name: statistics.median(values) for name, values in of.items()} for key, of in found.items()}
result["tokens_per_s"] = {name: statistics.median(values) for name, values in lines.items()}
result["ratios"] = {
    key: statistics.median(after / before for after, before in zip(of["with"], of["without"], strict=True))
    for key, of in found.items()
}
result["within"] = all(0.9 <= ratio <= 1.1 for ratio in result["ratios"].values())
print(json.dumps(result, indent=1))
