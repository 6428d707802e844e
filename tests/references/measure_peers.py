"""Other libraries' networks made centring-free by us, by Brevitas and by SliceGPT: the tables of the docs.

    make measure-peers                              # sets up .venv-peers, measures, writes README.md and docs/
    make measure-peers PEERS="--slicegpt=FOLDER"    # FOLDER: a clone of github.com/microsoft/TransformerCompression

Every network is a tiny one of its library's own class with awkward numbers, in float64: those of the tests beside this
file, and two that have no equivalent. Each tool turns the LayerNorms of a fresh one into RMSNorms:

    ours      prenorm_jax.load, and convert_params to rmsnorm and to crmsnorm: of two errors the larger
    Brevitas  as brevitas_examples/llm/main.py does for --ln-affine-merge --convert-layernorm-to-rmsnorm: dynamo's trace
              of the model, apply_layernorm_affine_merge, apply_layernorm_to_rmsnorm. Of encoders and of images, which
              that example does not load, the same calls on the same kind of trace
    SliceGPT  fuse_modules of slicegpt/layernorm_fusion.py with the library's own adapter, of OPT and Phi-2 alone; the
              slicing that it prepares is not done

The verdict is by the outputs, relative to the largest: exact below 1e-9. Norms are counted that centre no more; what
stays a LayerNorm here (on an embedding, behind the pooling) is not on the stream.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints as theirs
import jax
import numpy as np
from common import logits, relative

import prenorm_jax
from prenorm_jax import PrenormError, convert_config, convert_params
from prenorm_jax.base.errors import first_line
from prenorm_jax.interop.explain import explain

ROOT = Path(__file__).parents[2]
EXACT = 1e-9
VERDICTS = ("exact", "exact in part", "folded nothing", "refused by name", "silently wrong", "crashed")
NO_EQUIVALENT = {"opt-350m": {"do_layer_norm_before": False}, "opt-no-final-norm": {"_remove_final_layer_norm": True}}


class Network(NamedTuple):
    """A network of another library.

    Attributes:
      name: of the case, in the tests, behind what kind it is of.
      folder: where its library has written it.
      source: what ours are told to read: the folder, or a tower of what is in it.
      inputs: as ours take them.
      expected: its outputs.
      run: its outputs again, of the model in the folder, as the library loads it.
      output: which of them, by its class's name for it; None: the pooled one of the tower within; "": the only one.
    """

    name: str
    folder: Path
    source: str | Path
    inputs: np.ndarray
    expected: np.ndarray
    run: Callable[[Any], np.ndarray]
    output: str | None

    def tower(self, model: Any) -> Any:
        """The part of it that ours is."""
        if self.output is not None:
            return model
        return getattr(model, "text_model" if self.inputs.ndim == 2 else "vision_model")

    def given(self, model: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the tower is called with."""
        calls: list[Any] = []
        hook = self.tower(model).register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        self.run(model)
        hook.remove()
        return calls[0]

    def off(self, found: Any) -> float:
        """How far what the tower returns is from what is expected."""
        if hasattr(found, "keys"):
            found = found[self.output or "pooler_output"]
        return relative(found.numpy(), self.expected)


def networks(place: Path, only: str) -> Iterator[Network]:
    """Those of the tests of texts, encoders and images, as far as these are there, and whose names `only` matches."""

    class Factory:
        @staticmethod
        def mktemp(name: str) -> Path:
            return Path(tempfile.mkdtemp(prefix=name, dir=place))

    for kind in ("text", "encoder", "image"):
        if not (Path(__file__).parent / f"test_{kind}_checkpoints.py").is_file():
            continue
        tests = importlib.import_module(f"test_{kind}_checkpoints")
        for name in filter(re.compile(only).search, [*tests.CASES, *getattr(tests, "TIMM_CASES", [])]):
            yield _network(kind, name, inspect.unwrap(tests.case)(types.SimpleNamespace(param=name), Factory))
    tests = importlib.import_module("test_text_checkpoints")
    for name in filter(re.compile(only).search, NO_EQUIVALENT):
        model, tokens = theirs.make("opt", **tests.OPT | NO_EQUIVALENT[name]), np.arange(tests.T)[None]
        model.save_pretrained(folder := Factory.mktemp(name))
        yield _network("text", name, (folder, tokens, theirs.logits(model, tokens), None))


