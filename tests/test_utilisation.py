"""How fast a run is, how much of a machine it uses, and the trace of its steps."""

import contextlib
import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import few_devices, lines_of
from common import TINY, random_inputs
from ml_collections import ConfigDict

from prenorm_jax import sizes
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.bench.contenders import Setting
from prenorm_jax.config import base_config
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.decoding import prefill
from prenorm_jax.models.flops import model_flops
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.train import metrics, utilisation
from prenorm_jax.train import tracing as profiling
from prenorm_jax.train.loop import train
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.tracing import parse_steps, traced
from prenorm_jax.train.utilisation import Utilisation, mfu


def test_flops_are_those_of_the_kernels_and_of_attention():
    config = model_config(Setting("gpt:2x64", batch=2, length=16, dtype="float64").run_config().model)
    kernels = sum(leaf.value.size for path, leaf in abstract_params(config).items() if path[-1] == "kernel")
    head = config.d_model * config.vocab_size  # tied
    attention = config.depth * 4 * 16 * 16 * config.d_model / 2
    assert model_flops(config, 2, 16, training=False) == 2 * (2 * 16 * (kernels + head) + attention)
    assert model_flops(config, 2, 16, training=True) == 3 * model_flops(config, 2, 16, training=False)
    # A window of w leaves w T - w²/2 of T²/2 pairs.
    windowed = [model_flops(model_config(vars(config) | {"window": size}), 2, 16, training=False) for size in (4, 16)]
    assert windowed[1] == model_flops(config, 2, 16, training=False)
    assert windowed[1] - windowed[0] == 2 * (attention - config.depth * 4 * (16 * 4 - 4 * 4 / 2) * config.d_model)
    by_turns = model_config(vars(config) | {"window": 4, "attention_pattern": "lg"})
    assert model_flops(by_turns, 2, 16, training=False) == sum(windowed) / 2
    vit = model_config(sizes.model("vit:Ti/16"))
    assert model_flops(vit, 1, 0, training=False) == pytest.approx(2 * 1.26e9, rel=0.02)  # multiply-adds of ViT-Ti/16


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_flops_are_those_that_xla_counts(name):
    keys = {"depth": 2, "d_model": 256, "heads": 4, "kv_heads": 2, "gated_mlp": True}
    own = {"family": "vit", "image_size": 96} if name == "vit" else {"vocab_size": 500, "max_len": 48}
    config = model_config(keys | own)
    model, inputs = build_model(config), random_inputs(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs)["params"])
    counted = jax.jit(lambda params: model.apply({"params": params}, inputs)).lower(params).cost_analysis()["flops"]
    counted -= 0.5 * config.causal * config.depth * 2 * 4 * 48**2 * config.d_model  # the half that is masked
    assert 1 <= counted / model_flops(config, 2, 48, training=False) < 1.05  # it counts what is no product, too


def test_a_prompt_is_read_without_the_logits_of_all_but_its_last_token():
    config = model_config({"depth": 1, "d_model": 64, "heads": 1, "vocab_size": 5000, "max_len": 64})
    model, tokens = build_model(config), jax.ShapeDtypeStruct((2, 64), "int32")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 64), int))["params"])
    counted = prefill.lower(model, params, tokens, 64).cost_analysis()["flops"]
    assert counted < 1.3 * model_flops(config, 2, 64, training=False, logits=1)  # attention in blocks: more than half
    assert counted < 0.3 * model_flops(config, 2, 64, training=False)


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    h100 = "NVIDIA H100 80GB HBM3"
    assert mfu(989.4e12, 1, 1, h100, "bfloat16") == pytest.approx(1)
    assert mfu(989.4e12, 2, 4, h100, "bfloat16") == pytest.approx(1 / 8)
    assert mfu(989.4e12, 1, 1, h100, "float32") == pytest.approx(2)  # TF32
    assert mfu(197e12, 0.5, 4, "TPU v5 lite", "bfloat16") == pytest.approx(0.5)
    for kind, dtype in (("cpu", "float32"), ("NVIDIA H100 of tomorrow", "bfloat16"), (h100, "float64")):
        assert mfu(1e12, 1, 1, kind, dtype) is None


