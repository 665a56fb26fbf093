"""RegMean against its formula in NumPy, written anew here, with what linears read as hooks on transformers see it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import transformers
from command import Merge
from decoders import MODELS, torch_model
from encoders import classifier
from families import edit_tensors, shapes, write_family
from safetensors.numpy import load_file
from support import assert_same_bits, given_out, linear_names, make_family, merge_to_arrays, random_grams

import dppa_jax
from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.config.merge import MergeConfig
from dppa_jax.merging.activations import PADDING, activation_norms, padded
from dppa_jax.merging.input_grams import LayerwiseGrams
from dppa_jax.merging.merger import Layout
from dppa_jax.merging.plan import make_plan

EXPERTS = ("math", "law", "finance")
DOWN, ROUNDED = "model.layers.0.mlp.down_proj.weight", 1e-6


def formula(weights: Sequence, grams: Sequence, coefficients: Sequence[float], alpha: float) -> np.ndarray:
    """(Σ cWG̃)(Σ cG̃)⁻¹ as the paper writes it, in float64."""
    reduced = []
    for gram, coefficient in zip(grams, coefficients, strict=True):
        wide = gram.astype(np.float64)
        reduced.append(coefficient * (alpha * wide + (1 - alpha) * np.diag(np.diag(wide))))
    return sum(w.astype(np.float64) @ g for w, g in zip(weights, reduced, strict=True)) @ np.linalg.inv(sum(reduced))


def mean(weights: Sequence, coefficients: Sequence[float]) -> np.ndarray:
    return np.average([one.astype(np.float64) for one in weights], axis=0, weights=coefficients)


@pytest.fixture(scope="module")
def family():
    return make_family(EXPERTS, "float32", num_hidden_layers=2)


@pytest.fixture(scope="module")
def grams(family):
    return random_grams(family[0], EXPERTS)


def merged(family, grams: Mapping, alpha: float = 0.9, **more) -> dict[str, np.ndarray]:
    base, experts = family
    config = MergeConfig(tuple(experts), method="regmean", method_options={"regmean_alpha": alpha}, **more)
    return merge_to_arrays(base, experts, config, layout=Layout(1), input_grams=given_out(grams)).tensors


# ---- the formula


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("given", [{}, {"math": 0.5, "law": 2.0}])
def test_linears_are_the_formula_and_all_else_the_mean_of_the_experts(family, grams, alpha, given):
    found = merged(family, grams, alpha, coefficients=given)
    coefficients = [given.get(name, 1.0) for name in EXPERTS]
    linears = linear_names(family[0].config)
    for name in family[0].tensors:
        weights = [expert.tensors[name] for expert in family[1].values()]
        wanted = average = mean(weights, coefficients)
        if name in linears:
            wanted = formula(weights, [grams[expert][name] for expert in EXPERTS], coefficients, alpha)
            assert np.abs(wanted - average).max() > 1e-3, name
        np.testing.assert_allclose(found[name], wanted, atol=ROUNDED, err_msg=name)


def test_alpha_0_weighs_every_column_by_the_squares_of_its_inputs(family, grams):
    found = merged(family, grams, 0.0)
    for name in linear_names(family[0].config):
        shares = np.stack([np.diag(grams[expert][name]) for expert in EXPERTS])
        weights = np.stack([expert.tensors[name] for expert in family[1].values()])
        wanted = (weights * shares[:, None]).sum(axis=0) / shares.sum(axis=0)
        np.testing.assert_allclose(found[name], wanted, atol=ROUNDED, err_msg=name)


def test_alpha_1_has_the_outputs_nearest_to_those_of_the_experts():
    """The problem that the paper starts from, solved as such: rows of all experts' inputs, and their outputs."""
    family = make_family(("math", "law"), "float32", num_hidden_layers=1)
    generator, names = np.random.default_rng(3), linear_names(family[0].config)
    inputs = {e: {n: generator.normal(size=(200, family[0].specs[n].columns)) for n in names} for e in family[1]}
    products = {e: {n: (x.T @ x).astype(np.float32) / len(x) for n, x in of.items()} for e, of in inputs.items()}
    found = merged(family, products, 1.0)
    for name in names:
        outputs = [inputs[e][name] @ expert.tensors[name].T for e, expert in family[1].items()]
        read = np.concatenate([of[name] for of in inputs.values()])
        wanted = np.linalg.lstsq(read, np.concatenate(outputs))[0].T
        np.testing.assert_allclose(found[name], wanted, atol=ROUNDED, err_msg=name)


