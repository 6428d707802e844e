"""The coordinates of crmsnorm's stream: what they are, that any choice is the same function, and which is chosen."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_of, evaluate, here
from common import logits, random_inputs, random_params, relative, tiny, tiny_vit
from flax.traverse_util import flatten_dict, unflatten_dict
from measure_coordinates import in_last_place

from prenorm_jax import PrenormError, choose_coordinates, convert_config, convert_params
from prenorm_jax.equivalence import stream_sizes
from prenorm_jax.equivalence.choice import coordinate_choices, leaks, reader_sums
from prenorm_jax.equivalence.fit import fit_params
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.coordinates import KINDS, center, coordinates_of, exchange
from prenorm_jax.models.stacking import stack_blocks

RAW = {"embed_dropout": 0.1, "branch_dropout": 0.1}
MOST = [(kind, entry) for kind in KINDS for entry in (None, 0, 5)]


def vector_c(kind: str, p: int, d: int) -> np.ndarray:
    """The c of the law: y_k = z_k - (c_k/c_p) z_p."""
    if kind == "drop":
        return np.eye(d)[p]
    return np.where(np.arange(d) == p, 1 / np.sqrt(d), 1 / (d + np.sqrt(d)))


def in_order(d: int, p: int) -> np.ndarray:
    """The entries of z that those of y are: the last one stands in p's place."""
    return np.where(np.arange(d - 1) == p, d - 1, np.arange(d - 1))


@pytest.mark.parametrize(("kind", "entry"), MOST)
def test_the_maps_are_those_of_the_law(kind, entry):
    d, rng = 12, np.random.default_rng(0)
    p, own = d - 1 if entry is None else entry, coordinates_of("crmsnorm", kind, entry)
    x, w, c, order = rng.normal(3, 1, (5, d)), rng.normal(size=(4, d)), vector_c(kind, p, d), in_order(d, p)
    z = x - x.mean(-1, keepdims=True)
    y = (z - c / c[p] * z[:, [p]])[:, order]
    for maps in (np.asarray, jnp.asarray):
        np.testing.assert_allclose(own.enter(maps(x)), y, atol=1e-14)
        np.testing.assert_allclose(own.write(maps(z)), y, atol=1e-14)
        np.testing.assert_allclose(own.leave(maps(y)), z, atol=1e-14)
        np.testing.assert_allclose(own.read(maps(w)), (w - (w @ c)[:, None])[:, order], atol=1e-14)
        np.testing.assert_allclose(own.read_back(own.read(maps(w))), center(w), atol=1e-14)
    if kind == "reflect":
        np.testing.assert_allclose((y**2).sum(-1), (z**2).sum(-1))


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        pytest.param(tiny, RAW, id="gpt-raw"),
        pytest.param(tiny_vit, {}, id="vit"),
        pytest.param(tiny, {}, id="gpt", marks=pytest.mark.slow),
        pytest.param(tiny_vit, RAW, id="vit-raw", marks=pytest.mark.slow),
    ],
)
def test_every_choice_is_the_same_function_and_another_choice_than_the_trees_is_not(make, changes):
    pre_ln = make(**changes)
    params, inputs = jax.device_get(random_params(pre_ln, 0)), random_inputs(pre_ln)
    expected, trees = logits(pre_ln, params, inputs), {}
    for kind, entry in MOST[::2]:
        config = dataclasses.replace(pre_ln, coordinates=kind, coordinates_entry=entry)
        crms, crms_config = convert_params(params, config, "crmsnorm"), convert_config(config, "crmsnorm")
        assert relative(logits(crms_config, crms, inputs), expected) < 1e-12
        back = convert_params(crms, crms_config, "layernorm")
        assert relative(logits(convert_config(crms_config, "layernorm"), back, inputs), expected) < 1e-12
        trees[kind, entry] = crms, crms_config
    (one, one_config), (other, other_config) = trees[MOST[0]], trees[MOST[4]]
    assert relative(logits(other_config, one, inputs), expected) > 1e-3
    fitted = fit_params(one, one_config, other_config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), fitted, other)


@pytest.mark.parametrize("restored", [False, True])
def test_the_law_is_the_sum_over_all_entries(restored):
    d, rng = 9, np.random.default_rng(1)
    readers, squares = [rng.normal(size=(n, d)) for n in (3, 7)], rng.uniform(0.1, 9, d)
    w = np.concatenate(readers)
    leak = leaks(sum(reader_sums(own, squares) for own in readers), squares, restored)
    for kind, row in zip(KINDS, leak, strict=True):
        for p, found in enumerate(row):
            c = vector_c(kind, p, d)
            of_readers = ((w - (w @ c)[:, None]) ** 2).sum(0)
            sizes = squares + (c / c[p]) ** 2 * squares[p]
            of_entry = squares * (w**2).sum(0)
            rho = {"drop": restored, "reflect": 1}[kind]
            expected = (np.delete(sizes * of_readers, p).sum() + rho * of_entry[p]) / of_entry.sum()
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("large", "kind"), [([7, 30, 50, 81], "reflect"), ([7], "drop")])
def test_a_large_entry_is_dropped_if_it_is_most_of_the_stream_and_never_reflected(large, kind):
    """Reflected, all others come out larger; of four, three leak if the fourth is dropped."""
    d, squares = 96, np.ones(96)
    squares[large] = 60.0**2
    leak = leaks(reader_sums(np.random.default_rng(0).normal(size=(200, d)), squares), squares)
    best = np.unravel_index(np.argmin(leak), leak.shape)
    assert KINDS[best[0]] == kind and (best[1] in large) == (kind == "drop")
    assert np.argmin(leak[1]) not in large


