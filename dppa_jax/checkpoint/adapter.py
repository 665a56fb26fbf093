"""A PEFT adapter of low rank (LoRA): what adapter_config.json says of it, and the tensors of its file.

The format is that of https://github.com/huggingface/peft. Of adapters only those are read whose change of a weight is
scale · B · A, with scale = alpha/r, or alpha/√r with rsLoRA (arXiv:2312.03732). All others are refused.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from dppa_jax.architecture.specs import CheckpointError, matrix_shape
from dppa_jax.checkpoint.headers import DTYPE_BY_CODE, StoredTensor, read_header, shown
from dppa_jax.checkpoint.inside import inside, readable
from dppa_jax.checkpoint.open_files import OpenFiles
from dppa_jax.runtime.reading import convert, printable, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name of a module of the base
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?:\.weight)?")
WITHIN = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")  # what peft puts between a module and its own tensor
AGAIN = "Save it again with peft, or download it again."
MERGE_FIRST = "merge it into its base before, with peft's merge_and_unload().save_pretrained(DIR), and give DIR."
KINDS = {  # of adapters of low rank that add more than scale · B · A, by the key that says so
    "use_dora": "DoRA, which also scales rows to lengths that it has learned",
    "use_qalora": "QA-LoRA, which averages the inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "lora_bias": "LoRA with a bias after B",
    "trainable_token_indices": "an adapter with rows for single tokens",
    "target_parameters": "an adapter of parameters that are no module, such as experts in one array",
    "layer_replication": "an adapter of a model whose layers are repeated",
    "alora_invocation_tokens": "aLoRA, which acts after certain tokens only",
    "arrow_config": "Arrow, which chooses among adapters by the input",
    "kasa_config": "KaSA, which also changes the weights of the base",
}
KNOWN = (  # further keys, which change nothing in what is computed once training is over
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "task_type", "velora_config"),
)
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others take something out of the base's weights
PATTERN = re.compile(r"[\w.^$\\+*\[\]-]{1,300}")  # of names: no groups, and few repetitions, so that matching is fast
REPEATED = 2  # repetitions in a pattern, at most
MOST_PATTERNS = 5000  # of a model; the largest have that many linears

Rank = Annotated[int, msgspec.Meta(ge=1, le=65_536)]


class AdapterConfig(msgspec.Struct):
    """What is read of adapter_config.json; the defaults are peft's."""

    peft_type: str
    r: Rank = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class Factors:
    """The two factors of the change of a weight.

    Attributes:
      module: whose weight is changed.
      a, b: (rank, inputs) and (outputs, rank); of an embedding, inputs are tokens.
      scale: before their product B · A.
      embedding: is it an embedding, whose weight is (tokens, width): the product turned round?
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank of the change, at most."""
        return self.a.shape[0]


class Adapter:
    """A directory with adapter_config.json and adapter_model.safetensors. Its tensors are read when asked for.

    Attributes:
      config: what adapter_config.json says.
      tensors: those of the file, by their names in it.
      factors: of the weights that are changed, by the names of these in the base.
      whole: tensors that stand in place of the base's: the name in the file by that in the base.

    Raises:
      CheckpointError: it is no adapter of the kind that is read, or is damaged; names the file, the tensor or key and
        the fix.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.said: dict[str, Any] = read_json(inside(directory, CONFIG), fix=AGAIN, error=CheckpointError)
        self.config = _checked(self.said, directory / CONFIG)
        self.file = _weights(directory)
        self.tensors = read_header(self.file)
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, str] = {}
        patterns = self.config.rank_pattern, self.config.alpha_pattern
        self._ranks, self._alphas = (_compiled(given, directory / CONFIG) for given in patterns)
        self._files = OpenFiles()
        self._sort()

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows of a tensor, by its name in the file, into an array of its dtype."""
        self.read_part(self.tensors[name], start, stop, out)

    def read_part(self, tensor: StoredTensor, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows of a tensor of the file, or of one that lies in it."""
        self._files.read_rows("a tensor of the adapter", tensor, start, stop, out)

    def read_columns(self, tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Return columns start to stop (exclusive) of a matrix, as rows."""
        out = np.empty((tensor.shape[0], stop - start), tensor.dtype)
        for row, view in enumerate(out):
            position = tensor.offset + row * tensor.row_bytes + start * tensor.dtype.itemsize
            self._files.read_bytes("a tensor of the adapter", tensor.file, position, memoryview(view.view(np.uint8)))
        return out.T

    @property
    def itemsize(self) -> int:
        """Bytes of an element of its factors, the largest where they differ."""
        return max((one.a.dtype.itemsize for one in self.factors.values()), default=0)

    def files(self) -> dict[str, Path]:
        """Return the files of the adapter by name."""
        return {CONFIG: self.directory / CONFIG, WEIGHTS: self.file}

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self._files.close()

    def _sort(self) -> None:
        """Sort the tensors into factors and whole tensors; every one has its place."""
        pairs: dict[str, dict[str, tuple[str, bool]]] = {}
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPE_BY_CODE.values():
                raise CheckpointError(f"{self.file}: {shown(name)} is {tensor.dtype}, which no weight is. {AGAIN}")
            plain = WITHIN.sub("", name.removeprefix(PREFIX))
            if found := FACTOR.fullmatch(plain):
                pairs.setdefault(found["module"], {})[found["letter"]] = name, bool(found["embedding"])
            elif not name.startswith(PREFIX) or ".lora_" in name or plain in self.whole:
                raise CheckpointError(
                    f"{self.file}: {shown(name)} is no tensor of LoRA as peft writes it: A and B of a module, or a "
                    f"tensor of the base, after {PREFIX!r}; {MERGE_FIRST}"
                )
            else:
                self.whole[plain] = name
        for module, pair in pairs.items():
            self.factors[f"{module}.weight"] = self._factors(module, pair)

    def _factors(self, module: str, pair: Mapping[str, tuple[str, bool]]) -> Factors:
        """Check the two factors of a module."""
        if len(pair) < 2 or pair["A"][1] != pair["B"][1]:
            (name, _), *_ = pair.values()
            raise CheckpointError(f"{self.file}: {shown(name)} is there without the other factor. {AGAIN}")
        (first, embedding), (second, _) = pair["A"], pair["B"]
        a, b = self.tensors[first], self.tensors[second]
        for name, tensor in ((first, a), (second, b)):
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise CheckpointError(
                    f"{self.file}: {shown(name)} has shape {tensor.shape}, and is no matrix. DeepSpeed and FSDP leave "
                    f"it so where weights were not gathered: gather them before save_pretrained."
                )
        targets = self.config.target_modules
        if isinstance(targets, list) and not any(f".{module}".endswith(f".{target}") for target in targets):
            raise CheckpointError(
                f"{self.file}: {shown(first)} belongs to no module that target_modules in {CONFIG} names, so peft "
                f"leaves it out. {AGAIN}"
            )
        rank = _first(self._ranks, module, self.config.r)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{self.file}: {shown(first)} has rank {a.shape[0]}, {shown(second)} {b.shape[1]}, {CONFIG} says "
                f"{rank}; they do not belong together. {AGAIN}"
            )
        alpha = _first(self._alphas, module, self.config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if self.config.use_rslora else rank)
        return Factors(module, a, b, scale, embedding)


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter and no model: a model's own config.json is not there."""
    return os.path.lexists(directory / CONFIG) and not os.path.lexists(directory / "config.json")


