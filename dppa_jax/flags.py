"""The flags of the command line, defined when this is imported, what --help says of them, how values are read."""

import math
import textwrap

from absl import flags

JOBS = ("merge", "plan", "inspect", "evaluate", "search", "finetune", "convert", "validate", "report", "benchmark")
NAMED_ONLY = ("evaluation", "search of factors", "AdaMerging", "fine-tuning", "report, validate and benchmark")
INDENT = {"subsequent_indent": "  ", "break_on_hyphens": False}

# Groups of flags as --helpshort shows them: (name, kind, default, help).
GROUPS = {
    "work": (
        ("job", "string", "merge", ", ".join(JOBS)),
        ("workdir", "string", "runs", "responses, searches, reports, benchmark models"),
        ("overwrite", "bool", False, "replace what is in --output"),
        ("resume", "bool", True, "go on from what a run of the same inputs and flags left behind"),
    ),
    "models": (
        ("base", "string", "", "directory, hub id (owner/name[@revision]), orbax:DIR, or demo:base"),
        ("expert", "multi", [], "NAME=WHERE, repeated; demo:math, demo:finance, demo:law"),
        ("output", "string", "", "directory of the merged model; convert: also orbax:DIR"),
        ("output_dtype", "string", "", "float32, bfloat16 or float16; default: each base tensor's own"),
        ("max_shard_size", "int", 2_000_000_000, "bytes of a safetensors file"),
        ("save_delta", "string", "", "also write each expert's pruned and scaled delta to DIR/NAME"),
        ("tokenizer", "string", "base", "whose tokenizer and chat template to copy: base or an expert's name"),
    ),
    "method": (
        ("method", "string", "dppa", "preset; see the README's table"),
        ("score", "string", "", "override of the preset: magnitude, random, wanda, row, column"),
        ("allocate", "string", "", "override: uniform, owl, dp, dp_reference"),
        ("scale", "string", "", "override: none, dare, q, partition"),
        ("combine", "string", "", "override: sum, ties"),
        ("rate", "float", 0.9, "share of each delta that is removed, in [0, 1]"),
        ("partitions", "list", [], "DPA: rates, highest first, ending at --rate; default every 0.1 from 0.9"),
        ("factors", "multi", [], "DPA: one per partition, 1.8,1.3 or NAME=1.8,1.3 (repeat), or search"),
        (
            "coefficient",
            "multi",
            [],
            "0.7, NAME=0.7 (repeat), FILE.json, adamerging[_layerwise,_linearwise]; default 1",
        ),
        ("q", "multi", [], "DAREx-q: kept parameters are divided by it: 0.2 or NAME=0.2 (repeat)"),
        ("max_fluctuation", "float", 0.08, "DP: greatest change of a rate by a layer, and by a linear"),
        ("significance_multiple", "float", 5.0, "DP, OWL: |delta| above this times the mean is an outlier"),
        ("dpa_combine", "string", "highest", "factor of an element in several partitions: highest (rate) or max"),
        ("tensor_rate", "multi", [], "REGEX=RATE, first match wins; 0 keeps a linear dense"),
        ("tensor_coefficient", "multi", [], "REGEX=COEFFICIENT, first match wins"),
        ("calibration", "string", "", "text file for --score=wanda, a sample a line"),
        ("seed", "int", 0, "of random scores and of the demo family"),
        ("delta_dtype", "string", "float32", "the delta is formed in it; all after it is float32"),
        ("allow_nonfinite", "bool", False, "let a NaN or Inf delta count as 0"),
        ("allow_other_base", "bool", False, "merge experts whose delta is as large as the weights"),
    ),
    "devices": (
        ("mesh", "string", "", "layer=2,row=4, finetune: data=2,fsdp=4; default: all local devices on the second"),
        ("block_layers", "int", 0, "layers on the devices at a time; 0: from the memory there is"),
        ("residency", "string", "auto", "auto, resident (read once) or streamed"),
        ("device_memory", "float", 0.0, "GB of a device to plan for; 0: ask the device"),
        ("coordinator", "string", "", "of several processes the first, HOST:PORT; auto: Slurm, TPU, Kubernetes, MPI"),
        ("num_processes", "int", 0, "how many there are, with --coordinator=HOST:PORT; plan: to plan for"),
        ("process_id", "int", -1, "which this is, from 0 on"),
    ),
    "evaluation": (
        ("evaluate", "list", [], "tasks, of the domains that experts are named after"),
        ("evaluator", "string", "jax", "jax (in this process) or vllm"),
        ("vllm_python", "string", "", "interpreter of an environment with vLLM; default: this one"),
        ("data_dir", "string", "", "directory of TASK.jsonl files; default: the hub's datasets"),
        ("limit", "int", 0, "items per task, the first ones; 0: all"),
        ("prompt_choices", "string", "hidden", "finance, law: are the options in the prompt? hidden, listed"),
        ("prompt_wrapper", "string", "none", "finance, law: none, llama2_chat, chat_template (the tokenizer's)"),
        ("letter_case", "string", "ignore", "finance, law: of labels in responses: ignore, match"),
        ("labels", "string", "exclusive", "finance, law: exclusive (a right label and no wrong one), any"),
        ("max_new_tokens", "int", 0, "of a response; 0: the task's own, 2048"),
        ("max_length", "int", 2048, "tokens of prompt and response together"),
        ("batch_size", "int", 256, "prompts decoded together"),
        ("evaluate_dtype", "string", "auto", "float32, bfloat16, float16; auto: the model's, float32 for jax on a CPU"),
        ("tensor_parallel_size", "int", 1, "vllm: devices"),
        ("gpu_memory_utilization", "float", 0.9, "vllm: share of a GPU's memory"),
        ("vllm_timeout", "float", 1800.0, "vllm: seconds without a response after which it is started again"),
    ),
    "search of factors": (
        ("search_rule", "string", "parabola", "parabola, or reference (as the authors' code walks)"),
        ("search_methods", "list", ["1", "2"], "1: partition after partition, 2: all from the start; the better wins"),
        (
            "search_start",
            "list",
            [],
            "factors to begin with, one for all or each; default 1; DARE: 1/(1-rate)",
        ),
        ("search_step", "list", [], "smallest change of a factor; default 0.1; DARE: downwards, a share of the start"),
        ("search_bounds", "list", [], "LOWEST,HIGHEST factor; default 0,4; DARE: from 0 to the start"),
        ("search_evaluations", "int", 200, "candidates of an expert at most"),
        ("search_split", "string", "validation", "validation, or test: chosen by what is reported, as the paper did"),
        ("search_limit", "int", 0, "items per task; 0: all of the split"),
        ("validation_share", "float", -1.0, "of a task's items, set aside for searches; -1: 0.2 in jobs that search"),
        ("split_seed", "int", 0, "of which items are set aside"),
    ),
    "AdaMerging": (
        ("adamerging_steps", "int", 500, "of Adam"),
        ("adamerging_batch_size", "int", 16, "prompts of each domain in a step"),
        ("adamerging_learning_rate", "float", 1e-3, "of Adam"),
        ("adamerging_start", "float", 0.3, "every coefficient's"),
        ("adamerging_positions", "string", "all", "whose entropy counts: all (of the prompt), last, generated"),
        ("adamerging_new_tokens", "int", 32, "at most, of continuations, for generated"),
        ("adamerging_split", "string", "validation", "prompts: validation, or test: of what is reported, as the paper"),
        ("adamerging_limit", "int", 0, "prompts per task; 0: all of the split"),
        ("adamerging_patience", "int", 0, "end when as many steps bring no lower entropy; 0: never"),
        ("adamerging_min_delta", "float", 1e-3, "nats that count as lower"),
    ),
    "fine-tuning": (
        ("train_data", "list", [], "files of examples, JSON lines: prompt, completion (which is learned)"),
        ("eval_data", "list", [], "files of examples of which the loss is told"),
        ("epochs", "float", 1.0, "passes over the examples"),
        ("train_steps", "int", 0, "steps, in place of --epochs"),
        ("learning_rate", "float", 2e-5, "its peak; it rises linearly, then falls along a cosine to a 20th"),
        ("warmup", "float", 0.03, "share of the steps in which it rises"),
        ("train_batch_size", "int", 16, "rows of a step"),
        ("accumulate", "int", 1, "parts of a step's rows that go through the model one after another"),
        ("train_length", "int", 512, "tokens of a row"),
        ("pack", "bool", True, "several examples to a row, each of which sees itself only"),
        ("train_dtype", "string", "bfloat16", "of forward and backward pass: bfloat16, float32; the rest is float32"),
        ("remat", "bool", True, "recompute layers in the backward pass: less memory, a third more work"),
        ("weight_decay", "float", 0.0, "of AdamW"),
        ("max_gradient_norm", "float", 1.0, "longer gradients are shortened to it"),
        ("checkpoint_every", "int", 100, "steps between checkpoints in --workdir, to go on from; 0: none"),
        ("eval_every", "int", 0, "steps between losses on --eval_data; 0: at the end"),
    ),
    "report, validate and benchmark": (
        ("methods", "list", [], "report: methods of the table of single experts; benchmark: what to time"),
        ("merge_methods", "list", [], "report: methods of the table of merges; dppa+adamerging finds the coefficients"),
        ("rates", "list", [], "report: rates of both tables; 0.1:0.9:0.1 is a range"),
        ("seeds", "list", ["0"], "report: seeds, of the demo family and of random scores"),
        ("reference", "string", "", "validate: directory, of another implementation, that --output is compared with"),
        ("tolerance_ulp", "float", 1.0, "validate: how far apart values may be, in units in the last place"),
        ("shape", "list", ["0.3b"], "benchmark: 0.3b, 1.1b, 3b, 7b; several make a table of sizes"),
        ("device", "string", "", "benchmark: gpu or cpu, of the arithmetic alone, on weights made there"),
        ("scaling", "bool", False, "benchmark: by 1, 2 and 4 processes"),
        ("peer", "string", "", "benchmark: mergekit, run alternately; restart: of vLLM, beside a search's candidates"),
        ("peer_python", "string", "", "benchmark: interpreter of an environment with mergekit; default: this one"),
        ("repeats", "int", 1, "benchmark: runs of each; the fastest counts"),
    ),
}