def with_outliers(config, seed: int, last: float, sizes: tuple[float, float] = (60.0, 60.0)) -> dict:
    """Four entries of the stream are larger than the others, with γ .03 there; `last`: γ of the last entry.

    `sizes`: how much larger they are made by the first half of the vocabulary, and by the rest of it and the branches.
    """
    rng, flat = np.random.default_rng(seed), flatten_dict(jax.device_get(random_params(config, seed, 0.0)))
    few, half = rng.choice(config.d_model - 1, 4, replace=False), config.vocab_size // 2
    for path, leaf in flat.items():
        leaf = flat[path] = np.array(leaf)
        if path[-2:-1] and path[-2].endswith("norm") and path[-1] == "scale":
            leaf[:] = rng.normal(1, 0.1, leaf.shape)
            leaf[few], leaf[-1] = 0.03, last
        elif path == ("token_embedding",):
            leaf[:half, few] *= sizes[0]
            leaf[half:, few] *= sizes[1]
        elif path[-1].endswith("embedding") or path[-2] in ("out", "down"):
            leaf[..., few] *= sizes[1]
    return unflatten_dict(flat)


def rounding(pre_ln, params, inputs, norm: str, kind: str = "drop", entry: int | None = None) -> float:
    """The error of the logits in float32, root mean square; the programs are those of the last entry's coordinates."""
    expected = logits(pre_ln, params, inputs)
    source = params if entry is None else in_last_place(params, pre_ln, entry)
    config = dataclasses.replace(pre_ln, coordinates=kind)
    converted = convert_params(source, config, norm)
    narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), converted)
    config = dataclasses.replace(convert_config(config, norm), dtype="float32", param_dtype="float32")
    return float(np.sqrt(np.mean((np.asarray(logits(config, narrow, inputs), np.float64) - expected) ** 2)))


def of_width_64():
    return tiny(d_model=64, depth=3, tie_embeddings=False)


@pytest.mark.parametrize("last", [1.0, 5.0])
def test_the_choice_rounds_like_rmsnorm_where_dropping_the_last_entry_does_not_as_predicted(last):
    pre_ln = of_width_64()
    params, inputs = with_outliers(pre_ln, 0, last), random_inputs(pre_ln, batch=96)
    choices, rms = coordinate_choices(params, pre_ln), rounding(pre_ln, params, inputs, "rmsnorm")
    papers = next(choice for choice in choices if choice[:2] == ("drop", 63))
    measured = [rounding(pre_ln, params, inputs, "crmsnorm", *choice[:2]) / rms for choice in (choices[0], papers)]
    assert measured[0] < 1.2 and measured[1] > 2
    assert [choices[0].error, papers.error] == pytest.approx(measured, rel=0.3)


