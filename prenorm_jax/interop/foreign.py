"""Any tree of parameters, of whatever network, by a table of roles; found right, or not, by running that network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.equivalence.convert import convert_tree
from prenorm_jax.equivalence.role_table import RAW, match, table_roles
from prenorm_jax.equivalence.roles import Roles
from prenorm_jax.interop.probes import TOLERANCE, check_by_probes

Named = dict[str, Any]  # leaves by their names, as tables have them
Apply = Callable[[Any], Any]


def convert_foreign(
    params: Any,
    table: str,
    apply: Apply | None,
    new_apply: Apply | None = None,
    *,
    to: str = "rmsnorm",
    affine: str = "keep",
    entry: int | None = None,
) -> Any:
    """The parameters as they are to be where each LayerNorm of a Pre-LN network becomes an RMSNorm.

    Args:
      params: a tree of concrete arrays of floating-point numbers: nested dicts, an `nnx.State`, any pytree; or a flat
        dict, as of another library's tensors. Not changed.
      table: what the axes of each leaf are and which norm feeds it, in the language of `equivalence/role_table.py`.
      apply: the network: such a tree -> its outputs, one array or several, for inputs of your choice, without dropout.
        With it the table is verified by the probes of `probes.py`, in float64, on numbers that are moved off 0 and
        1. It is called some three times for each leaf: jit it. None: nothing is verified.
      new_apply: the same with the norms swapped, of the converted tree: verified to be the same function.
      to: rmsnorm: writers lose their mean; shapes stay, and LayerNorms in place of the RMSNorms compute the same.
        crmsnorm: the stream loses an entry, in reflected coordinates: the network is built d-1 wide, its heads and
        MLPs as wide as they were, with stock RMSNorms whose ε is ε·d/(d-1). Not where leaves are `raw`.
      affine: keep: norms keep γ and β (not under crmsnorm). plain: these go into the readers, and are 1 and 0.
        fold: they go there and leave the tree, and readers gain the biases that they lack. LayerScales are folded in
        any case, and become 1 or leave.
      entry: under crmsnorm that which is reflected; None: the last.

    Returns:
      The same kind of tree (with fold: of dicts alone), each leaf in the dtype it had, converted in float64 and rounded
      once. What `raw` leaves add to the stream is as it was: the network has to centre it, once, at run time.

    Raises:
      PrenormError: a table that does not fit the tree (all that is missing, double or misshapen at once), or that the
        probes refuse; a new network that is another function; a tree that cannot become what is asked for.
    """
    check_choice("to", to, ("rmsnorm", "crmsnorm"))
    check_choice("affine", affine, ("keep", "plain", "fold"))
    tree = _Tree(params)
    if affine == "fold" and not tree.keys:
        raise PrenormError("affine=fold: leaves come and go, so nested dicts are wanted, as nnx.to_pure_dict(state)")
    shapes = {name: leaf.shape for name, leaf in tree.wide.items()}
    rows = match(table, shapes)
    roles = table_roles(rows, shapes)
    if to == "crmsnorm" and affine == "keep":
        raise PrenormError("to=crmsnorm: γ does not survive the change of coordinates: take affine=plain or fold")
    raw = [name for name, row in rows.items() if RAW in row.axes]
    if to == "crmsnorm" and raw:
        raise PrenormError(f"to=crmsnorm: raw leaves stay d wide, so take rmsnorm: {', '.join(raw[:8])}")

    def convert(named: Named) -> Named:
        return _converted(named, roles, to, affine, entry)

    with jax.enable_x64(True):
        if apply is not None:
            same_code = to == "rmsnorm" and affine != "fold"
            _verify(tree, roles, raw, convert, apply, new_apply or (apply if same_code else None))
        converted = convert(tree.wide)
    return tree.build({name: tree.as_it_was(leaf, name, roles) for name, leaf in converted.items()})


class _Tree:
    """A tree's leaves by their names, and the way back.

    Attributes:
      leaves: as they are.
      wide: as float64, of NumPy.
      keys: where all are in nested dicts, the keys that lead to each; else empty.
    """

    def __init__(self, params: Any):
        paths, self._structure = jax.tree_util.tree_flatten_with_path(params)
        boxed = jax.tree_util.GetAttrKey("value")  # an nnx.Param is one, and a leaf with metadata
        paths = [(path[:-1] if path[-1:] == (boxed,) else path, leaf) for path, leaf in paths]
        self.leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
        if wrong := [name for name, leaf in self.leaves.items() if not _is_floating(leaf)]:
            raise PrenormError(
                f"leaves that are no arrays of floating-point numbers: {', '.join(wrong[:8])}: leave out"
            )
        self.wide = {name: np.asarray(leaf).astype(np.float64) for name, leaf in self.leaves.items()}
        in_dicts = all(isinstance(key, jax.tree_util.DictKey) for path, _ in paths for key in path)
        named = zip(self.leaves, paths, strict=True)
        self.keys = {name: tuple(key.key for key in path) for name, (path, _) in named} if in_dicts else {}

    def build(self, named: Named) -> Any:
        """The tree of these leaves: of the same structure, or of dicts where leaves have come or gone."""
        if named.keys() == self.leaves.keys():
            return jax.tree.unflatten(self._structure, [named[name] for name in self.leaves])
        modules = {"": ()} | {
            "/".join(map(str, keys[:n])): keys[:n] for keys in self.keys.values() for n in range(1, len(keys))
        }
        flat = {}
        for name, leaf in named.items():
            module, _, own = name.rpartition("/")
            flat[self.keys.get(name) or (*modules.get(module, tuple(module.split("/"))), own)] = leaf
        return unflatten_dict(flat)

    def as_it_was(self, leaf: np.ndarray, name: str, roles: Roles) -> Any:
        """Of the converted tree, in the dtype and of the library that the leaf was; a new bias as its reader."""
        of = (path for (path,), role in roles.items() if role.bias == (name,))
        was = self.leaves[name] if name in self.leaves else self.leaves[next(of)]
        cast = leaf.astype(was.dtype)
        return jnp.asarray(cast) if isinstance(was, jax.Array) else cast


def _is_floating(leaf: Any) -> bool:
    try:
        return jnp.issubdtype(np.dtype(leaf.dtype), jnp.floating)
    except (AttributeError, TypeError):
        return False


def _converted(named: Named, roles: Roles, to: str, affine: str, entry: int | None) -> Named:
    """All in float64. Raises PrenormError where a plain network has no bias for a β."""
    converted = convert_tree(named, roles, "layernorm", to, "reflect", entry, keep_affine=affine == "keep")
    if to == "crmsnorm":  # RMSNorm divides by √(‖y‖²/(d-1) + ε'), which is √(d/(d-1)) times what is wanted
        for (name,), role in roles.items():
            if role.reads is not None:
                width = named[name].shape[role.reads]
                converted[name] = converted[name] * np.sqrt(width / (width - 1))
    if affine == "fold":
        return converted
    if gained := sorted(converted.keys() - named.keys()):
        raise PrenormError(
            f"affine={affine}: the tree has no {', '.join(gained[:8])} to take up a β: take keep, or fold, for a "
            "network with these biases"
        )
    for (name,), role in roles.items():  # those that were folded into others
        if name not in converted:
            shape = (*named[name].shape[:-1], named[name].shape[-1] - (to == "crmsnorm"))
            converted[name] = np.full(shape, float(role.affine != "bias"))
    return converted


def _verify(
    tree: _Tree, roles: Roles, raw: list[str], convert: Callable[[Named], Named], apply: Apply, new_apply: Apply | None
) -> None:
    """Raises PrenormError unless the probes pass, and the new network is the old one's function, if there is one."""
    moved = _moved(tree.wide)
    expected = _outputs(apply, tree, moved)
    if np.any(_outputs(apply, tree, moved) != expected):
        raise PrenormError("apply gives other outputs when it is called again: take inputs that stay, and no dropout")
    if not np.isfinite(expected).all():
        raise PrenormError(
            "apply's outputs are not finite for the tree's numbers, each moved by about a third of itself"
        )

    check_by_probes(lambda named: _outputs(apply, tree, named), moved, roles, raw=[(name,) for name in raw])
    if new_apply is None:
        return
    off = np.abs(_outputs(new_apply, tree, convert(moved)) - expected).max() / np.abs(expected).max()
    if not off <= TOLERANCE:
        raise PrenormError(
            f"the new network's outputs are off by {off:.1e}, though the roles are right: see to its norms' kind, ε "
            "and affine, and that what raw leaves add to the stream is centred"
        )


def _moved(wide: Named) -> Named:
    """Every number moved by about a third of itself, or of its leaf's size: what is 0 or 1 by chance tells nothing."""
    rng, moved = np.random.default_rng(0), {}
    for name, leaf in wide.items():
        size = np.sqrt(np.square(leaf).mean()) or 1.0
        moved[name] = leaf + 0.3 * rng.normal(size=leaf.shape) * np.maximum(np.abs(leaf), size)
    return moved


def _outputs(apply: Apply, tree: _Tree, named: Named) -> np.ndarray:
    """All of a network's outputs in one row. Raises PrenormError unless they are of float64."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(apply(tree.build(named)))]
    if narrow := [x.dtype.name for x in arrays if x.dtype != np.float64]:
        raise PrenormError(
            f"the network gives {narrow[0]} for a tree of float64, in which the probes need it: let it compute in its "
            "parameters' dtype (dtype=None), and give inputs that fit"
        )
    return np.concatenate([x.ravel() for x in arrays])
