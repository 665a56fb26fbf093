"""What a row of the table of architectures is made of: names, roles and sizes of the tensors of a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

SIZES = {  # of a shape, by the key of config.json
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
}
CLASSIFIER = "ForSequenceClassification"  # how the names of classes with a classification head end
UNITS = {  # by the size of an axis: what it consists of, and the size that says how many of them there are
    "queries": ("heads", "key heads"),
    "keys": ("heads", "key heads"),
    "inner": ("neurons", "inner"),
    "expert_inner": ("neurons", "expert_inner"),
}
WRAPPED = "text_config"  # the key of a model of images and text under which the text model's settings are

NULL_SAYS = (  # there is none; for other keys of config.json null means the default
    *("bos_token_id", "eos_token_id", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
)


def without_nulls(config: Mapping) -> dict[str, Any]:
    """Leave out keys of a config.json whose null means the default."""
    return {key: value for key, value in config.items() if value is not None or key in NULL_SAYS}


def wrapped(config: Mapping) -> Mapping:
    """What the config.json of a model of images and text says of its text model; of any other model, nothing."""
    inner = config.get(WRAPPED)
    return inner if isinstance(inner, Mapping) else {}


class Role(StrEnum):
    """What a tensor is to a merge. Linears are pruned; what is not pruned carries its dense delta."""

    LINEAR = "linear"
    BIAS = "bias"
    NORM = "norm"
    VOCABULARY = "vocabulary"  # its rows are tokens: an expert may have more of them than the base
    ROUTER = "router"  # of a mixture of experts: its rows are experts
    DENSE = "dense"  # any other tensor


PRUNED: Mapping[str, Callable[[Role, bool], bool]] = {  # by the value of --prune: of a role, and is it of a head?
    "linears": lambda role, head: role is Role.LINEAR,
    "backbone": lambda role, head: not head,
    "all": lambda role, head: True,
}


class Group(NamedTuple):
    """The heads or neurons that the rows or columns of a linear belong to, together with those of other linears.

    A unit is closed: what its rows compute nothing but its columns reads. So a neuron of an MLP is a row of gate and up
    and a column of down. A head is one of keys and values, with all query heads that share it, as these cannot do
    without it: rows of q, k and v, and columns of o.

    Attributes:
      name: which all linears of the group have: "model.layers.3.heads", "model.layers.3.experts.5.neurons".
      kind: "heads" or "neurons".
      units: how many there are.
      rows: are they rows of this linear, or columns?
    """

    name: str
    kind: str
    units: int
    rows: bool


class Linear(NamedTuple):
    """A matrix of every layer, (rows, columns).

    Attributes:
      kind: its name within the layer, without ".weight"; with {} for the number of an expert, where a mixture of
        experts has one such matrix each.
      rows, columns: sizes by name, keys of `Architecture.sizes`.
      bias: has it a bias: always, never, or as this key of config.json says.
      stored: its name in files, where that is another than `kind`; a file may have either.
      mlp: it is only in layers whose MLP is "dense", or "sparse": a mixture of experts. Empty: in every layer.
      role: a router is not pruned.
    """

    kind: str
    rows: str
    columns: str
    bias: bool | str = False
    stored: str = ""
    mlp: str = ""
    role: Role = Role.LINEAR

    def has_bias(self, config: Mapping) -> bool:
        """Has it a bias in the model of this config.json?"""
        return bool(config.get(self.bias)) if isinstance(self.bias, str) else self.bias

    def group(self, prefix: str, sizes: Mapping[str, int], expert: int | None = None) -> Group | None:
        """The heads or neurons that its rows or columns belong to, in the layer or in an expert of its mixture."""
        own = prefix if expert is None else f"{prefix}experts.{expert}."
        for size in (self.rows, self.columns):
            if size in UNITS:
                kind, count = UNITS[size]
                return Group(own + kind, kind, sizes[count], size == self.rows)
        return None


class Norm(NamedTuple):
    """A vector of every layer that is not pruned.

    Attributes:
      kind: its name within the layer, without ".weight".
      size: of the vector, a key of `Architecture.sizes`.
      bias: has it a bias of the same size?
    """

    kind: str
    size: str = "hidden"
    bias: bool = False


class Fused(NamedTuple):
    """A tensor of a file that holds the rows of several linears of a layer.

    Attributes:
      name: of the tensor within the layer: "self_attn.qkv_proj.weight".
      kinds: the linears in the order of their rows; those of every expert follow one another, expert by expert.
      alternate: a number in config.json, of heads: the first rows of each linear are those of the first head, then come
        those of the second. Empty: all rows of a linear lie together.
      always: do files of the family always have it? If not, a file may have each linear on its own.
    """

    name: str
    kinds: tuple[str, ...]
    alternate: str = ""
    always: bool = True


class Other(NamedTuple):
    """Any other tensor.

    Attributes:
      name: with ".weight" or ".bias"; within the layer, if it is of every layer.
      sizes: of its shape, keys of `Architecture.sizes`.
      role: what it is.
      given: is it there: always, or as this key of config.json says.
    """

    name: str
    sizes: tuple[str, ...]
    role: Role
    given: str = ""


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
      classes: what config.json lists under "architectures".
      model_type: what config.json says where it lists none.
      linears: of every layer, in the order of the tables of a merge.
      norms: of every layer.
      fused: tensors of files that hold several linears.
      others: further tensors of every layer.
      root: what the names of all tensors but heads begin with; some programs leave it out or write it otherwise.
      layer: the prefix of a layer's tensors, with {} for its number.
      embeddings, heads: matrices outside the layers whose rows are tokens, without ".weight"; heads only where they
        are not tied.
      outside: further tensors outside the layers, before them.
      final_norms: norms after the layers.
      own_heads: has each model a head of its own task, which is not part of the row? Such are encoders.
      pooled: is the head of an encoder's classifier fed by a pooler, which is the model's own and no part of the head?
      skips_padding: do the positions of an encoder's tokens begin after the number of its padding token?
      keys: further sizes, each by keys of config.json of which one is there.
      sparse: says of a layer whether its MLP is a mixture of experts, by `said` and the layer's number.
      defaults: keys of config.json that, left out, do not mean what they mean in most families.
      forward: has it a forward pass in JAX (evaluation in this process, AdaMerging, fine-tuning, activation norms)?
      vllm: have merges been loaded and asked by vLLM?
    """

    classes: tuple[str, ...]
    model_type: str
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...] = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
    fused: tuple[Fused, ...] = ()
    others: tuple[Other, ...] = ()
    root: str = "model."
    layer: str = "model.layers.{}."
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    heads: tuple[str, ...] = ("lm_head",)
    outside: tuple[Other, ...] = ()
    final_norms: tuple[Norm, ...] = (Norm("model.norm"),)
    own_heads: bool = False
    pooled: bool = False
    skips_padding: bool = False
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sparse: Callable[[Mapping, int], bool] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forward: bool = False
    vllm: bool = False

    @property
    def adamerging(self) -> bool:
        """Can coefficients be found by AdaMerging? It has no gradients of mixtures of experts, and asks decoders."""
        return self.forward and not self.own_heads and not any("{}" in linear.kind for linear in self.linears)

    def classifies(self, config: Mapping) -> bool:
        """Is the model of this config.json one with a classification head?"""
        return self.own_heads and str((config.get("architectures") or [""])[0]).endswith(CLASSIFIER)

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """Keys of config.json without which the shapes are not known; of each tuple one is there."""
        plain = (*SIZES.values(), "num_attention_heads", "num_hidden_layers")
        return (*((key,) for key in plain), *self.keys.values())

    def said(self, config: Mapping) -> dict[str, Any]:
        """What a config.json says of the text model, with the family's own defaults for what it leaves out."""
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}  # the outer one counts
        return {**self.defaults, **config, **wrapped(config), **tied}

    def sizes(self, config: Mapping) -> dict[str, int]:
        """The sizes that shapes are made of, by the names that rows use."""
        said = self.said(config)
        heads = said["num_attention_heads"]
        head = said.get("head_dim") or said["hidden_size"] // heads
        key_heads = said.get("num_key_value_heads") or heads
        queries, keys = heads * head, key_heads * head
        named = {name: said[key] for name, key in SIZES.items()}
        named |= {name: next(said[key] for key in keys if key in said) for name, keys in self.keys.items()}
        return named | {
            "queries": queries,
            "keys": keys,
            "key heads": key_heads,
            "head": head,
            "three queries": 3 * queries,
        }