def run_config(text: Path) -> ConfigDict:
    config = base_config()
    config.steps, config.batch_size, config.log_every = 6, 8, 2
    config.data.path, config.data.seq_len = str(text), 4
    config.model.update(TINY | {"vocab_size": 257, "dtype": "float32", "param_dtype": "float32"})
    return config


class Machine:
    """A device that takes a second a step, and its host, which has the time and waits for the device where it asks."""

    def __init__(self, queues: bool):
        self.now, self._free, self._queues = 1000.0, 0.0, queues

    def step(self) -> SimpleNamespace:
        """Begins one, and where steps are not queued ends it; the loss, which is there when the step has ended."""
        end = self._free = max(self.now, self._free) + 1
        if not self._queues:
            self.wait(end)
        return SimpleNamespace(__array__=lambda: self.wait(end))

    def wait(self, end: float) -> np.ndarray:
        self.now = max(self.now, end)
        return np.float64(0.5)


@pytest.mark.parametrize("queues", [False, True])
@pytest.mark.parametrize(("log_every", "pause_every"), [(2, 2), (10, 10), (7, 10), (3, 1), (10, 0), (100, 45)])
def test_rates_are_steps_over_the_time_between_their_ends(
    monkeypatch, tmp_path, capsys, queues, log_every, pause_every
):
    """Whatever pauses there are, and wherever they fall: none of them, nor the last step before one, makes another."""
    machine = Machine(queues)
    monkeypatch.setattr(
        metrics, "time", SimpleNamespace(perf_counter=lambda: machine.now, monotonic=lambda: machine.now)
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if queues else "cpu")
    config = base_config()
    config.steps, config.log_every, config.tensorboard = 95, log_every, False
    data = SimpleNamespace(unit="token", units_per_batch=lambda config: 100)
    clock = metrics.StepClock()
    with clock.stopped():
        machine.now += 7
    with metrics.MetricsWriter(tmp_path, 0, config, data, Utilisation(3e9, 1, "cpu", "float32", True), clock) as writer:
        for step in range(1, 96):
            writer.add(step, {"loss": machine.step()}, wait=step == 1)
            if pause_every and step % pause_every == 0:
                with writer.pause():
                    machine.now += 20
                    writer.write(step, {"eval_loss": 0.25, "eval_tokens": 7})
    lines = [line for line in lines_of(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 96))
    assert "tokens_per_s" not in lines[0], "the first step of a start warms up"
    assert {line["tokens_per_s"] for line in lines[1:]} == {100.0}
    assert {line["model_flops_per_s"] for line in lines[1:]} == {3e9}
    said = capsys.readouterr().err
    assert "\r" not in said, "a bar where there is no terminal"
    shown = [line for line in said.splitlines() if "held-out" not in line]
    assert shown[0] == "step 1 of 95: loss 0.5000" and shown[-1].startswith("step 95 of 95: loss")
    assert said.count("held-out loss 0.25\n") == (95 // pause_every if pause_every else 0)
    if not pause_every:
        numbers = [int(line.split()[1]) for line in shown]
        assert all(30 <= after - before <= 41 for before, after in itertools.pairwise(numbers[:-1]))


@pytest.mark.slow
def test_a_run_logs_it_says_how_it_is_counted_and_traces_the_steps_asked_for(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(utilisation.PEAK_TFLOPS, "cpu", {"float32": 0.5})
    config = run_config(text)
    config.profile = "3:5"
    with few_devices(2):
        train(config, tmp_path / "run")
    flops = model_flops(model_config(config.model), 8, 4, training=True)
    lines = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 6
    for line in lines[1:]:
        assert line["model_flops_per_s"] / line["tokens_per_s"] == pytest.approx(flops / (8 * 4))
        assert line["mfu"] == pytest.approx(line["model_flops_per_s"] / (2 * 0.5e12))
    said = capsys.readouterr().err
    spoken = [line for line in said.splitlines() if line.startswith("speed: ")]
    assert len(spoken) == 1 and f"{flops:.4g} model FLOPs a step" in spoken[0]
    assert "2 × cpu in float32: mfu is of 0.5 TFLOP/s each" in spoken[0]
    assert "% mfu" in said
    assert f"steps 3 to 4 are traced in {tmp_path / 'run' / 'profile'}" in said

    (trace,) = (tmp_path / "run" / "profile").glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event}
    assert steps == {"3", "4"}
    assert list(trace.parent.glob("*.xplane.pb"))  # what TensorBoard reads


def test_without_a_known_peak_there_is_no_mfu():
    def on_devices(count: int, config: ConfigDict) -> Utilisation:
        return Utilisation.of(Run.create(config, make_mesh(config, jax.devices()[:count])))

    used = on_devices(4, base_config())
    assert used.rates(2.0) == {"model_flops_per_s": used.flops / 2}
    assert "the peak is not known, so no mfu" in used.describe() and "\n" not in used.describe()
    images = on_devices(1, base_config("vit"))
    assert "4 · tokens · length" in images.describe() and "2 · tokens · length" in used.describe()


def test_steps_to_trace():
    assert list(parse_steps("10:13", 20)) == [10, 11, 12] and list(parse_steps("20:99", 20)) == list(range(20, 99))
    assert not parse_steps(None, 20)
    for bad in ("10", "3:3", "5:3", "0:4", "a:b", "-1:4", "21:23", "3:5:7", " 3:5", ""):
        with pytest.raises(PrenormError, match=r"names no steps of 1 to 20: give FIRST:END, such as 10:13") as caught:
            parse_steps(bad, 20)
        assert f"profile={bad!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "start", "end", "expected"),
    [
        ("3:5", 0, 6, [1, 2, "start", 3, 4, "stop", 5, 6]),
        ("3:5", 3, 6, ["start", 4, "stop", 5, 6]),  # gone on with in the middle
        ("3:9", 0, 4, [1, 2, "start", 3, 4, "stop"]),  # the run ends before
        ("3:5", 4, 6, [5, 6]),  # gone on with after
        ("3:5", 0, 2, [1, 2]),  # stopped before
        ("1:2", 0, 1, ["start", 1, "stop"]),
        (None, 0, 2, [1, 2]),
    ],
)
def test_the_trace_starts_and_stops_around_the_steps(monkeypatch, tmp_path, capsys, profile, start, end, expected):
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    with traced(lambda number: happened.append(number) or number, profile, start, end, tmp_path) as step:
        for number in range(start + 1, end + 1):
            assert step(number) == number
    assert happened == expected
    said = capsys.readouterr().err
    assert ("are traced in" in said) == ("start" in expected)
    assert ("are not traced: this start trains steps" in said) == bool(profile and "start" not in expected)