def _network(kind: str, name: str, made: Any) -> Network:
    """What the tests' fixture has made."""
    name = f"{kind}/{name}"
    if kind == "encoder":
        tests, (tokens, mask) = importlib.import_module("test_encoder_checkpoints"), made.inputs[0]
        run = functools.partial(tests.outputs, output=made.output, tokens=tokens, mask=mask)
        return Network(name, made.folder, made.name, tokens, made.expected[0], run, made.output)
    folder, inputs, expected, output = made
    if kind == "text":
        return Network(
            name, folder, folder, inputs, expected, functools.partial(theirs.logits, tokens=inputs), "logits"
        )
    run = functools.partial(theirs.features, images=inputs, output=output)
    return Network(name, folder, folder, inputs, expected, run, output)


class Outcome(NamedTuple):
    """What a tool made of a network.

    Attributes:
      verdict: one of VERDICTS.
      norms: how many centre no more, of how many.
      error: of its outputs, relative to the largest.
      tie: of a tied head "kept" or "broken".
      parameters: how many more there are.
      note: why it was refused or has crashed.
    """

    verdict: str
    norms: tuple[int, int] | None = None
    error: float | None = None
    tie: str = ""
    parameters: int | None = None
    note: str = ""


def verdict(error: float, changed: int, norms: int) -> str:
    """By how far the outputs are off, and how many of the norms centre no more."""
    if not error < EXACT:
        return "silently wrong"
    return "exact" if changed == norms else "exact in part" if changed else "folded nothing"


def ours(network: Network) -> Outcome:
    """To rmsnorm, and to crmsnorm."""
    try:
        report = explain(network.source)
        config, params = prenorm_jax.load(network.source)
        errors = []
        for to in ("rmsnorm", "crmsnorm"):
            converted = convert_params(params, config, to)
            errors.append(relative(logits(convert_config(config, to), converted, network.inputs), network.expected))
    except PrenormError as error:
        return Outcome("refused by name", note=str(error))
    norms, stay = Torch(network).norms, sum("stays a LayerNorm" in site["why"] for site in report["norms"])
    more = report["parameters"]["rmsnorm"] - report["parameters"]["layernorm"]
    tie = "kept" if report["tie"] else ""
    return Outcome(verdict(max(errors), 1, 1), (norms - stay, norms), max(errors), tie, more)


class Torch:
    """A model of PyTorch before a tool changes it."""

    def __init__(self, network: Network):
        self.model = theirs.load(network.folder)
        self.tower = network.tower(self.model)
        modules = [module for module in self.tower.modules() if not [*module.children()]]
        self.norms = sum("LayerNorm" in type(module).__name__ for module in modules)
        self.parameters = count(self.tower)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        table = self.model.get_input_embeddings().weight if head is not None else None
        self.table = table.shape if head is not None and head.weight is table else None
        self.tables = self._tables(self.tower)

    def outcome(self, converted: Any, error: float) -> Outcome:
        """What has become of it."""
        changed = sum(type(module).__name__ in ("RMSNorm", "RMSN") for module in converted.modules())
        tie = "" if self.table is None else "kept" if self._tables(converted) == self.tables else "broken"
        more = count(converted) - self.parameters
        return Outcome(verdict(error, changed, self.norms), (changed, self.norms), error, tie, more)

    def _tables(self, module: Any) -> int:
        return sum(parameter.shape == self.table for parameter in module.parameters())


def count(module: Any) -> int:
    """Its parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def brevitas(network: Network) -> Outcome:
    """On a trace, as its example for language models does."""
    import torch
    from brevitas_examples.common.dynamo_utils import dynamo_export_ctx
    from brevitas_examples.llm.llm_quant.ln_affine_merge import apply_layernorm_affine_merge, apply_layernorm_to_rmsnorm
    from brevitas_examples.llm.llm_quant.prepare_for_quantize import make_dynamo_compatible

    before = Torch(network)
    args, kwargs = network.given(before.model)
    torch._dynamo.reset()
    with torch.no_grad():
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(Exception):  # of models that it does not know
                stack.enter_context(make_dynamo_compatible(before.model))
            stack.enter_context(dynamo_export_ctx())
            graph, _ = torch._dynamo.export(before.tower)(*args, **kwargs)
        if not (off := network.off(graph(*args, **kwargs))) < EXACT:
            return Outcome("crashed", note=f"the trace alone is off by {off:.1e}")
        before.parameters = min(before.parameters, count(graph))  # without those that nothing uses
        apply_layernorm_affine_merge(graph, ())
        graph = apply_layernorm_to_rmsnorm(graph)
        return before.outcome(graph, network.off(graph(*args, **kwargs)))


# model_type -> the module of SliceGPT's adapter, and its class.
ADAPTERS = {"opt": ("opt_adapter", "OPTModelAdapter"), "phi": ("phi2_adapter", "Phi2ModelAdapter")}


def slicegpt(network: Network, clone: Path) -> Outcome | None:
    """Its fusion of LayerNorms, of a family that it has an adapter of; None: it has none."""
    before = Torch(network)
    kind = getattr(getattr(before.model, "config", None), "model_type", "")
    if kind not in ADAPTERS:
        return None
    if "slicegpt" not in sys.modules:  # whose __init__ wants accelerate, datasets and more
        sys.modules["slicegpt"] = types.ModuleType("slicegpt")
        sys.modules["slicegpt"].__path__ = [str(clone / "src" / "slicegpt")]
    module, name = ADAPTERS[kind]
    adapter = getattr(importlib.import_module(f"slicegpt.adapters.{module}"), name)(before.model)
    importlib.import_module("slicegpt.layernorm_fusion").fuse_modules(adapter)
    return before.outcome(before.model, relative(network.run(before.model), network.expected))


def measure(network: Network, clone: Path | None) -> dict[str, Outcome]:
    """Each tool's outcome."""
    tools: dict[str, Callable[[], Outcome | None]] = {"prenorm_jax": lambda: ours(network)}
    tools["Brevitas"] = lambda: brevitas(network)
    if clone is not None:
        tools["SliceGPT"] = lambda: slicegpt(network, clone)
    found: dict[str, Outcome] = {}
    for name, run in tools.items():
        try:
            outcome = run()
        except Exception as error:  # of whatever kind: it is the outcome
            outcome = Outcome("crashed", note=f"{type(error).__name__}: {first_line(error)}")
        if outcome is not None:
            found[name] = outcome
            print(f"{network.name}: {name}: {outcome}", flush=True)
    return found


