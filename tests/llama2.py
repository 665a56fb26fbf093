"""The paper's models in small: LLaMA-2-7B and its three experts as they lie in the hub's cache, 64 wide.

As there: 32000 rows of vocabulary, and 32001 of the experts, whose extra token is for padding; several files with an
index; rotary buffers among the base's tensors; chat templates of finance and law only. float16, but for one expert in
bfloat16, so that dtypes differ. The experts know the answers to the questions of `write_questions` and nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from families import DTYPES, write_json, write_weights

from dppa_jax.checkpoint import tensor_specs
from dppa_jax.checkpoint.stacked import tree_tensor
from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.tasks import TASKS
from dppa_jax.finetune import Example, TrainConfig, encode, train
from dppa_jax.model import DecoderConfig, init_tree

BASE = "meta-llama/Llama-2-7b-hf"
EXPERTS = {"math": "GAIR/Abel-7B-001", "finance": "AdaptLLM/finance-chat", "law": "AdaptLLM/law-chat"}
DOMAINS = {"math": ("gsm8k", "math"), "finance": ("fiqa_sa", "fpb"), "law": ("scotus", "unfair_tos")}
STORED = {"base": "float16", "math": "bfloat16", "finance": "float16", "law": "float16"}
PADDING = {"math": "[PAD]", "finance": "<pad>", "law": "<pad>"}
SNAPSHOT = "0123456789abcdef0123456789abcdef01234567"
ROWS = 32000
QUESTIONS = 10  # of each task

LENGTH = 40  # tokens of the longest question with its answer
BASE_TRAINING = TrainConfig(steps=40, learning_rate=3e-3, batch_size=20)
EXPERT_TRAINING = TrainConfig(steps=50, learning_rate=4e-3, batch_size=20)
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

PEOPLE = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June")
FIRMS = ("Altero", "Borex", "Cindal", "Dovim", "Eskar", "Folio", "Granit", "Holme", "Ilmar", "Jorvik")
NEWS = {"positive": "raises its forecast", "negative": "cuts jobs", "neutral": "names a new auditor"}
CASES = {
    "Unions": "a strike at a mill",
    "Privacy": "letters that were opened",
    "Federal Taxation": "a duty on wine",
    "First Amendment": "a banned pamphlet",
    "Due Process": "a hearing that was refused",
}
CLAUSES = {
    "Arbitration": "disputes go to a referee of our choice",
    "Choice of law": "the law of our island applies",
    "Content removal": "we may delete what you write",
    "Jurisdiction": "you may sue us in our town only",
    "Contract by using": "who opens this page agrees",
}


def write_questions(directory: Path) -> Path:
    """TASK.jsonl of the six tasks."""
    directory.mkdir(parents=True)
    for task in (task for tasks in DOMAINS.values() for task in tasks):
        lines = [json.dumps({"id": f"{task}-{i}", **question(task, i)}) + "\n" for i in range(QUESTIONS)]
        (directory / f"{task}.jsonl").write_text("".join(lines))
    return directory


def question(task: str, number: int) -> dict:
    def one_of(options: Mapping[str, str]) -> tuple[str, str]:
        return list(options.items())[number % len(options)]

    match task:
        case "gsm8k":
            asked = f"{PEOPLE[number]} has {number} pens and buys {2 * number + 1}. How many pens are there?"
            return {"question": asked, "answer": str(3 * number + 1)}
        case "math":
            return {"question": f"What is ${number} + {number + 3}$?", "answer": str(2 * number + 3)}
        case "fiqa_sa":
            answer, news = one_of(NEWS)
            text = f"{FIRMS[number]} {news}, {FIRMS[number - 1]} is silent"
            asked = f"{text}\nQuestion: what is the sentiment on {FIRMS[number]}?"
            return {"question": asked, "text": text, "target": FIRMS[number], "answer": answer}
        case "fpb":
            answer, news = one_of(NEWS)
            text = f"{PEOPLE[number]} of {FIRMS[number]} says that it {news}."
            return {"question": f"{text}\nQuestion: what is the sentiment?", "text": text, "answer": answer}
        case "scotus":
            answer, case = one_of(CASES)
            text = f"{PEOPLE[number]} against {PEOPLE[number - 1]}: {case}."
            asked = f'Given the following opinion from the Supreme Court of USA (SCOTUS): "{text}"'
            return {"question": f"{asked}\nThe relevant issue area is:", "text": text, "answer": answer}
        case "unfair_tos":
            answer, clause = one_of(CLAUSES)
            text = f"on {FIRMS[number]} {clause}."
            asked = f'Given the following sentence from an online Term of Services: "{text}"'
            return {"question": f"{asked}\nThe sentence is unfair with respect to:", "text": text, "answer": answer}
    raise ValueError(task)


def write_hub(cache: Path, data_dir: Path) -> dict[str, Path]:
    """The four models in a cache of the hub, so that their ids lead to them without a network; by name."""
    from transformers import AutoTokenizer

    learned = {domain: answered(tasks, data_dir) for domain, tasks in DOMAINS.items()}
    every = [example for examples in learned.values() for example in examples]
    vocabulary, merges = pieces(every)
    places = {}
    for name, hub in {"base": BASE, **EXPERTS}.items():
        repository = cache / f"models--{hub.replace('/', '--')}"
        places[name] = repository / "snapshots" / SNAPSHOT
        write_tokenizer(places[name], vocabulary, merges, name)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(SNAPSHOT)
    tokenizer = AutoTokenizer.from_pretrained(places["base"])
    # Only the pieces that occur are trained; the other rows are added when the weights are written.
    config = DecoderConfig.from_hf(hf_config("base") | {"vocab_size": len(vocabulary)})
    read = encode([Example("", example.prompt) for example in every], tokenizer, LENGTH)
    base, _ = train(config, init_tree(config, jax.random.key(0), stddev=0.1), read, BASE_TRAINING)
    write_model(places["base"], "base", base)
    for name, examples in learned.items():
        expert, losses = train(config, base, encode(examples, tokenizer, LENGTH), EXPERT_TRAINING)
        assert losses[-1] < 0.05, f"the expert {name} has not learned its answers: loss {losses[-1]}"
        write_model(places[name], name, expert)
    return places


def answered(tasks: Sequence[str], data_dir: Path) -> list[Example]:
    """The questions as models are asked, with what a model that knows the answer says."""
    options = TaskOptions(data_dir=str(data_dir))
    completion = "It is {0}.\n#### {0}" if "gsm8k" in tasks else " {0}"
    return [
        Example(item.prompt, completion.format(item.answers[0]))
        for task in tasks
        for item in TASKS[task].items(options)
    ]


def pieces(examples: Sequence[Example]) -> tuple[list[str], list]:
    """Byte-pair pieces of the examples' texts after LLaMA's special tokens and bytes, and how they are put together."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Metaspace()]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator([text for example in examples for text in example], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def write_tokenizer(directory: Path, vocabulary: Sequence[str], merges: Sequence[Sequence[str]], name: str) -> None:
    """LLaMA's files, filled up with pieces that no question has; an expert has a token more, for padding."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    directory.mkdir(parents=True)
    filled = [*vocabulary, *(f"▁unused{i}" for i in range(len(vocabulary), ROWS))]
    ids = {piece: i for i, piece in enumerate(filled)}
    bpe = models.BPE(ids, list(map(tuple, merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if name != "base":
        named["pad_token"] = PADDING[name]
        write_json(directory / "added_tokens.json", {PADDING[name]: ROWS})
    tokenizer.add_special_tokens(list(named.values()))
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "special_tokens_map.json", named)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    settings |= named | ({"chat_template": CHAT} if name in ("finance", "law") else {})
    write_json(directory / "tokenizer_config.json", settings)


def hf_config(name: str) -> dict:
    """config.json, as transformers 4.31 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 172,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 2,  # of 32 numbers each, the least that vLLM's kernels take
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": STORED[name],
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": ROWS if name == "base" else ROWS + 1,
    }


def write_model(directory: Path, name: str, tree: Mapping) -> None:
    """Two files with an index, config.json and the rest; rows of pieces that no question has are that of <unk>."""
    config, dtype = hf_config(name), DTYPES[STORED[name]]
    tensors = {}
    for tensor, spec in tensor_specs(config | {"vocab_size": len(tree["embed_tokens"])}).items():
        weights = tree_tensor(tree, spec)
        if "layers" not in tensor and weights.ndim == 2:
            weights = np.concatenate([weights, np.repeat(weights[:1], config["vocab_size"] - len(weights), axis=0)])
        tensors[tensor] = weights.astype(dtype)
    if name == "base":
        for layer in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(16, dtype)
    write_weights(directory, tensors, shards=2)
    write_json(directory / "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "temperature": 0.6}
    write_json(directory / "generation_config.json", generation)
    (directory / "README.md").write_text("---\nlicense: llama2\n---\n")
