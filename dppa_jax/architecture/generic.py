"""Tensors of a model whose family has no row: recognised by their names and shapes, or as a user states them.

Layers are what is numbered. A layer's matrices are its linears, unless their names say that they are norms, embeddings
or routers. Outside the layers, matrices with a row for each token are the vocabulary's. All else is dense.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from dppa_jax.architecture.layout import Layout, Place, cut, stored_rows
from dppa_jax.architecture.row import Role
from dppa_jax.architecture.specs import CheckpointError, TensorSpec

GENERIC = "generic"  # in place of a Stated: recognise the tensors whether or not the table has a row
NUMBERED = re.compile(r"^((?:.*?\.)?)(\d+)\.(.+\..+|[^.]*experts[^.]*)$")  # the first number that modules follow
EXPERT = re.compile(r"(\bexperts)\.(\d+)\.")
WEIGHT = re.compile(r"(^|[._])weight$")
HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|output)\b")  # such tensors come last
NO_LINEAR = re.compile(r"norm|embed|router|bias|rotary|conv|^ln_|^gate$", re.IGNORECASE)
TOKENS = re.compile(r"\b(embed_tokens|word_embeddings|tok_embeddings|wte|embed_in|embed_out|lm_head|shared)\b")


class Stated(msgspec.Struct, forbid_unknown_fields=True):
    """What the tensors of a model are, as `--architecture=FILE.json` states it and architecture.json shows it.

    Names may have * for anything. What no list names is dense: it is not pruned, and carries its whole delta.

    Attributes:
      layers: what the names of a layer's tensors begin with, with {} for its number: "transformer.h.{}."; several
        stacks of layers are numbered one after the other.
      linears: names of the matrices of a layer that are pruned, without what they begin with: "attn.c_proj.weight".
      vocabulary: whole names of matrices with a row for each token.
      copied: whole names of tensors that are not merged but copied from the base: "vision_tower.*".
      fused: linears that one tensor holds: by its name, as in `linears`, the rows of each part until the next begins,
        by the part's name: {"attn.qkv.weight": {"attn.q": 4096, "attn.k": 1024, "attn.v": 1024}}. Where the tensor has
        more rows, the parts take turns: {"attention.query_key_value.weight": {"q": 64, "k": 64, "v": 64}}.
    """

    layers: list[str]
    linears: list[str]
    vocabulary: list[str] = []
    copied: list[str] = []
    fused: dict[str, dict[str, int]] = {}


def recognise(shapes: Mapping[str, Sequence[int]], vocabulary: int | None, other: Sequence[str] = ()) -> Stated:
    """Recognise what the tensors of a model are.

    Args:
      shapes: by name.
      vocabulary: how many tokens config.json says there are; None where it does not.
      other: names of tensors that are no floating-point numbers.
    """
    layers, linears, tokens = {}, {}, []
    for name, shape in shapes.items():
        if found := NUMBERED.match(name):
            prefix, _, kind = found.groups()
            layers[f"{prefix}{{}}."] = None
            if _is_linear(kind, shape):
                linears[EXPERT.sub(r"\1.*.", kind)] = None
        elif len(shape) == 2 and WEIGHT.search(name) and (shape[0] == vocabulary or TOKENS.search(name)):
            tokens.append(name)
    return Stated(sorted(layers), sorted(linears), tokens, list(other))


def stated_specs(stated: Stated, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, TensorSpec], Layout]:
    """Return the tensors of a model as they are stated, and where they lie in its files.

    Raises:
      CheckpointError: no tensor is a linear, or the parts of one do not fit it.
    """
    return _Specs(stated, shapes).all()


class _Specs:
    """Collects the tensors of a model, layer by layer."""

    def __init__(self, stated: Stated, shapes: Mapping[str, tuple[int, ...]]):
        self.stated, self.shapes = stated, shapes
        self.specs: dict[str, TensorSpec] = {}
        self.layout = Layout()
        self.linears = 0
        self.having: dict[str, dict[int, int]] = {}  # by kind: the layers that have it, in their order

    def all(self) -> tuple[dict[str, TensorSpec], Layout]:
        """Return the tensors and their places."""
        stacks = [re.compile(re.escape(stack).replace(r"\{\}", r"(\d+)")) for stack in self.stated.layers]
        outside, inside, rest = [], [], []
        for name in self.shapes:
            if _named(name, self.stated.copied):
                rest.append(name)
                continue
            stack, found = next(((i, m) for i, one in enumerate(stacks) if (m := one.match(name))), (0, None))
            if found:
                inside.append((stack, int(found[1]), name, name[found.end() :]))
            else:
                outside.append(name)
        numbers = {place: number for number, place in enumerate(sorted({entry[:2] for entry in inside}))}
        heads = [name for name in outside if HEAD.match(name)]
        for name in outside:
            if name not in heads:
                self.add(name)
        for stack, number, name, kind in sorted(inside, key=lambda entry: (entry[:2], _natural(entry[3]))):
            self.add(name, kind, numbers[stack, number])
        for name in heads:
            self.add(name)
        if not self.linears:
            raise CheckpointError(
                f"no tensor is a linear of a layer, of {len(self.shapes)} tensors, the first "
                f"{next(iter(self.shapes), 'none')}; --architecture=FILE.json says which are "
                f"(dppa_jax/architecture/README.md)."
            )
        self.layout.rest = tuple(rest)
        return self.specs, self.layout

    def add(self, name: str, kind: str = "", layer: int | None = None) -> None:
        """Add a tensor of a file, in the parts that it has."""
        shape = self.shapes[name]
        self.layout.shapes[name] = shape
        plain = re.sub(r"\.weight$", "", EXPERT.sub(r"\1.", kind) or name)
        parts = next((parts for fused, parts in self.stated.fused.items() if _named(kind, [fused])), None)
        if kind and parts:
            self._add_fused(name, kind, layer, parts)
        elif kind and len(shape) == 3 and _named(kind, self.stated.linears):
            rows = {f"{name}[{i}]": shape[1] for i in range(shape[0])}
            for i, (part, place) in enumerate(cut(name, rows).items()):
                self._put(part, shape[1:], Role.LINEAR, plain, layer, place, (i,))
        else:
            expert = EXPERT.search(kind)
            self._put(
                name, shape, self._role(name, kind), plain, layer, Place(name), (int(expert[2]),) if expert else ()
            )

    def _add_fused(self, name: str, kind: str, layer: int, parts: Mapping[str, int]) -> None:
        rows, columns = stored_rows(self.shapes[name])
        step = sum(parts.values())
        if min(parts.values()) < 1 or rows % step:
            raise CheckpointError(
                f"--architecture: {name} has {rows} rows, which are no multiple of the {step} rows of "
                f"{', '.join(parts)}; correct the numbers."
            )
        prefix = name.removesuffix(kind)
        places = cut(name, {f"{prefix}{part}.weight": count for part, count in parts.items()}, rows // step)
        for (part, place), (own, count) in zip(places.items(), parts.items(), strict=True):
            self._put(part, (count * (rows // step), columns), Role.LINEAR, own, layer, place)

    def _put(self, name, shape, role: Role, kind: str, layer: int | None, place: Place, expert=()) -> None:
        linear = self.linears if role is Role.LINEAR else None
        self.linears += role is Role.LINEAR
        index = ()
        if layer is not None:
            having = self.having.setdefault(kind, {})
            index = (having.setdefault(layer, len(having)), *expert)
        head = layer is None and bool(HEAD.match(name))
        self.specs[name] = TensorSpec(name, tuple(shape), role, kind, layer, linear, index, head=head)
        self.layout.places[name] = place

    def _role(self, name: str, kind: str) -> Role:
        if kind and len(self.shapes[name]) == 2 and _named(kind, self.stated.linears):
            return Role.LINEAR
        if not kind and len(self.shapes[name]) == 2 and _named(name, self.stated.vocabulary):
            return Role.VOCABULARY
        return dense_role(name, self.shapes[name])


def dense_role(name: str, shape: Sequence[int]) -> Role:
    """What a tensor is that is neither a linear nor the vocabulary's."""
    if len(shape) > 1:
        return Role.DENSE
    return Role.BIAS if name.endswith("bias") else Role.NORM


def _is_linear(kind: str, shape: Sequence[int]) -> bool:
    """Is a tensor of a layer with this name and shape a linear, or a stack of those of experts?"""
    module = re.sub(r"[._]?weight$", "", kind).split(".")[-1]
    if len(shape) == 2:
        return bool(WEIGHT.search(kind)) and min(shape) > 1 and not NO_LINEAR.search(module)
    return len(shape) == 3 and min(shape) > 1 and bool(re.search(r"\bexperts\b", kind)) and not NO_LINEAR.search(module)


def _named(name: str, patterns: Sequence[str]) -> bool:
    """Is a name one of these, in which * stands for anything?"""
    return any(name == pattern or ("*" in pattern and fnmatchcase(name, pattern)) for pattern in patterns)


def _natural(name: str) -> list:
    """A key that sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
