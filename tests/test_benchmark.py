"""The benchmark: what it compares, its arithmetic, its verdicts, and that it runs."""

import dataclasses
import functools
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command, error_of, here
from common import random_inputs, random_params, relative

from prenorm_jax import benchmark, sizes
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.bench import compiled, report, timing
from prenorm_jax.bench.contenders import BASELINES, CONTENDERS, NoNorm, Setting, baseline_of
from prenorm_jax.bench.tasks import TASKS, contenders_of, make_task
from prenorm_jax.bench.timing import ratios
from prenorm_jax.config import data_kind
from prenorm_jax.equivalence.convert import convert_params
from prenorm_jax.models import placement
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.coordinates import COORDINATES, KINDS
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh

SETTING = Setting("gpt:1x64", batch=2, length=16, dtype="float64")


@pytest.mark.slow
def test_all_contenders_but_none_compute_one_function():
    config = SETTING.run_config()
    config.model.param_dtype = "float64"
    pre_ln = Run.create(CONTENDERS["layernorm"].config(config)).computed
    params, tokens = random_params(pre_ln, 0), random_inputs(pre_ln)
    expected = jax.jit(build_model(pre_ln).apply)({"params": params}, tokens)
    variants = {("layernorm", kind): params for kind in KINDS}
    for norm, kind in itertools.product(("rmsnorm", "crmsnorm"), KINDS):
        variants[norm, kind] = convert_params(params, dataclasses.replace(pre_ln, coordinates=kind), norm)
    for name, contender in CONTENDERS.items():
        model = Run.create(contender.config(config)).computed
        if contender.wider:
            assert model.stream_width == pre_ln.d_model and model.head_dim == pre_ln.head_dim
            continue
        with contender.norms():
            given = variants["rmsnorm" if contender.folded else contender.norm, contender.coordinates]
            if contender.stand_in is NoNorm:
                given = {key: value for key, value in given.items() if key != "head_affine"}
            actual = jax.jit(build_model(model).apply)({"params": given}, tokens)
        if contender.stand_in is NoNorm:
            assert relative(actual, expected) > 0.1
        else:
            assert relative(actual, expected) < (1e-6 if name == "flax-one-pass" else 1e-9)
    assert COORDINATES["layernorm", ""].norm.__name__ == "LayerNorm"


def test_a_share_is_of_the_way_to_no_norm_and_not_given_where_noise_hides_it():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 2, size=40)  # of the machine: it is in all contenders of a round
    noise = lambda: rng.normal(1, 0.002, size=40)  # noqa: E731
    seconds = {"layernorm": drift * noise(), "rmsnorm": 0.955 * drift * noise(), "none": 0.95 * drift * noise()}
    result = ratios(seconds, "layernorm")
    assert result["rmsnorm"]["ratio"] == pytest.approx(0.955, abs=0.002)
    low, high = result["rmsnorm"]["share_interval"]
    assert low < 0.9 < high and high - low < 0.2
    noisy = {name: values * rng.normal(1, 0.05, size=40) for name, values in seconds.items()}
    hidden = ratios(noisy | {"none": 0.999 * drift * rng.normal(1, 0.05, size=40)}, "layernorm")
    assert hidden["rmsnorm"]["share"] is None


def result_of(seconds, baseline="layernorm"):
    rows = {
        name: {"about": "", "quartiles_ms": [1, 1, 1], "units_per_s": 1, "flops_share_of_peak": None}
        | {"temporaries_mib": 1, "compiled_mib": 1, "process_mib": None, **row}
        for name, row in ratios(seconds, baseline).items()
    }
    measured = {"rounds": len(seconds[baseline]), "in_a_row": 1, "matmul_peak_gflops": 1, "model_gflop": 1}
    measured |= {"unit": "token", "device": "x", "baseline": baseline, "contenders": rows}
    return SETTING.header("step") | measured


def test_verdicts():
    rng = np.random.default_rng(1)
    noisy = {name: rng.normal(1, 0.1, size=10) for name in ("layernorm", "rmsnorm", "none")}
    assert "not more than the noise" in report.table(result_of(noisy))
    clear = {"layernorm": np.full(10, 1.0), "rmsnorm": np.full(10, 0.902), "crmsnorm": np.full(10, 0.95)}
    clear["none"] = np.full(10, 0.9)
    text = report.table(result_of(clear))
    assert "rmsnorm saves 98% [98%, 98%] of that: at least .9 of it." in text
    assert "crmsnorm saves 50% [50%, 50%] of that: less than .9." in text
    for rounds in (1, 9):
        few = result_of({name: values[:rounds] for name, values in clear.items()})
        assert all(row["share"] is None and row["share_interval"] is None for row in few["contenders"].values())
        text = report.table(few)
        assert text.endswith(f"\n\nNo verdict: it needs 10 rounds at least, not {rounds}. More rounds.")