def test_measured_sizes_predict_what_the_weights_cannot_tell():
    pre_ln = of_width_64()
    params = with_outliers(pre_ln, 0, 1.0, sizes=(1.0, 60.0))
    for layer in range(pre_ln.depth):
        for branch, name in (("attention", "out"), ("mlp", "down")):
            params[f"block_{layer}"][branch][name]["kernel"] /= 600
            params[f"block_{layer}"][branch][name]["bias"] /= 600
    params["position_embedding"] = params["position_embedding"] / 600
    inputs = random_inputs(pre_ln, batch=8) % (pre_ln.vocab_size // 2)  # none of the tokens with outliers
    used = center(params["token_embedding"][inputs] + params["position_embedding"])
    measured = rounding(pre_ln, params, inputs, "crmsnorm") / rounding(pre_ln, params, inputs, "rmsnorm")
    wrong, right = (
        next(choice.error for choice in coordinate_choices(params, pre_ln, sizes) if choice[:2] == ("drop", 63))
        for sizes in (None, np.sqrt((used**2).mean((0, 1))))
    )
    assert right == pytest.approx(measured, rel=0.1) and wrong > 1.3 * measured


def test_a_token_that_is_much_larger_than_the_others_decides_nothing():
    """As the first of a sequence in language models: it rounds in proportion to its own size, as they to theirs."""
    pre_ln = tiny(d_model=64, max_len=64, tie_embeddings=False)
    params = jax.device_get(random_params(pre_ln, 0))

    def dropping_last(params) -> float:
        return next(choice.error for choice in coordinate_choices(params, pre_ln) if choice[:2] == ("drop", 63))

    expected, large = dropping_last(params), np.array(params["position_embedding"])
    large[0, [9, 40]] = 2000.0, -1500.0
    assert dropping_last(params | {"position_embedding": large}) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_coordinates_of_an_entry_are_those_of_the_last_one_if_both_change_places(tied):
    pre_ln = tiny(tie_embeddings=tied)
    params = jax.device_get(random_params(pre_ln, 0))
    for kind in KINDS:
        of_entry, of_last = (
            dataclasses.replace(pre_ln, coordinates=kind, coordinates_entry=entry) for entry in (5, None)
        )
        one = flatten_dict(convert_params(params, of_entry, "crmsnorm"))
        other = flatten_dict(convert_params(in_last_place(params, pre_ln, 5), of_last, "crmsnorm"))
        for path, leaf in abstract_params(convert_config(of_last, "crmsnorm")).items():
            raw = leaf.names.index("raw") if "raw" in leaf.names else None  # it is d wide, and enters as it is
            expected = one[path] if raw is None else exchange(one[path], 5, raw)
            np.testing.assert_allclose(other[path], expected, rtol=0, atol=1e-12)
        without = flatten_dict(convert_params(params, of_last, "crmsnorm"))
        assert relative(without["block_0", "mlp", "up", "kernel"], one["block_0", "mlp", "up", "kernel"]) > 1e-3


def test_a_choice_is_the_same_of_any_tree_of_one_network_however_it_is_stored_and_read(monkeypatch):
    pre_ln = tiny(d_model=16)
    params = jax.device_get(random_params(pre_ln, 3))

    def found(norm: str = "layernorm", scan: bool = False) -> list[float]:
        tree, config = params, pre_ln
        if norm != "layernorm":
            tree, config = convert_params(params, pre_ln, norm), convert_config(pre_ln, norm)
        if scan:
            tree, config = jax.device_get(stack_blocks(tree)), dataclasses.replace(config, scan=True)
        return [choice.error for choice in sorted(coordinate_choices(tree, config))]

    expected = found()
    assert len(expected) == 2 * 16
    for other in (found("rmsnorm"), found(scan=True)):
        np.testing.assert_allclose(other, expected, rtol=1e-10)
    assert np.argmin(found("crmsnorm")) == np.argmin(expected)
    monkeypatch.setattr(stream_sizes, "PART_SIZE", 40)
    for scan in (False, True):
        np.testing.assert_allclose(found(scan=scan), expected, rtol=1e-10)
    for shape in ((16,), (5, 16)):
        assert choose_coordinates(params, pre_ln, sizes=np.ones(shape))["coordinates"] in KINDS
    with pytest.raises(PrenormError, match=r"sizes have shape \(3,\), not \(16,\) or \(5, 16\)"):
        choose_coordinates(params, pre_ln, sizes=np.ones(3))
    for sizes in ("a", -np.ones(16), np.full(16, np.nan), np.zeros(16)):
        with pytest.raises(PrenormError, match="sizes are"):
            choose_coordinates(params, pre_ln, sizes=sizes)


def test_nothing_is_chosen_by_numbers_that_are_not_finite():
    pre_ln = tiny(d_model=16)
    params = jax.device_get(random_params(pre_ln, 3))
    params["block_1"]["mlp"]["down"]["kernel"] = params["block_1"]["mlp"]["down"]["kernel"] * np.nan
    with pytest.raises(PrenormError, match="no rounding can be predicted, for the weights are not finite"):
        choose_coordinates(params, pre_ln)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_command_chooses_says_records_and_obeys(saved, tmp_path):
    convert = ["-m", "prenorm_jax.convert", saved]
    expected = evaluate(saved, x64=True)["eval_loss"]
    for flags, wanted in (
        ([], None),
        (["--coordinates=reflect:3"], ("reflect", 3)),
        (["--coordinates=drop"], ("drop", 11)),
    ):
        target = tmp_path / f"crms{len(list(tmp_path.iterdir()))}"
        printed = here(*convert, target, "--to=crmsnorm", *flags, x64=True).stdout
        record, config = (json.loads((target / name).read_text()) for name in ("run.json", "config.json"))
        made = record["coordinates"]
        said = "; rounding predicted" if wanted is None else ", as asked for"
        assert f"coordinates: {made['kind']} entry {made['entry']}{said}" in printed
        assert wanted in (None, (made["kind"], made["entry"]))
        assert (config["model"]["coordinates"], config["model"]["coordinates_entry"]) == (made["kind"], made["entry"])
        assert evaluate(target, x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
    for wrong, message in (("turn", "--coordinates='turn' is not one of drop, reflect"), ("drop:12", "from 0 to 11")):
        flags = "--to=crmsnorm", f"--coordinates={wrong}"
        assert message in here(*convert, tmp_path / "new", *flags, x64=True, status=2).stderr
    flags = "--to=rmsnorm", "--coordinates=drop"
    assert "--coordinates says something of --to=crmsnorm alone" in error_of(*convert, tmp_path / "new", *flags)
