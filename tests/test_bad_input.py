"""Models that do not belong together, values that cannot be, places that must not be written: refused with a message.

`merge.refusal` also asserts that the message is one line for a person and that no file was made or changed. What is
wrong within one directory is in checkpoint/test_damaged_files.py.
"""

import shutil

import numpy as np
import pytest
from command import Merge
from families import (
    DTYPES,
    Q_PROJ,
    edit_json,
    edit_tensors,
    fine_tuned,
    llama_config,
    random_weights,
    write_model,
)

from dppa_jax.checkpoint import CheckpointError, SafetensorsDirectory
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.jobs.places import check_apart

TWO_PASSES, ONE_PASS = "dppa", ("task_arithmetic", "magnitude", "dare", "ties", "dare_ties")
EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.layers.2.input_layernorm.weight"


# ---- models that do not belong together


def other_model(merge: Merge, **changes) -> None:
    """Another model in place of the expert 'law'."""
    config = llama_config(**changes)
    merge.law = write_model(merge.root / "other", config, random_weights(config))


def test_different_layer_count(merge):
    other_model(merge, num_hidden_layers=4)
    assert "expert 'law' has 4 decoder layers, the base 3: a different base model?" in merge.refusal()


@pytest.mark.parametrize(
    ("changes", "tensor", "theirs", "ours"),
    [
        ({"hidden_size": 64}, EMBEDDINGS, "(64, 64)", "(64, 32)"),
        ({"intermediate_size": 40}, "model.layers.0.mlp.gate_proj.weight", "(40, 32)", "(48, 32)"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight", "(32, 32)", "(16, 32)"),
    ],
)
def test_shape_mismatch(merge, changes, tensor, theirs, ours):
    other_model(merge, **changes)
    message = merge.refusal()
    assert f"expert 'law': {tensor} has shape {theirs}, base has {ours}: different base model?" in message
    assert "Experts must be fine-tuned from --base" in message


def test_expert_of_another_base(merge):
    """Independent weights of equal size differ by √2 of it; no fine-tune does."""
    weights = random_weights(llama_config(), seed=99)
    merge.law = write_model(merge.root / "other", llama_config(), weights)
    message = merge.refusal()
    assert "expert 'law': its delta is 1.4" in message
    assert f"other base? Was {merge.law} made from {merge.base}? --allow_other_base merges it" in message
    assert (merge("--allow_other_base", "--method=task_arithmetic") / "config.json").is_file()


def test_expert_that_is_the_base_is_pointed_out(merge, caplog):
    from absl import logging

    logging.get_absl_logger().addHandler(caplog.handler)
    try:
        merge.law = merge.base
        merge("--method=task_arithmetic")
    finally:
        logging.get_absl_logger().removeHandler(caplog.handler)
    assert f"expert 'law' equals the base where it was probed; is {merge.base} fine-tuned?" in caplog.text


# ---- NaN and Inf


def damage(file, tensor: str, value: float) -> None:
    def change(tensors):
        tensors[tensor] = tensors[tensor].copy()
        tensors[tensor].flat[5] = value

    edit_tensors(file, change)


DAMAGES = ((np.nan, Q_PROJ), (-np.inf, Q_PROJ), (np.inf, EMBEDDINGS), (np.nan, NORM))
FAST = ("dppa base", "task_arithmetic law")  # with all damages; each other method with a NaN in a linear of an expert


@pytest.mark.parametrize(
    ("value", "tensor", "model", "method"),
    [
        pytest.param(
            *damage,
            model,
            method,
            marks=[] if f"{method} {model}" in FAST or (model, *damage) == ("law", *DAMAGES[0]) else pytest.mark.slow,
        )
        for damage in DAMAGES
        for model in ("base", "law")
        for method in (TWO_PASSES, *ONE_PASS)
    ],
)
def test_nan_and_inf(merge, value, tensor, model, method):
    file = merge.root / model / "model.safetensors"
    damage(file, tensor, value)
    message = merge.refusal(f"--method={method}")
    place = "(5,)" if tensor == NORM else "(0, 5)"
    assert f"{file}: {tensor} of {model!r} holds 1 NaN or Inf, the first at {place}" in message
    assert "--allow_nonfinite lets such a delta count as 0" in message


@pytest.mark.parametrize("method", [TWO_PASSES, "task_arithmetic", pytest.param("ties", marks=pytest.mark.slow)])
def test_allow_nonfinite_takes_such_a_delta_for_none(merge, method):
    damage(merge.law / "model.safetensors", Q_PROJ, np.nan)
    merge(f"--method={method}", "--allow_nonfinite")
    merged = SafetensorsDirectory(merge.output).read(Q_PROJ)
    assert np.isfinite(merged.astype(np.float32)).all()
    if method == "task_arithmetic":
        assert merged[0, 5] == SafetensorsDirectory(merge.math).read(Q_PROJ)[0, 5]


def test_values_beyond_the_output_dtype(merge):
    weights = random_weights(llama_config())
    weights[Q_PROJ] = weights[Q_PROJ] * DTYPES["bfloat16"](1e6)
    for name in ("base", "math", "law"):
        directory = merge.root / "large" / name
        setattr(merge, name, write_model(directory, llama_config(), fine_tuned(weights, len(name))))
    message = merge.refusal("--method=task_arithmetic", "--output_dtype=float16")
    assert f"{Q_PROJ}: the merged values overflow float16" in message
    assert "--output_dtype=bfloat16" in message


# ---- values and names

BAD_VALUES = {
    "--rate=1.5": "--rate: rate 1.5 is outside [0, 1]; it is the share that is removed",
    "--rate=-0.1": "--rate: rate -0.1 is outside [0, 1]",
    "--rate=nan": "--rate: rate nan is outside [0, 1]",
    "--partitions=0.9,1.8": "--partitions: rate 1.8 is outside [0, 1]",
    "--partitions=0.8,0.9": "--partitions=0.8,0.9: rates must fall, highest first: 0.9,0.8",
    "--partitions=0.9,0.8": "--partitions=0.9,0.8: the last one must be --rate=0.9",
    "--partitions=0.9,x": "--partitions: 'x' is not a number",
    "--tensor_rate=mlp=2": "--tensor_rate mlp: rate 2.0 is outside [0, 1]",
    "--tensor_rate=0.5": "--tensor_rate=0.5: give REGEX=NUMBER, for example --tensor_rate=mlp.down_proj=0.5",
    "--tensor_rate=mlp.dwn_proj=0.5": "--tensor_rate: no tensor matches 'mlp.dwn_proj'. Did you mean 'mlp.down_proj'?",
    "--tensor_rate=q_prj=0.5": "--tensor_rate: no tensor matches 'q_prj'. Did you mean 'q_proj'?",
    "--tensor_rate=(=0.5": "--tensor_rate: '(' is not a regular expression",
    "--tensor_coefficient=embed_tokns=0.5": "no tensor matches 'embed_tokns'. Did you mean 'embed_tokens'?",
    "--tensor_coefficient=mlp=nan": "--tensor_coefficient mlp: nan is not a finite number",
    "--coefficient=lwa=0.5": "--coefficient expert=lwa: not one of math, law. Did you mean 'law'?",
    "--coefficient=law=half": "--coefficient=law=half: 'half' is not a number",
    "--coefficient=inf": "--coefficient math: inf is not a finite number",
    "--factors=1.8,1.3": "--factors of 'math': 2 factors for the 1 partitions 0.9; give one each, highest rate first",
    "--factors=mth=1.8": "--factors expert=mth: not one of math, law. Did you mean 'math'?",
    "--factors=nan": "--factors of 'math': nan is not a finite number",
    "--max_fluctuation=2": "--max_fluctuation=2.0: outside [0, 1]",
    "--significance_multiple=-1": "--significance_multiple=-1.0: it must be 0 or more",
    "--method=dpa": f"--method=dpa: not one of {', '.join(METHODS)}.",
    "--method=taskarithmetic": "Did you mean 'task_arithmetic'?",
    "--score=magnitud": f"--score=magnitud: not one of {', '.join(SCORES)}. Did you mean 'magnitude'?",
    "--allocate=uniforn": "--allocate=uniforn: not one of uniform, owl, dp, dp_reference. Did you mean 'uniform'?",
    "--scale=partitions": f"--scale=partitions: not one of {', '.join(SCALES)}. Did you mean 'partition'?",
    "--combine=tiez": "--combine=tiez: not one of sum, ties, linear",
    "--ties=exakt": "--ties=exakt: not one of auto, drop, keep, exact, floor. Did you mean 'exact'?",
    "--dpa_combine=highst": "--dpa_combine=highst: not one of highest, max. Did you mean 'highest'?",
    "--delta_dtype=float23": "--delta_dtype=float23: not one of float32, bfloat16, float16. Did you mean 'float32'?",
    "--output_dtype=bf16": "--output_dtype=bf16: not one of float32, bfloat16, float16. Did you mean",
    "--tokenizer=maths": "--tokenizer=maths: not one of base, math, law. Did you mean 'math'?",
    "--residency=streaming": "--residency=streaming: not one of auto, resident, streamed. Did you mean 'streamed'?",
    "--mesh=layers=2": "--mesh=layers=2: 'layers=2' is not layer=N or row=N; for example --mesh=layer=2,row=4",
    "--mesh=row=64": "--mesh=row=64 asks for 64 devices,",
    "--job=merg": "--job=merg: not one of merge,",
    "--max_shard_size=0": "--max_shard_size=0: a number of bytes",
    "--max_shard_size=0.1B": "--max_shard_size=0: a number of bytes",
    "--max_shard_size=many": "--max_shard_size=many: a number of bytes, for example 2000000000, 500MB, 5GB or 2GiB",
    "--max_shard_size=-5GB": "--max_shard_size=-5GB: a number of bytes",
    "--block_layers=-1": "--block_layers=-1: 1 or more layers at a time, or 0 to choose",
    "--device_memory=-1": "--device_memory=-1: GB of one device, or 0 to ask it",
    "--expert=law=elsewhere": "elsewhere: no such directory, and not of the form owner/name of a hub id",
    "--expert=elsewhere": "--expert=elsewhere: give NAME=WHERE, for example --expert=math=GAIR/Abel-7B-001",
    "--expert==elsewhere": "--expert==elsewhere: give NAME=WHERE",
    "--expert=base=elsewhere": "--expert: 'base' cannot name an expert",
    "--expert=../../law=elsewhere": "--expert: '../../law' cannot name an expert",
    "--base=": "--base is empty: give the model that the experts were fine-tuned from",
    "--base=/no/such/place": "/no/such/place: no such directory, and not of the form owner/name of a hub id",
    "--output=": "--output is empty: give the directory of the merged model",
    "outputs": "unexpected argument 'outputs'; every input is a flag. Did you mean 'output'?",
}


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_bad_value(merge, flag):
    assert BAD_VALUES[flag] in merge.refusal(flag)


BAD_COMBINATIONS = {
    "--method=dare --factors=1.8": "--factors: only --scale=partition (dppa, dare_dpa) has them, not 'dare'",
    "--method=magnitude --partitions=0.9": "--partitions: only --scale=partition (dppa, dare_dpa) has them, not 'none'",
    "--rate=0.7 --factors=1.8,1.3": "2 factors for the 3 partitions 0.9,0.8,0.7",
    "--rate=0.7 --factors=math=1,1,1 --factors=law=1": "--factors of 'law': 1 factors for the 3 partitions 0.9,0.8,0.7",
    "--method=task_arithmetic --scale=dare": "--method=task_arithmetic prunes nothing: give --score as well",
    "--method=task_arithmetic --allocate=dp": "--method=task_arithmetic prunes nothing: give --score as well",
    "--method=task_arithmetic --tensor_rate=mlp=0.5": "--tensor_rate: --method=task_arithmetic prunes nothing",
    "--method=darex_q": "--scale=q (darex_q) needs --q, for all experts or as NAME=0.2 for each of them",
    "--method=darex_q --q=math=0.2": "--scale=q (darex_q) needs --q, for all experts",
    "--method=darex_q --q=0": "--q math=0.0: outside (0, 1]; kept parameters are divided by it",
    "--method=dare --q=0.2": "--q: only --scale=q (darex_q) divides by it, not 'dare'",
    "--method=dare --q=auto": "--q: only --scale=q (darex_q) divides by it, not 'dare'",
    "--method=darex_q --q=bonud": "--q=bonud: 'bonud' is not a number",
    "--method=darex_q --q=bound": "--q=bound needs --calibration=FILE",
    "--method=darex_q --score=random_group --q=mse --calibration=x": "--q=mse: it is a rule for single linears",
    "--method=darex_q --q=auto": "--q=auto needs --calibration=FILE",
    "--method=darex_q --q=search": "--evaluate is empty",
    "--method=darex_q --q=search --evaluate=addition": "--q=search: expert 'law' has no tasks in --evaluate",
    "--method=darex_q --q=auto --q_eta=0": "--q_eta=0.0: it must be above 0",
    "--method=magnitude --score=random_row --scale=dare": "--score=random_row drops whole outputs",
    "--score=wanda": "--score=wanda needs --calibration=FILE",
}


@pytest.mark.parametrize("flags", BAD_COMBINATIONS)
def test_bad_combination(merge, flags):
    assert BAD_COMBINATIONS[flags] in merge.refusal(*flags.split())


def test_no_expert(merge):
    message = merge.refusal(of=[f"--base={merge.base}", f"--output={merge.output}"])
    assert "no expert: give --expert=NAME=WHERE at least once" in message


# ---- places that must not be written


@pytest.mark.parametrize("where", ["base", "law", "base/merged", "."])
def test_output_that_would_destroy_or_enter_an_input(merge, where):
    edit_json(merge.root / "base" / "config.json")
    for name in ("config.json", "model.safetensors"):  # the parent, too, could be taken for a model to replace
        shutil.copy(merge.base / name, merge.root)
    message = merge.refusal(f"--output={merge.root}/{where}", "--overwrite")
    assert "--output: " in message
    assert "are the same or one contains the other; choose a directory apart from it" in message


def test_output_that_is_an_input_by_another_name(merge):
    (merge.root / "link").symlink_to("law")
    message = merge.refusal(f"--output={merge.root}/link", "--overwrite")
    assert f"{merge.root}/link and the model 'law' in {merge.law} are the same" in message


def test_input_that_has_the_name_of_unfinished_output(merge):
    merge.base = merge.base.rename(merge.root / "out.incomplete")
    assert f"{merge.base} holds files that no unfinished run has left there" in merge.refusal()
    with pytest.raises(CheckpointError, match=f"{merge.output} and the model 'base' in {merge.base} are the same"):
        check_apart({"--output": str(merge.output)}, {"base": merge.base})


@pytest.mark.parametrize("flag", ["--output=loop", "--save_delta=loop", "--output=loop/out", "--base=loop"])
def test_a_link_that_leads_back_to_itself(merge, flag):
    (merge.root / "loop").symlink_to("loop")
    name, where = flag.split("=")
    assert f"{merge.root}/loop" in merge.refusal(f"{name}={merge.root}/{where}", "--method=ties")


@pytest.mark.parametrize("deltas", ["out", "out/deltas", "law"])
def test_save_delta_over_other_things(merge, deltas):
    message = merge.refusal(f"--save_delta={merge.root}/{deltas}")
    other = "the model 'law'" if deltas == "law" else "the output of --output"
    assert f"math: {merge.root}/{deltas}/math and {other}" in message


def test_save_delta_where_something_is(merge):
    (merge.root / "deltas" / "law").mkdir(parents=True)
    (merge.root / "deltas" / "law" / "notes").write_text("mine")
    assert f"{merge.root}/deltas/law is not empty" in merge.refusal(f"--save_delta={merge.root}/deltas")


def test_output_whose_parent_is_a_file(merge):
    (merge.root / "file").write_text("")
    assert f"{merge.root}/file" in merge.refusal(f"--output={merge.root}/file/out")


WORKING = {  # by job: its flags beside the base and the output, up to where it looks at --workdir
    "merge": ["--expert=math={math}", "--method=dare", "--evaluate=addition"],
    "search": ["--expert=math={math}", "--method=dppa", "--evaluate=addition"],
    "inspect": ["--expert=math={math}", "--method=dppa"],
    "plan": ["--expert=math={math}", "--method=dppa"],
    "validate": ["--reference={math}"],
    "finetune": ["--train_data=none.jsonl"],
    "evaluate": ["--evaluate=addition"],
}


@pytest.mark.parametrize(
    ("job", "where"),
    [
        *((job, "base/runs") for job in WORKING),
        *(("merge", where) for where in ("math", "out", "out/runs", "out.incomplete")),
        *(("finetune", where) for where in ("out/runs", "out.incomplete/runs")),
    ],
)
def test_workdir_in_a_model_or_an_output(merge, job, where):
    """What a job keeps there would be lost with the output, or lie among the files of a model."""
    output = merge.base if job in ("evaluate", "validate") else merge.output  # one that they read
    given = [f"--job={job}", f"--base={merge.base}", f"--output={output}", f"--workdir={merge.root / where}"]
    message = merge.refusal(of=[*given, *(flag.format(math=merge.math) for flag in WORKING[job])])
    assert f"--workdir: {merge.root / where} is or lies in the " in message
