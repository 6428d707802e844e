"""An imported GPT-2 beside transformers: the same greedy tokens, and what forward and decoding take.

    PYTHONPATH=. python tests/measure_imported_gpt2.py trained        # the GPT-2 of microformer_mgm 0.5.8, by pip
    PYTHONPATH=. python tests/measure_imported_gpt2.py path/to/gpt2   # any GPT-2 in a folder
    PYTHONPATH=. python tests/measure_imported_gpt2.py small          # GPT-2 Small's shape, at random

Needs torch and transformers. First, in float64 and under each norm, 480 tokens (or as many as there are positions for)
after a prompt of 12 ids, end-of-text ignored: the exit status is 1 unless they are the library's. Then, in float32,
each forward pass and each decoding in turn, on one core, of which both get one thread: CPU time, and wall time, which
says little on a machine that others use. One after the other, so that what slows one slows all; medians of the rounds,
and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before any library counts the cores
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from prenorm_jax import build_model, convert_config, convert_params, load  # noqa: E402
from prenorm_jax.base.allocator import keep_freed_memory  # noqa: E402
from prenorm_jax.models.config import NORMS  # noqa: E402
from prenorm_jax.models.decoding import as_read, generate  # noqa: E402

PROMPT, TRAINED = 12, "microformer_mgm==0.5.8"


def trained(folder: Path) -> Path:
    """The folder in a wheel of the package index with a GPT-2 of 8 blocks of width 256, as PyTorch's .bin."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TRAINED]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "mgm/resources/general_model"


def small(folder: Path) -> Path:
    """A GPT-2 of the default shape, 124 M parameters, at random."""
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder / "small")
    return folder / "small"


def library(folder: Path, dtype: torch.dtype) -> Any:
    """The model by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def added_by_library(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Its greedy continuation of exactly so many tokens."""
    given = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()


def imports(folder: Path, dtype: str) -> dict[str, tuple[Any, Any]]:
    """Norm -> the model and its parameters, as decoding reads them."""
    config, params = load(folder, dtype=dtype)
    found = {}
    for norm in NORMS:
        of_norm = config if norm == "layernorm" else convert_config(config, norm)
        converted = params if norm == "layernorm" else convert_params(params, config, norm)
        found[norm] = build_model(of_norm), as_read(converted, of_norm)
    return found


def added(model: Any, params: Any, ids: list[int], tokens: int) -> list[int]:
    return [int(next_B[0]) for next_B in generate(model, params, [ids], tokens)]


def check_tokens(folder: Path, ids: list[int]) -> bool:
    """Prints, for each norm, how many tokens are the library's from the first on; whether all are."""
    with jax.enable_x64(True):
        ours = imports(folder, "float64")
        count = min(480, next(iter(ours.values()))[0].config.max_len - PROMPT)
        expected, same = added_by_library(library(folder, torch.float64), ids, count), True
        print(f"float64: {count} tokens of transformers, {len(set(expected))} different ones")
        for norm, (model, params) in ours.items():
            found = added(model, params, ids, count)
            equal = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if len(set(pair)) == 2), count)
            print(f"  {norm}: the first {equal} are the same")
            same &= found == expected
    return same


def tasks(folder: Path, ids: list[int], length: int, tokens: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Task -> contender -> a function that does it once."""
    theirs, ours = library(folder, torch.float32), imports(folder, "float32")
    inputs = np.resize(ids, (1, length))
    given = torch.tensor(inputs)
    forward = jax.jit(lambda model, params, x: model.apply({"params": params}, x), static_argnums=0)
    calls: dict[str, dict[str, Callable[[], Any]]] = {f"forward 1x{length}": {}, f"{tokens} tokens": {}}
    one, other = calls.values()

    @torch.no_grad()
    def library_forward() -> None:
        theirs(given, use_cache=False)

    one["transformers"] = library_forward
    other["transformers"] = lambda: added_by_library(theirs, ids, tokens)
    for norm, (model, params) in ours.items():
        one[norm] = lambda model=model, params=params: forward(model, params, inputs).block_until_ready()
        other[norm] = lambda model=model, params=params: added(model, params, ids, tokens)
    return calls


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Prints each contender's time, and its share of transformers'."""
    for call in calls.values():
        call()  # compiles
    cpu, wall = ({name: [] for name in calls} for _ in range(2))
    for number in range(rounds):
        names = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
        for name in names:
            start = time.process_time(), time.perf_counter()
            calls[name]()
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
    for name in calls:
        shares = [np.median(np.divide(times[name], times["transformers"])) for times in (cpu, wall)]
        milliseconds = [1000 * np.median(times[name]) for times in (cpu, wall)]
        print(
            f"  {name:<13} CPU {milliseconds[0]:8.1f} ms ({shares[0]:.2f} of transformers')"
            f"   wall {milliseconds[1]:8.1f} ms ({shares[1]:.2f})"
        )


def main() -> None:
    """Parses, checks, measures. Ends with status 1 if the tokens are others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained, small, or a folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100, help="to decode")
    parser.add_argument("--length", type=int, default=512, help="of the forward pass")
    parser.add_argument("--skip", choices=("tokens", "times"), help="leave one half out")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with tempfile.TemporaryDirectory() as place:
        made = {"trained": trained, "small": small}.get(args.model, lambda _: Path(args.model))
        folder = made(Path(place))
        config, _ = load(folder)
        ids = np.random.default_rng(0).integers(4, config.vocab_size, size=PROMPT).tolist()
        same = args.skip == "tokens" or check_tokens(folder, ids)
        if args.skip != "times":
            for name, calls in tasks(folder, ids, args.length, args.tokens).items():
                print(f"{name}, float32, {args.rounds} rounds in turn on one core, load {os.getloadavg()[0]:.1f}")
                measure(calls, args.rounds)
    sys.exit(not same)


if __name__ == "__main__":
    main()