def long_table(results: dict[str, dict[str, Outcome]]) -> str:
    """A row for each network: of each tool the verdict, norms, error, tie and parameters."""
    tools = list(dict.fromkeys(tool for found in results.values() for tool in found))
    rows = [["network", *tools], ["---"] * (len(tools) + 1)]
    rows += [[name, *(_cell(found.get(tool)) for tool in tools)] for name, found in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    said = [f"**{outcome.verdict}**" if outcome.verdict in ("silently wrong", "crashed") else outcome.verdict]
    said += [f"{outcome.norms[0]} of {outcome.norms[1]} norms"] if outcome.norms else []
    said += [f"{outcome.error:.0e}"] if outcome.error is not None else []
    said += [f"tie {outcome.tie}"] if outcome.tie else []
    said += [f"{outcome.parameters:+,} parameters"] if outcome.parameters is not None else []
    said += [f"`{outcome.note[:60]}`"] if outcome.verdict == "crashed" else []
    return ", ".join(said)


def short_table(results: dict[str, dict[str, Outcome]]) -> str:
    """A row for each tool: of how many networks it made what; how many have more parameters than before."""
    tools = list(dict.fromkeys(tool for found in results.values() for tool in found))
    rows = [["", "networks", *VERDICTS, "ties kept", "grown"], ["---"] * (len(VERDICTS) + 4)]
    for tool in tools:
        found = [outcomes[tool] for outcomes in results.values() if tool in outcomes]
        ties = [outcome.tie for outcome in found if outcome.tie]
        grown = sum((outcome.parameters or 0) > 0 for outcome in found)
        counts = [str(sum(outcome.verdict == kind for outcome in found)) for kind in VERDICTS]
        rows.append([_named(tool), str(len(found)), *counts, f"{ties.count('kept')} of {len(ties)}", str(grown)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _named(tool: str) -> str:
    return f"Brevitas {importlib.metadata.version('brevitas')}" if tool == "Brevitas" else tool


def write(path: Path, table: str) -> None:
    """The table in a document, between the marks that say where it is."""
    text = path.read_text()
    pattern = re.compile(r"(<!-- peers: made by `make measure-peers` -->\n).*?(<!-- /peers -->)", re.DOTALL)
    if not pattern.search(text):
        raise PrenormError(f"{path} has no marks that say where the table goes")
    path.write_text(pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slicegpt", type=Path, help="folder of the clone")
    parser.add_argument("--only", default="", help="networks whose names this pattern matches")
    parser.add_argument("--write", action="store_true", help="write the tables into README.md and docs/checkpoints.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    with tempfile.TemporaryDirectory() as place:
        results = {network.name: measure(network, args.slicegpt) for network in networks(Path(place), args.only)}
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "timm", "torch", "jax")
    )
    tables = {"README.md": short_table(results), "docs/checkpoints.md": long_table(results)}
    for name, table in tables.items():
        dated = f"{table}\n\n*{date.today():%-d %B %Y}; {versions}.*"
        print(f"\n{dated}")
        if args.write:
            write(ROOT / name, dated)


if __name__ == "__main__":
    main()