_DEFINE = {
    "string": flags.DEFINE_string,
    "bool": flags.DEFINE_boolean,
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "list": flags.DEFINE_list,
    "multi": flags.DEFINE_multi_string,
}
for _group in GROUPS.values():
    for _name, _kind, _default, _help in _group:
        _DEFINE[_kind](_name, _default, _help)


def usage(short: bool) -> str:
    """What --help prints, a flag on a line; short, for one screen, the flags of some groups are only named."""
    lines = ["python -m dppa_jax.launch [--flagfile=FILE] [--FLAG=VALUE ...]" + ", explained by --help" * short]
    for group, members in GROUPS.items():
        if short and group in NAMED_ONLY:
            named = f"{group}: {' '.join(f'--{name}' for name, *_ in members)}"
            lines += textwrap.wrap(named, 118, **INDENT)
        else:
            lines += [f"\n{group}", *(f"  --{name:<26}{text}" for name, _, _, text in members)]
    return "\n".join(lines)


def read_rates(given: list[str]) -> tuple[float, ...]:
    """Numbers, or FIRST:LAST:STEP with both ends.

    >>> read_rates(["0.7:0.9:0.1", "0.95"]), read_rates(["0.5:1:0.2"])
    ((0.7, 0.8, 0.9, 0.95), (0.5, 0.7, 0.9))
    """
    found = []
    for text in given:
        numbers = read_numbers("--rates", text.split(":"))
        if len(numbers) == 1:
            found += numbers
        elif len(numbers) == 3 and numbers[2] > 0 and numbers[0] <= numbers[1]:
            first, last, step = numbers
            found += [round(first + i * step, 10) for i in range(math.floor((last - first) / step + 1e-9) + 1)]
        else:
            raise ValueError(f"--rates={text}: give rates, or FIRST:LAST:STEP such as 0.1:0.9:0.1.")
    return tuple(found)


def read_experts(given: list[str]) -> dict[str, str]:
    """The experts by name; a later place of the same name counts, so that a flagfile's can be replaced.

    >>> read_experts(["math=GAIR/Abel-7B-001", "law=AdaptLLM/law-chat", "math=/models/abel"])
    {'math': '/models/abel', 'law': 'AdaptLLM/law-chat'}
    """
    experts: dict[str, str] = {}
    for text in given:
        name, equals, where = text.partition("=")
        if not equals or not name or not where:
            raise ValueError(f"--expert={text}: give NAME=WHERE, for example --expert=math=GAIR/Abel-7B-001.")
        experts[name] = where
    return experts


def read_rules(flag: str, given: list[str]) -> tuple[tuple[str, float], ...]:
    rules = []
    for text in given:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"{flag}={text}: give REGEX=NUMBER, for example {flag}=mlp.down_proj=0.5.")
        rules.append((pattern, *read_numbers(flag, [value])))
    return tuple(rules)


def read_numbers(flag: str, given: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in given)
    except ValueError as error:
        raise ValueError(f"{flag}: {str(error).rsplit(':', 1)[-1].strip()} is not a number.") from None