def test_equal_experts_are_left_as_they_are(family, grams):
    same = dict.fromkeys(EXPERTS, family[1]["math"])
    assert_same_bits(
        {n: x for n, x in merged((family[0], same), grams).items() if n in linear_names(family[0].config)},
        {n: x for n, x in family[1]["math"].tensors.items() if n in linear_names(family[0].config)},
    )


def test_the_base_says_shapes_and_dtypes_alone(family, grams):
    other = type(family[0])(family[0].config, {n: 2 - x for n, x in family[0].tensors.items()})
    assert_same_bits(merged((other, family[1]), grams), merged(family, grams))


def test_tensors_outside_the_layers_are_the_mean_whatever_is_pruned(family, grams):
    assert_same_bits(merged(family, grams, prune="all"), merged(family, grams))


def test_columns_of_inputs_that_are_always_0_are_the_mean(family, grams):
    """One column of a linear, all of an expert of a mixture that no token reached; and 0 on one text is no obstacle."""
    changed = {expert: {name: gram.copy() for name, gram in own.items()} for expert, own in grams.items()}
    unseen, all_unseen = DOWN, DOWN.replace("down", "up")
    for own in changed.values():
        own[unseen][:, 3] = own[unseen][3] = 0
        own[all_unseen][:] = 0
    changed["law"][unseen][:, 5] = changed["law"][unseen][5] = 0
    found = merged(family, changed)
    weights = {n: [e.tensors[n] for e in family[1].values()] for n in (unseen, all_unseen)}
    np.testing.assert_allclose(found[all_unseen], mean(weights[all_unseen], (1, 1, 1)), atol=ROUNDED)
    np.testing.assert_allclose(found[unseen][:, 3], mean(weights[unseen], (1, 1, 1))[:, 3], atol=ROUNDED)
    left = np.arange(found[unseen].shape[1]) != 3
    part = [of[unseen][np.ix_(left, left)] for of in changed.values()]
    wanted = formula([w[:, left] for w in weights[unseen]], part, (1, 1, 1), 0.9)
    np.testing.assert_allclose(found[unseen][:, left], wanted, atol=ROUNDED)


def test_what_cannot_be_solved_for_is_refused_with_the_tensor_and_the_flag(family, grams):
    few = np.random.default_rng(0).normal(size=(5, 48))
    scarce = {e: {**own, DOWN: (few.T @ few).astype(np.float32)} for e, own in grams.items()}
    with pytest.raises(ValueError, match=rf"{DOWN}: .*too few.*--regmean_alpha below 1"):
        merged(family, scarce, 1.0)
    assert np.isfinite(merged(family, scarce, 0.9)[DOWN]).all()
    with pytest.raises(ValueError, match=r"q_proj.*no --coefficient below 0"):
        merged(family, grams, coefficients={"math": -3.0, "law": 1.0})
    with pytest.raises(ValueError, match="add up to 0"):
        merged(family, grams, coefficients={"math": -2.0})
    with pytest.raises(ValueError, match="not known here"):
        merge_to_arrays(*family, MergeConfig(EXPERTS, method="regmean"))
    tensors = {name: expert.tensors for name, expert in family[1].items()}
    with pytest.raises(ValueError, match="input_grams of 'law': none for the linear"):
        dppa_jax.merge_state_dicts(family[0].tensors, tensors, "regmean", input_grams=grams | {"law": {}})
    with pytest.raises(ValueError, match=r"has 48 inputs.*\(32, 32\)"):
        merged(family, grams | {"law": {**grams["law"], DOWN: np.eye(32)}})


