"""A base and its experts as small Hugging Face directories, written with the safetensors package and not with ours."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
WORDS = ("[UNK]", "<s>", "</s>", *(f"word{i}" for i in range(60)))
CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def llama_config(**changes) -> dict:
    """Grouped queries, untied, bfloat16, as transformers 5 writes it; a change to None removes the key."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "vocab_size": 64,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, written out here so that the product's own list is held against it."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linears = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    linears += [(inner, hidden), (inner, hidden), (hidden, inner)]
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in zip(LINEARS, linears, strict=True)}
        found |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found


def random_weights(config: Mapping, seed: int = 0, dtype: str | None = None) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    dtype = DTYPES[dtype or config.get("dtype") or config["torch_dtype"]]
    return {
        name: (generator.normal(0, 0.2, shape) + (len(shape) == 1)).astype(dtype)
        for name, shape in shapes(config).items()
    }


def fine_tuned(base: Mapping[str, np.ndarray], seed: int, size: float = 0.03) -> dict[str, np.ndarray]:
    """The base with a delta of about a quarter of its size, heavy-tailed as deltas are."""
    generator = np.random.default_rng(seed)
    return {
        name: (array.astype(np.float32) + size * generator.standard_t(3, array.shape)).astype(array.dtype)
        for name, array in base.items()
    }


def write_model(
    directory: Path, config: Mapping, tensors: Mapping[str, np.ndarray], shards: int = 1, tokenizer: bool = True
) -> Path:
    """A Hugging Face directory: weights in one file, or spread over `shards` files with an index."""
    directory.mkdir(parents=True)
    write_weights(directory, tensors, shards)
    write_json(directory / "config.json", config)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_weights(directory: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file, {"format": "pt"})
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer, a chat template, a generation config; oddly spaced, to tell copies from rewrites."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}, indent=7))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "generation_config.json").write_text('{"bos_token_id":1,   "eos_token_id":2, "max_new_tokens": 7}')


def write_family(root: Path, experts: tuple[str, ...] = ("math", "law"), dtype: str = "bfloat16", **changes) -> Path:
    """root/base and root/NAME for every expert."""
    config = llama_config(dtype=dtype, **changes)
    base = random_weights(config)
    write_model(root / "base", config, base)
    for seed, name in enumerate(experts, 1):
        write_model(root / name, config, fine_tuned(base, seed))
    return root


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes."""
    content = read_json(path) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def edit_header(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the header of a safetensors file, leaving the tensors' bytes as they are."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def edit_tensors(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a safetensors file after a change of the dict of its arrays."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