def test_each_of_many_processes_has_a_folder_for_its_trace(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(jax.profiler, "start_trace", folders.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(profiling, "count_processes", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with traced(lambda: 1, "1:2", 0, 1, tmp_path) as step:
        step()
    assert folders == [tmp_path / "process_3"]


def test_to_start_and_to_end_a_trace_takes_no_step_any_time(monkeypatch, tmp_path):
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))

    @contextlib.contextmanager
    def untimed():
        happened.append("[")
        yield
        happened.append("]")

    with traced(lambda: happened.append("step"), "1:2", 0, 1, tmp_path, untimed) as step:
        step()
    assert happened == ["[", "start", "]", "step", "[", "stop", "]"]


def test_a_trace_is_stopped_by_an_error_too_and_one_that_fails_ends_no_run(monkeypatch, tmp_path, capsys):
    def fail(*arguments: object) -> None:
        raise RuntimeError("another is under way\nand more")

    stopped = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: stopped.append(True))
    with pytest.raises(KeyboardInterrupt), traced(lambda: 1, "1:9", 0, 9, tmp_path) as step:
        step()
        raise KeyboardInterrupt
    assert stopped == [True]
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", fail)
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", fail)
    with traced(lambda: 1, "1:3", 0, 3, tmp_path) as step:
        assert [step(), step(), step()] == [1, 1, 1]
    assert "warning: the profiler does not start: another is under way and more\n" in capsys.readouterr().err