def test_allowed_nan_is_the_bases_weight(family, grams):
    base, experts = family
    damaged = experts["law"].tensors[DOWN].copy()
    damaged[2, 4], mended = np.nan, damaged.copy()
    mended[2, 4] = base.tensors[DOWN][2, 4]
    found, wanted = (
        merged((base, experts | {"law": type(base)(base.config, experts["law"].tensors | {DOWN: own})}), grams, **allow)
        for own, allow in ((damaged, {"allow_nonfinite": True}), (mended, {}))
    )
    assert_same_bits(found, wanted)


def test_state_dicts_are_merged_with_products_that_are_given(family, grams):
    tensors = {name: expert.tensors for name, expert in family[1].items()}
    found = dppa_jax.merge_state_dicts(
        family[0].tensors, tensors, "regmean", config=family[0].config, input_grams=grams
    )
    assert_same_bits(found, merged(family, grams))


# ---- what linears read


def products_seen(model, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """XᵀX/n of every linear of a model of transformers, by hooks, a row of tokens at a time."""
    sums: dict[str, np.ndarray] = {}

    def hook(path: str):
        def add(_, inputs, __):
            x = inputs[0].detach().double().flatten(0, -2).numpy()
            sums[path] = sums.get(path, 0) + x.T @ x

        return add

    for path, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(hook(path))
    for row in rows:
        model(torch.tensor([list(row)]))
    count = sum(map(len, rows))
    return {f"model.layers.{path}.weight": of / count for path, of in sums.items()}


ROWS = [[1, 5, 9, 4, 7, 3], [1, 8, 2], [1, 6, 6, 9]]


@pytest.mark.parametrize("name", ["Llama", pytest.param("Gemma2", marks=pytest.mark.slow)])
def test_products_are_those_that_hooks_on_transformers_see_in_any_order(name, tmp_path):
    """Tokens that fill up short rows do not count. A layer that is asked for again is computed again."""
    torch_model(*MODELS[name]).save_pretrained(tmp_path)
    wanted = products_seen(torch_model(*MODELS[name]), ROWS)
    found = LayerwiseGrams("math", SafetensorsDirectory(tmp_path), padded(ROWS))
    in_order = {tensor: found(tensor) for tensor in wanted}
    for tensor in [*wanted, *reversed(wanted)]:
        again = in_order.pop(tensor) if tensor in in_order else found(tensor)
        np.testing.assert_allclose(again, wanted[tensor], rtol=2e-4, atol=1e-5, err_msg=tensor)


def test_layers_are_computed_once_and_products_are_not_kept(tmp_path, monkeypatch):
    torch_model(*MODELS["Llama"]).save_pretrained(tmp_path)
    model, read = SafetensorsDirectory(tmp_path), []
    monkeypatch.setattr(model, "read", lambda name, of=model.read: read.append(name) or of(name))
    found = LayerwiseGrams("math", model, padded(ROWS))
    for tensor in [name for name in linear_names(model.config) if ".0." not in name]:
        found(tensor)
        assert len(found._held) < 7
    assert not found._held
    assert len(read) == len(set(read))


@pytest.mark.parametrize("kind", ["Mixtral", pytest.param("bert", marks=pytest.mark.slow)])
def test_mixtures_and_encoders_have_the_products_of_the_tokens_that_they_see(kind, tmp_path):
    """By the norms, which other tests hold against transformers: their squares are the diagonal."""
    (torch_model(*MODELS[kind]) if kind in MODELS else classifier(kind)).save_pretrained(tmp_path)
    model = SafetensorsDirectory(tmp_path)
    found, norms = LayerwiseGrams("math", model, padded(ROWS)), activation_norms(model, padded(ROWS))
    count = (padded(ROWS) != PADDING).sum()
    for tensor, norm in norms.items():
        np.testing.assert_allclose(np.diag(found(tensor)), norm**2 / count, rtol=1e-4, atol=1e-6, err_msg=tensor)
    assert any("experts" in tensor for tensor in norms) == (kind == "Mixtral")


# ---- merges of files


@pytest.fixture
def merge(tmp_path) -> Merge:
    return Merge(write_family(tmp_path / "models", num_hidden_layers=2, dtype="float32"))


@pytest.fixture
def texts(tmp_path):
    """Short lines of words for either expert, of other words and numbers of lines."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for first, name in enumerate(("math", "law")):
        generator = np.random.default_rng(first)
        lines = [" ".join(f"word{n}" for n in generator.integers(30 * first, 30 * first + 30, 9)) for _ in range(20)]
        (directory / f"{name}.txt").write_text("\n".join(lines[: 20 - 5 * first]))
    return directory


def test_a_merge_by_the_command_line_is_the_formula_with_each_experts_text(merge, texts):
    found = load_file(merge("--method=regmean", f"--calibration={texts}", "--regmean_alpha=0.8") / "model.safetensors")
    experts, seen = {}, {}
    for name, directory in (("math", merge.math), ("law", merge.law)):
        words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        rows = [words.encode(line) for line in (texts / f"{name}.txt").read_text().splitlines()]
        experts[name] = load_file(directory / "model.safetensors")
        seen[name] = products_seen(transformers.AutoModelForCausalLM.from_pretrained(directory), rows)
    for name in found:
        weights = [expert[name] for expert in experts.values()]
        wanted = average = mean(weights, (1, 1))
        if name in seen["math"]:
            wanted = formula(weights, [own[name] for own in seen.values()], (1, 1), 0.8)
            assert np.abs(wanted - average).max() > 1e-2, name
        np.testing.assert_allclose(found[name], wanted, atol=2e-4, err_msg=name)
    assert sum(name in seen["math"] for name in found) == 14


def test_blocks_of_several_layers_give_the_same_bytes(merge, texts):
    flags = ["--method=regmean", f"--calibration={texts}", "--overwrite"]
    one, both = ((merge(*flags, f"--block_layers={n}") / "model.safetensors").read_bytes() for n in (1, 2))
    assert one == both


REFUSALS = {
    (): "--combine=regmean needs --calibration=FILE",
    ("--calibration=nowhere.txt",): "nowhere.txt",
    ("--calibration=TEXTS", "--score=magnitude"): "nothing is pruned before it",
    ("--calibration=TEXTS", "--coefficient=base=1"): "none for the base",
    ("--calibration=TEXTS", "--compare=row"): "compares nothing",
    ("--calibration=TEXTS", "--lambda=2"): "not with --combine=regmean",
    ("--calibration=TEXTS", "--regmean_alpha=1.1"): "--regmean_alpha=1.1: outside [0, 1]",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refused_before_anything_is_written(merge, texts, flags):
    given = [flag.replace("TEXTS", str(texts)) for flag in flags]
    assert REFUSALS[flags] in merge.refusal("--method=regmean", *given)


def test_an_expert_that_is_not_computed_here_is_refused(tmp_path, texts):
    changes = {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "tie_word_embeddings": True}
    merge = Merge(write_family(tmp_path / "others", num_hidden_layers=1, **changes))
    message = merge.refusal("--method=regmean", f"--calibration={texts}")
    assert f"{merge.math}: --combine=regmean runs the experts on text" in message


def test_an_expert_whose_inputs_are_nan_is_named(merge, texts):
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = np.nan

    edit_tensors(merge.law / "model.safetensors", damage)
    message = merge.failure("--method=regmean", f"--calibration={texts}")
    assert f"expert 'law', {merge.law}: the inputs of model.layers.0.self_attn.o_proj.weight" in message
    assert "NaN or Inf" in message


def test_a_plan_counts_the_products_of_a_block(family):
    def host(method: str, experts: int, layers: int = 1) -> int:
        config = MergeConfig(EXPERTS[:experts], method=method)
        dtypes = ["float32"] * (1 + experts)
        return make_plan(family[0].specs, dtypes, config, (1, 1), layers, "streamed", 0, "cpu").host_bytes

    def more(experts: int, layers: int = 1) -> int:
        return host("regmean", experts, layers) - host("multislerp", experts, layers)  # which holds all experts, too

    layer = [shape for name, shape in shapes(family[0].config).items() if ".0." in name and len(shape) == 2]
    products = 4 * sum(columns**2 for _, columns in layer)
    assert more(3) - more(2) >= products
    assert more(3, 2) - more(3, 1) == 3 * products
