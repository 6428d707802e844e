"""Certificates, the probes of hand-written roles, and what `explain` says: on tiny models, without other libraries."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import error_of, here
from common import changed, random_params, tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign import GPT2, gpt2_shapes, random_tensors, write

import prenorm_jax
from prenorm_jax import PrenormError, build_model, certify_checkpoint, convert_config, convert_params
from prenorm_jax import certify as command
from prenorm_jax.equivalence.roles import Role, parameter_roles
from prenorm_jax.interop import certificate_page
from prenorm_jax.interop import certify as certifying
from prenorm_jax.interop import explain as explaining
from prenorm_jax.interop.forms import converted, difference, evaluate, form_of
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.probe_inputs import compared_positions, probes_of
from prenorm_jax.interop.probes import check_by_probes
from prenorm_jax.interop.reference import Reference
from prenorm_jax.train import convert_run
from prenorm_jax.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """`source`, a GPT-2, and workdirs made from it: rmsnorm, and `naive`, whose norms alone were swapped."""
    folder = tmp_path_factory.mktemp("certify")
    write(folder / "source", random_tensors(gpt2_shapes()), GPT2)
    imported(folder, "rmsnorm")
    config, params = prenorm_jax.load(folder / "source")
    with Checkpoints(folder / "naive") as made:
        made.save(0, params, None, dataclasses.replace(config, norm="rmsnorm"))
    return folder


def imported(folder: Path, norm: str) -> None:
    """A workdir of this name, unless it is there."""
    if not (folder / norm).exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert_run, "COMPARED_BYTES", 0)
            import_checkpoint(folder / "source", folder / norm, norm)


@pytest.fixture(autouse=True)
def no_figure(monkeypatch, request):
    """Most of the time that a certificate of a tiny model takes; but for the test that looks for one."""
    if "drawn" not in request.node.name:
        monkeypatch.setattr(certificate_page, "_figure", lambda *_: b"")


def certified(places: Path, workdir: str, source: str = "source") -> dict:
    return certify_checkpoint(places / workdir, places / source, reference="own")


@pytest.mark.parametrize("norm", ["rmsnorm", pytest.param("crmsnorm", marks=pytest.mark.slow)])
def test_a_conversion_passes(places, norm):
    imported(places, norm)
    report = certified(places, norm)
    assert report["verdict"] == "PASS", report["failures"]
    assert next(row for row in report["rows"] if row["what"] == "conversion")["relative"] < 1e-13
    assert report["control"]["relative"] > 1e-2
    assert report["leaves"]["as_converted"] == report["leaves"]["of"]
    before, after = report["sizes"]["source"], report["sizes"]["result"]
    assert after["parameters"] < before["parameters"]
    assert before["norm_operations"] == 7 * 3 * 12 * (5 + 2)  # of 7 tokens
    assert after["norm_operations"] == {"rmsnorm": 7 * 12 * (3 * 3 + 2)}.get(norm, after["norm_operations"])
    means = {one["norm"]: one for one in report["norms"]}
    assert set(means) == {"block_0/attention_norm", "block_0/mlp_norm", "head_norm"}
    assert all(one["mean_float64"] < 1e-6 < 1e-2 < one["mean_in_source"] for one in means.values())
    assert json.loads((places / norm / "certificate.json").read_text()) == report
    assert all((places / norm / f"certificate.{kind}").exists() for kind in ("html", "png", "npz"))


def test_a_checkpoint_whose_norms_alone_were_swapped_fails(places):
    report = certified(places, "naive")
    assert report["verdict"] == "FAIL"
    assert [row["holds"] for row in report["rows"] if row["what"] == "checkpoint"] == [False, False]
    assert report["norms"][-1]["mean_float64"] > 1e-2


def test_the_exit_status_tells_pass_from_fail(monkeypatch):
    monkeypatch.setattr(certifying, "certify_checkpoint", lambda *_: {"verdict": "PASS"})
    here("-m", "prenorm_jax.certify", "workdir", "source", "--json")
    monkeypatch.setattr(certifying, "certify_checkpoint", lambda *_: {"verdict": "FAIL"})
    with pytest.raises(SystemExit) as end:
        command.main(["workdir", "source", "--json"])
    assert end.value.code == 1


@pytest.mark.slow
def test_a_source_without_means_is_given_some_for_the_control_to_miss(places):
    imported(places, "crmsnorm")
    report = certified(places, "crmsnorm", "rmsnorm")
    assert report["verdict"] == "PASS", report["failures"]
    assert report["control"]["mean_given_first"]
    assert report["control"]["relative"] > 1e-2


def test_a_control_that_is_not_far_off_is_said_and_fails(places, monkeypatch):
    monkeypatch.setattr(certifying, "swapped", lambda form: form)
    report = certified(places, "rmsnorm")
    assert report["verdict"] == "FAIL"
    assert "no power" in report["failures"][0]
    assert "no power" in (places / "rmsnorm" / "certificate.html").read_text()


@pytest.mark.slow
def test_what_the_library_gave_once_is_verified_without_it(places, monkeypatch, tmp_path):
    ours = certified(places, "rmsnorm")
    with np.load(places / "rmsnorm" / "certificate.npz") as arrays:
        library = Reference(arrays["outputs"], "a library", True, {"library": "1"})
    monkeypatch.setattr(certifying, "why_not", lambda *_: "")
    monkeypatch.setattr(certifying, "by_library", lambda *_: library)
    certify_checkpoint(places / "rmsnorm", places / "source")
    monkeypatch.setattr(certifying, "why_not", lambda *_: "not installed")
    for _ in range(2):  # the second finds what the first one kept
        reference = certify_checkpoint(places / "rmsnorm", places / "source")["reference"]
        assert reference["by"].count("kept from the certificate of") == 1
        assert (reference["of_library"], reference["note"]) == (True, "not installed")
    write(tmp_path, random_tensors(gpt2_shapes(), seed=1), GPT2)  # of another source nothing is taken
    report = certify_checkpoint(places / "rmsnorm", tmp_path)
    assert not report["reference"]["of_library"]
    assert report["verdict"] == "FAIL" != ours["verdict"]


def test_what_was_converted_there_and_back_is_a_conversion_too():
    config = tiny(depth=1, layer_scale=0.1)
    source = form_of(config, random_params(config, 0))
    crms = convert_config(config, "crmsnorm")
    params = convert_params(convert_params(source.params, config, "crmsnorm"), crms, "layernorm")
    back = form_of(convert_config(crms, "layernorm"), params)
    exact = flatten_dict(converted(source, back.config).params)
    for path, leaf in flatten_dict(back.params).items():
        if "embedding" in path[0] or path[0] == "head_affine":
            np.testing.assert_array_equal(exact[path], leaf)
        assert exact[path].shape == leaf.shape


ROTARY = {"positions": "rotary", "rotary_dim": 4, "window": 3, "tie_embeddings": False, "depth": 1}
MUTANTS = {
    "rotary pairs": {"rotary_interleaved": True},
    "activation": {"activation": "gelu"},
    "window": {"window": 4},
    "score scale": {"score_scale": 0.41},
    "ALiBi for positions": {"positions": "alibi", "rotary_dim": None},
    "ε": {"epsilon": 1.1e-5},
}


def test_the_probes_tell_networks_apart_that_shapes_do_not():
    config = tiny(**ROTARY)
    params = random_params(config, 0)
    probes = probes_of(config)
    positions = compared_positions(config, probes)
    expected = evaluate(form_of(config, params), probes, positions).outputs

    def off(config, flat) -> float:
        outputs = evaluate(form_of(config, unflatten_dict(flat)), probes, positions).outputs
        return difference(outputs, expected)["relative"]

    flat = flatten_dict(params)
    for one, two in (("query", "key"), ("key", "value"), ("value", "query")):
        mixed = dict(flat)
        for leaf in ("kernel", "bias"):
            a, b = (("block_0", "attention", name, leaf) for name in (one, two))
            mixed[a], mixed[b] = flat[b], flat[a]
        assert off(config, mixed) > 1e-6, (one, two)
    out = ("block_0", "attention", "out", "kernel")
    assert off(config, {**flat, out: flat[out].T}) > 1e-6
    for name, changes in MUTANTS.items():
        assert off(changed(config, **changes), flat) > 1e-9, name


# --- Roles by hand: every mutant is refused. ---


def mutants(roles, has_affine):
    """(what, roles): each writer, reader and feed removed, or swapped with another."""
    norms = list(dict.fromkeys(role.norm for role in roles.values() if role.reads is not None))
    for path, role in roles.items():
        change = functools.partial(dataclasses.replace, role)
        found = {}
        if role.writes is not None:
            found = {"nothing": change(writes=None)}
            found |= {"along another axis": change(writes=-2)} if path[-1] == "kernel" else {}
        if role.reads is not None:
            found = {"nothing": Role(), "along another axis": change(reads=-1)}
        if role.reads is not None and has_affine:
            other = norms[(norms.index(role.norm) + 1) % len(norms)]
            found |= {"fed by another": change(norm=other), "fed by nothing": change(norm=None)}
            found |= {"a writer": Role(writes=role.reads)}
        if role.writes is not None:
            found |= {"a reader": Role(reads=role.writes, norm=norms[0], bias=(*path[:-1], "none"))}
        if role.affine is not None:
            found = {"nothing": Role(), "of another kind": change(affine={"scale": "bias"}.get(role.affine, "scale"))}
        yield from (("/".join(path), what, {**roles, path: mutant}) for what, mutant in found.items())


@pytest.mark.parametrize("norm_affine", [True, False])
def test_every_mutant_of_roles_is_refused_by_the_probes(norm_affine):
    options = {"depth": 1, "tie_embeddings": False, "layer_scale": 0.1, "mlp_dim": 12, "norm_affine": norm_affine}
    config = tiny(**options)
    params, tokens = random_params(config, 0), np.arange(7)[None]
    apply = jax.jit(lambda params: build_model(config).apply({"params": params}, tokens))
    roles = parameter_roles(config)
    check_by_probes(apply, params, roles)
    passed, tried = [], 0
    for name, what, mutant in mutants(roles, norm_affine):
        tried += 1
        try:
            check_by_probes(apply, params, mutant)
            passed.append((name, what))
        except PrenormError as error:
            assert re.match(r"fold|shift|omission|scale|\w+/", str(error)), (name, what)
    assert not passed
    assert tried > (40 if norm_affine else 15)


# --- What would happen. ---


def test_explain_counts_what_a_conversion_makes_and_reads_no_weight(places, monkeypatch):
    monkeypatch.setattr("prenorm_jax.interop.views.View.read", None)
    report = json.loads(here("-m", "prenorm_jax.explain", places / "source", "--json").stdout)
    made = json.loads((places / "rmsnorm" / "run.json").read_text())
    assert report["parameters"]["rmsnorm"] == made["parameters"]["computed"]
    assert {site["norm"]: site["becomes"] for site in report["norms"]} == {
        "block_0/attention_norm": "folded",
        "block_0/mlp_norm": "folded",
        "head_norm": "kept",
    }
    assert report["tie"] == {"table": [11, 12], "broken": False, "would_add_parameters": 132, "would_add_mb": 528e-6}
    assert "untied, it would cost 132 parameters more" in here("-m", "prenorm_jax.explain", places / "source").stdout


def test_explain_says_from_config_json_alone_which_biases_take_up_a_β(tmp_path):
    given = {"model_type": "falcon", "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 12}
    (tmp_path / "config.json").write_text(json.dumps(given | {"vocab_size": 11}))
    report = explaining.explain(tmp_path)
    assert [site["norm"] for site in report["norms"][-3:]] == ["block_10/norm", "block_11/norm", "head_norm"]
    assert report["added"]["rmsnorm"].keys() == {
        f"block_{i}/{reader}/bias" for i in range(12) for reader in (*_ATTENTION, "mlp/up")
    }
    assert "not looked at" in report["notes"][0]
    assert "block 0 to 11, norm" in explaining.plain_text(report)


_ATTENTION = ("attention/query", "attention/key", "attention/value")


def test_explain_tells_norms_that_are_kept_from_those_without_an_affine():
    sites = explaining.norm_sites(tiny(norm_affine=False, tie_embeddings=False, depth=1))
    assert {site["becomes"] for site in sites} == {"plain"}
    assert explaining.norm_sites(tiny(norm_affine=False, depth=1))[-1]["becomes"] == "plain"
    kept = explaining.norm_sites(tiny(qk_norm=True, embed_norm=True, depth=1))
    assert [site["norm"] for site in kept if site["becomes"] == "kept"] == [
        "head_norm",
        "embedding_norm",
        "block_0/attention/query_norm",
        "block_0/attention/key_norm",
    ]


REFUSED = {
    "no final norm": ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm.*raw stream"),
    "cross-attention": ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True changes the"),
    "unknown": ({"model_type": "mamba"}, "mamba.*no family"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_explain_refuses_by_name_and_needs_no_weights_for_it(name, tmp_path):
    config, why = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert re.search(why, error_of("-m", "prenorm_jax.explain", tmp_path))