def test_without_a_layernorm_there_is_no_verdict_and_the_bound_is_no_baseline():
    assert baseline_of({"none": 1.0, "rmsnorm": 2.0, "crmsnorm": 3.0}) == "rmsnorm"
    assert baseline_of({"none": 1.0, "rmsnorm": 2.0, "layernorm": 4.0, "flax-one-pass": 3.0}) == "flax-one-pass"
    assert baseline_of({"none": 1.0}) == "none"
    result = result_of({"rmsnorm": np.full(10, 1.0), "none": np.full(10, 0.9)}, "rmsnorm")
    assert result["contenders"]["none"]["share"] is None
    *_, last = report.table(result).split("\n")
    assert last.startswith("No verdict: it needs a LayerNorm among the contenders: layernorm, layernorm-folded, flax-")


def test_decoding_is_timed_as_generate_does_it():
    """Position and keys are arguments: of constants XLA computes part of the step in advance."""
    config = SETTING.run_config()
    task = make_task("decode", CONTENDERS["rmsnorm"], config, make_mesh(config, jax.devices()[:1]))
    params, cache, position, keys_B = task.make_arguments()
    assert position == 8 and keys_B.shape == (2,)
    batch = {"tokens": jnp.zeros((2, 17), jnp.int32)}
    cache, chosen_B = task.compile(batch)(params, cache, position, keys_B, batch)
    assert chosen_B.shape == (2,) and jax.tree.leaves(cache)[0].shape == (2, 16, 64)


@pytest.mark.slow
def test_batches_are_real():
    """And those of the shapes that programs are compiled for."""
    batches = []
    for config in (SETTING.run_config(), Setting("vit:Ti/16", 3, 0, "float32").run_config()):
        batches.append(data_kind(config).sample(config))
        found = {name: (leaf.shape, leaf.dtype) for name, leaf in batches[-1].items()}
        assert found == {
            name: (leaf.shape, leaf.dtype) for name, leaf in data_kind(config).batch_shapes(config).items()
        }
    text, images = batches
    assert text["tokens"].shape == (2, 17) and len(np.unique(text["tokens"])) > 5
    assert images["images"].shape == (3, 224, 224, 3) and images["images"].std() > 20


def test_sizes_by_name():
    counts = {"Small": 125e6, "Medium": 350e6, "175B": 175e9}
    for name, count in counts.items():
        leaves = abstract_params(model_config(sizes.model(f"gpt3:{name}") | {"scan": True}))
        assert sum(leaf.value.size for leaf in leaves.values()) == pytest.approx(count, rel=0.02)


def test_it_refuses_what_it_does_not_know():
    here = ("-m", "prenorm_jax.benchmark")
    assert "--rounds=0 must be at least 1" in command(*here, "--rounds=0", status=2).stderr
    assert "--in-a-row=0 must be at least 1" in error_of(*here, "--in-a-row=0")
    assert "model 'gpt:6x100' is none of" in error_of(*here, "--model=gpt:6x100")
    assert "batchnorm is not among layernorm" in error_of(*here, "--only=batchnorm")
    assert "--task='speed' is not one of step, forward, prefill, decode, h" in error_of(*here, "--task=speed")
    for where in ((), ("--topology=v5e:2x2",)):
        error = error_of(*here, "--task=h", "--only=rmsnorm,none", *where)
        assert (
            "--task=h: none of rmsnorm, none converts anything: name some of rmsnorm-pre_ln, crmsnorm-pre_ln" in error
        )


def test_only_a_model_of_text_generates():
    config = Setting("vit:Ti/16", 1, 0, "float32", depth=1).run_config()
    with pytest.raises(PrenormError, match="--task=decode needs a model of text"):
        make_task("decode", CONTENDERS["rmsnorm"], config, make_mesh(config, jax.devices()[:1]))


def test_calls_in_a_row_are_waited_for_at_once(monkeypatch):
    events = []
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda result: events.append("wait"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 6.0 * events.count("wait"))
    seconds = timing.measure({"rmsnorm": lambda: events.append("call")}, rounds=2, in_a_row=3)
    assert events == ["call", "call", "call", "wait"] * (timing.WARM_UP + 2)
    assert seconds == {"rmsnorm": [2.0, 2.0]}
    result = result_of({"layernorm": np.ones(10), "none": np.ones(10)})
    assert "in a row" not in report.table(result)
    assert "step, 3 in a row, 10 rounds on x" in report.table(result | {"in_a_row": 3})


def called_with(monkeypatch, *flags):
    """What a command line has measured, where it comes to that: (setting, task, names, rounds, in_a_row)."""
    calls = []
    monkeypatch.setattr(timing, "benchmark", lambda *arguments: calls.append(arguments) or {})
    monkeypatch.setattr(report, "table", lambda result: "")
    monkeypatch.setattr(report, "write", lambda *arguments: [])
    benchmark.main(flags)
    return calls[0]


