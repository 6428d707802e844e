"""Any tree by a role table: networks of other people's styles converted, and each mistake of a table refused."""

import functools

import jax
import numpy as np
import pytest
from common import relative
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign_trees import PROBES, case, refusals

from prenorm_jax import PrenormError, convert_foreign

# A network in NumPy, of one block: what is refused, and how, without a program to compile.
TABLE = """
embed                vocab write
ln/{scale,bias}      {scale,bias}
up/kernel            read mlp         ln
down/kernel          mlp write
down/bias            write
final/{scale,bias}   {scale,bias}
head/kernel          read class       final
head/bias            class
"""


def make_tree(dtype: str = "float64") -> dict:
    rng = np.random.default_rng(0)
    norm = {"scale": (6,), "bias": (6,)}
    shapes = {"embed": (5, 6), "ln": norm, "up": {"kernel": (6, 7)}, "down": {"kernel": (7, 6), "bias": (6,)}}
    shapes |= {"final": norm, "head": {"kernel": (6, 3), "bias": (3,)}}
    flat = {path: rng.normal(size=shape).astype(dtype) + 1 for path, shape in flatten_dict(shapes).items()}
    return unflatten_dict(flat)


def forward(tree: dict, norm: str = "layernorm", epsilon: float = 1e-3) -> np.ndarray:
    def normalise(x, name):
        x = x - x.mean(-1, keepdims=True) if norm == "layernorm" else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        return x * tree.get(name, {}).get("scale", 1) + tree.get(name, {}).get("bias", 0)

    x = tree["embed"][np.array([0, 3, 1, 4])]
    h = np.tanh(normalise(x, "ln") @ tree["up"]["kernel"] + tree["up"].get("bias", 0))
    x = x + h @ tree["down"]["kernel"] + tree["down"]["bias"]
    return normalise(x, "final") @ tree["head"]["kernel"] + tree["head"]["bias"]


def test_a_narrow_tree_keeps_its_dtype_and_its_network_may_stay_or_lose_an_entry():
    tree = make_tree("float32")
    expected = forward(make_tree())
    for affine, entry in [("keep", None), ("fold", None), ("fold", 5), ("fold", 2)]:
        to = "rmsnorm" if entry is None else "crmsnorm"
        new_apply = functools.partial(forward, norm="rmsnorm", epsilon=1e-3 if entry is None else 1e-3 * 6 / 5)
        new = convert_foreign(tree, TABLE, forward, new_apply, to=to, affine=affine, entry=entry)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(new)} == {"float32"}
        assert new["embed"].shape == (5, 6 if entry is None else 5)
        assert relative(new_apply(new), expected) < 1e-5
    assert new["up"]["bias"].shape == (7,) and "ln" not in new
    again = convert_foreign(FrozenDict(tree), TABLE, lambda tree: forward(tree.unfreeze()))
    assert isinstance(again, FrozenDict) and np.abs(again["embed"].mean(-1)).max() < 1e-6


def test_all_that_is_wrong_in_a_table_is_said_at_once():
    table = TABLE.replace("read mlp ", "reed mlp ").replace("vocab write", "write")
    table = table.replace("down/bias            write", "down/{i}   write")
    table += "{up,down}/kernel   read mlp  ln\nhead/bias  class class"
    with pytest.raises(PrenormError) as said:
        convert_foreign(make_tree(), table, None)
    for part in (
        "no line for down/bias",
        "several lines for down/kernel, head/bias, up/kernel",
        "no leaf for down/{i}",
        "unknown axes reed",
        "another number of axes: embed [5, 6], not write",
    ):
        assert part in str(said.value)