def read_as_float32(adapter: Adapter, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows of a matrix of an adapter's file in float32; all of them by default."""
    rows, columns = matrix_shape(tensor.shape)
    out = np.empty(((rows if stop is None else stop) - start, columns), tensor.dtype)
    adapter.read_part(tensor, start, start + len(out), out)
    return out.astype(np.float32, copy=False)


def _checked(said: Mapping[str, Any], path: Path) -> AdapterConfig:
    """Return what adapter_config.json says; refuse adapters of other kinds than LoRA, and what is not understood.

    A key that is not known here is refused unless it is empty: it may change what the adapter computes.
    """
    kind = said.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {printable(repr(kind))[:99]}, and only LORA is read; {MERGE_FIRST}"
        )
    config = convert(dict(said), str(path), AdapterConfig, AGAIN, CheckpointError)
    for key in (key for key, value in said.items() if value not in (None, False, 0, "", [], {})):
        if key in KINDS:
            raise CheckpointError(f"{path}: {key} makes it {KINDS[key]}; {MERGE_FIRST}")
        if key not in KNOWN and key not in AdapterConfig.__struct_fields__:
            raise CheckpointError(
                f"{path}: {shown(key)} is {printable(repr(said[key]))[:99]}, and may change what the adapter computes "
                f"in a way that is not known here; {MERGE_FIRST}"
            )
    if config.init_lora_weights not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {printable(config.init_lora_weights)[:99]}, which changes the weights of "
            f"the base: {MERGE_FIRST}"
        )
    numbers: Iterable[float] = (config.lora_alpha, *(config.alpha_pattern or {}).values())
    if not all(map(math.isfinite, numbers)):
        raise CheckpointError(f"{path}: lora_alpha or alpha_pattern is no finite number. {AGAIN}")
    return config


def _weights(directory: Path) -> Path:
    """Return the file of the adapter's tensors."""
    if not os.path.lexists(directory / WEIGHTS):
        if os.path.lexists(directory / "adapter_model.bin"):
            raise CheckpointError(
                f"{directory}: adapter_model.bin is a pickle, which can run code when it is read. If you trust it, "
                f"load it with peft and save it again with save_pretrained(DIR, safe_serialization=True)."
            )
        raise CheckpointError(f"{directory}: {WEIGHTS} is missing beside {CONFIG}. {AGAIN}")
    return readable(directory, WEIGHTS)


def _compiled(patterns: Mapping[str, Any] | None, path: Path) -> list[tuple[re.Pattern, Any]]:
    """Return the patterns of the ends of modules' names, each with what holds for such modules.

    They come from a file, so they are few, and none can take long to match.
    """
    found = []
    for pattern, value in (patterns or {}).items():
        if not PATTERN.fullmatch(pattern) or sum(map(pattern.count, "*+")) > REPEATED or len(found) >= MOST_PATTERNS:
            raise CheckpointError(
                f"{path}: rank_pattern and alpha_pattern may name {MOST_PATTERNS} modules, with `.*` in two places "
                f"of a name at most, but not {shown(pattern)!r}; write out the names."
            )
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise CheckpointError(f"{path}: {shown(pattern)!r} is no pattern ({error}).") from None
    return found


def _first(patterns: Iterable[tuple[re.Pattern, Any]], module: str, default: Any) -> Any:
    """Return what the first pattern says that matches a module's name, as peft does."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)