def test_quick_is_for_what_is_not_given(monkeypatch, tmp_path):
    out = f"--out={tmp_path}"
    setting, _, names, rounds, _ = called_with(monkeypatch, "--quick", "--only=rmsnorm,", out)
    assert (setting.model, setting.batch, setting.length, rounds) == ("gpt:2x64", 8, 32, 5) and names == ["rmsnorm"]
    given = ["--rounds=20", "--batch=2", "--model=gpt:6x384"]
    setting, *_, rounds, in_a_row = called_with(monkeypatch, *given, "--quick", out)
    assert (setting.model, setting.batch, setting.length, rounds, in_a_row) == ("gpt:6x384", 2, 32, 20, 1)


def test_what_cannot_be_compared_or_written_is_refused_before_it_is_measured(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for flag, message in (
        ("--only=", "--only=: nothing is not among layernorm, "),
        ("--only=,rmsnrm", "--only=,rmsnrm: rmsnrm is not among layernorm, "),
        (f"--out={tmp_path}/file", f"cannot write into {tmp_path}/file (Not a directory): choose another --out"),
        (f"--out={tmp_path}/file/in", f"cannot write into {tmp_path}/file/in (Not a directory): choose another --out"),
        ("--out=/proc/self/new", "cannot write into /proc/self/new (No such file or directory): choose another --out"),
    ):
        with pytest.raises(PrenormError) as error:
            called_with(monkeypatch, flag)
        assert message in str(error.value)


def test_the_peak_is_of_calls_that_take_longer_than_to_start_them(monkeypatch):
    clock, times = time.perf_counter, []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: times.append(clock()) or times[-1])
    peak = timing.peak_flops("float32", size=16)
    best = np.diff(np.reshape(times, (-1, 2)))[-10:].min()
    assert best >= 0.01
    assert peak * best / (2 * 16**3 * jax.device_count()) > 10  # products in a call


def test_the_memory_of_the_process_is_that_of_a_program_on_a_cpu_alone(monkeypatch):
    program = jax.jit(lambda: jnp.ones(9)).lower().compile()
    calls = []
    timing.memory(lambda: calls.append(1), program)
    assert calls
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert timing.memory(lambda: calls.append(1), program)["process_mib"] is None
    assert len(calls) == 1


def test_only_contenders_with_pre_ln_parameters_have_an_h():
    assert contenders_of("h", list(CONTENDERS)) == ["rmsnorm-pre_ln", "crmsnorm-pre_ln"]
    assert contenders_of("step", list(CONTENDERS)) == list(CONTENDERS)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_programs_are_compiled_for_the_devices_of_the_mesh(task, monkeypatch):
    """Else a topology's figures would be those of this machine's CPUs."""
    config, (first, *_, device), asked = SETTING.run_config(), jax.devices(), set()
    work = make_task(task, CONTENDERS["rmsnorm-pre_ln"], config, make_mesh(config, [device]))
    shapes = jax.eval_shape(work.arguments)
    ask = placement.computing_device
    monkeypatch.setattr(placement, "computing_device", lambda: asked.add(ask()) or ask())
    program = work.function.lower(*shapes, data_kind(config).batch_shapes(config)).compile()
    assert asked == (set() if task == "h" else {device})
    # Of inputs that a program does not read it knows none.
    devices = {d for leaf in jax.tree.leaves(program.input_shardings[0]) if leaf for d in leaf.device_set}
    assert devices == {device} != {first}


def test_a_program_of_which_the_compiler_states_no_cycles_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "topology_devices", lambda name: jax.devices()[:1])  # compiled for CPUs: none at all
    with pytest.raises(PrenormError, match="--topology=v5e:2x2 --task=h: the compiler states no cycles for it"):
        compiled.estimate("v5e:2x2", SETTING, "h", ["rmsnorm-pre_ln"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [task if task in ("step", "decode") else pytest.param(task, marks=pytest.mark.wide) for task in TASKS]
)
def test_it_measures(tmp_path, monkeypatch, task):
    monkeypatch.setattr(timing, "peak_flops", functools.partial(timing.peak_flops, size=64))  # here of eight devices
    only = "--only=layernorm,rmsnorm-pre_ln,none" + ",crmsnorm-aligned" * (task == "step")
    flags = ["--quick", "--model=gpt:1x64", f"--task={task}", only, f"--out={tmp_path}"]
    done = here("-m", "prenorm_jax.benchmark", *flags)
    result = json.loads((tmp_path / f"gpt-1x64-{task}-cpu.json").read_text())
    assert (tmp_path / f"gpt-1x64-{task}-cpu.png").stat().st_size > 10_000
    assert result["baseline"] in (*BASELINES, "rmsnorm-pre_ln") and result["jax"] == jax.__version__
    assert all(len(row["seconds"]) == 5 for row in result["contenders"].values())
    assert "median ms" in done.stdout