@pytest.mark.parametrize(
    ("leaf", "columns", "message"),
    [
        ("head/kernel", "read class  last", "no norm that has a scale or bias .*: head/kernel"),
        ("head/kernel", "class read  final", r"head/kernel \[6, 3\] of final/scale \[6\]"),
        ("down/kernel", "write mlp", "as wide as no norm: down/kernel writes 7"),
        ("down/bias", "layer_scale  up/kernel", "what is no writer of its width: down/bias of up/kernel"),
        ("up/kernel", "read mlp  ln  head/bias", "biases of another shape than what they take up: head/bias"),
        ("final/{scale,bias}", "{scale,bias}  ln", "two leaves are the scale of one norm: final/scale and ln/scale"),
        ("head/bias", "class  a  b  c", "has 5 columns"),
        ("final/{scale,bias}", "{a,b,c}", "has a group that goes along with none"),
    ],
)
def test_a_table_that_contradicts_itself_or_its_tree_is_refused_before_anything_runs(leaf, columns, message):
    lines = [line for line in TABLE.splitlines() if not line.startswith(leaf)]
    with pytest.raises(PrenormError, match=message):
        convert_foreign(make_tree(), "\n".join([*lines, f"{leaf}  {columns}"]), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"to": "layernorm"}, "to='layernorm' is not one of rmsnorm, crmsnorm"),
        ({"affine": "drop"}, "affine='drop' is not one of"),
        ({"to": "crmsnorm"}, "γ does not survive"),
        ({"affine": "plain"}, "the tree has no up/bias to take up a β"),
        (
            {"to": "crmsnorm", "affine": "fold", "table": TABLE.replace("vocab write", "vocab raw")},
            "raw leaves stay d wide",
        ),
        ({"params": [1.0]}, "leaves that are no arrays of floating-point numbers: 0"),
        ({"params": [np.ones(3)], "affine": "fold"}, "nested dicts are wanted"),
        ({"apply": lambda tree: forward(tree).astype("float32")}, "gives float32 for a tree of float64"),
        ({"apply": lambda tree: forward(tree) + np.random.normal()}, "gives other outputs when it is called again"),
        ({"apply": lambda tree: forward(tree) / 0}, "not finite"),
        ({"new_apply": lambda tree: forward(tree, "rmsnorm", 1e-2)}, "off by .*though the roles are right: see to its"),
        ({"table": TABLE.replace("vocab write", "vocab other")}, "omission: a mean along embed"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(change, message):
    asked = {"params": make_tree(), "table": TABLE, "apply": forward} | change
    with pytest.raises(PrenormError, match=message), np.errstate(divide="ignore"):
        convert_foreign(**asked)


FORMS = {
    "linen-vit": ["rmsnorm-keep", "rmsnorm-plain", "rmsnorm-fold", "crmsnorm-fold", "crmsnorm-plain"],
    "linen-gpt": ["rmsnorm-keep", "rmsnorm-plain"],
    "nnx": ["rmsnorm-keep"],
    "nnx-dict": ["rmsnorm-fold", "crmsnorm-fold"],
    "stacked": ["rmsnorm-keep", "rmsnorm-fold", "crmsnorm-fold"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_a_tree_of_others_converts_by_its_table_and_a_swap_of_norms_alone_does_not(name, form):
    params, table, apply, variants = case(name)
    to, affine = form.split("-")
    new_apply = variants[to, affine]
    converted = convert_foreign(params, table, apply, new_apply, to=to, affine=affine)
    assert relative(new_apply(converted), np.asarray(apply(params))) < 1e-12
    if affine == "keep":
        assert jax.tree.structure(converted) == jax.tree.structure(params)
        assert relative(new_apply(params), np.asarray(apply(params))) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if name != "nnx-dict"])
def test_every_writer_reader_and_feed_of_a_table_removed_or_swapped_is_refused(name):
    params, table, apply, _ = case(name)
    refused = refusals(params, table, apply)
    assert not [what for what, why in refused.items() if not why]
    assert sum(why.startswith(PROBES) for why in refused.values()) > 12


def test_a_leaf_that_the_outputs_do_not_feel_is_refused_since_nothing_shows_what_it_does():
    tree = make_tree() | {"other": {"kernel": np.ones((6, 3))}}
    table = TABLE + "other/kernel          read class       final\n"
    with pytest.raises(
        PrenormError, match=r"nothing of other/kernel is felt in the outputs.*give longer and more varied"
    ):
        convert_foreign(tree, table, forward)
