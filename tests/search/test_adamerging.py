"""AdaMerging: the entropy it lowers is that of the merge it writes, in the memory and on the devices it promises."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import write_family
from support import AWKWARD, ONE_DEVICE, coarse_family, make_family, merge_to_arrays, random_norms
from transformers import AutoTokenizer

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import read_coefficients
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import AdaMergingConfig
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.sources import Item
from dppa_jax.evaluate.tasks import Task
from dppa_jax.jobs.merge import run_merge
from dppa_jax.jobs.models import open_job
from dppa_jax.model import DecoderConfig, forward, generate
from dppa_jax.report.coefficient_figures import draw_adamerging
from dppa_jax.report.styles import svg
from dppa_jax.runtime.mesh import make_mesh
from dppa_jax.search.adamerging import adamerge
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.adamerging_step import Step, coefficients_of
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.coefficients import fixed_coefficients, groups_of
from dppa_jax.search.entropy import merged
from dppa_jax.search.mixture import Mixture, decoded
from dppa_jax.search.prompts import draw, prompts_of
from dppa_jax.where import load_tree

EXPERTS = ("math", "law")
FACTORS = {"math": (1.8, 0.7), "law": (0.4, 2.5)}
MERGES = {
    "unpruned": {"method": "task_arithmetic"},
    "magnitude": {"method": "dppa", "rate": 0.8, "partitions": (0.9, 0.8), "factors": FACTORS},
    "random": {"method": "dare", "rate": 0.7, "seed": 5},
    "wanda": {"method": "magnitude", "score": "wanda", "rate": 0.6},
    "column": {"method": "magnitude", "score": "column", "rate": 0.5},
    "random_group": {"method": "magnitude", "score": "random_group", "rate": 0.5},
    "wanda_group": {"method": "magnitude", "score": "wanda_group", "rate": 0.5},
    "rules": {"method": "task_arithmetic", "tensor_coefficients": ((r"layers\.1\..*o_proj", 0.9),)},
}
OTHERS = {  # presets whose score or scale no row above has
    name: {"method": name, "rate": 0.7}
    for name, method in METHODS.items()
    if method.combine == "sum" and (SCORES[method.score or "magnitude"].gain or SCALES[method.scale].parameters)
}
START = 0.3


def tokens(vocabulary: int, lengths=(5, 17, 9, 12)) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(1, vocabulary, n).tolist() for n in lengths]


def step_of(
    base, experts, merge: MergeConfig, mesh: str = ONE_DEVICE, granularity: str = "linear"
) -> tuple[Step, tuple]:
    mixture = Mixture(base, experts, merge, make_mesh(mesh), random_norms(base, EXPERTS))
    groups = groups_of(granularity, base.specs)
    return Step(mixture, groups.of_tensor, fixed_coefficients(merge, base.specs), 1e-3), groups.names


def entropies(config: dict, tree: dict, prompts) -> list[float]:
    """Mean entropy of each prompt's distributions, from the whole logits of a written model."""
    found = []
    tree = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), tree)
    for prompt in prompts:
        logs = jax.nn.log_softmax(forward(DecoderConfig.from_hf(config), tree, np.array([prompt.tokens])), axis=-1)
        found.append(float(-(jnp.exp(logs) * logs).sum(axis=-1)[0, prompt.first :].sum()))
    return found


def as_tree(base, tensors: dict) -> dict:
    from dppa_jax.checkpoint.in_memory import Model

    tree: dict = {}
    for name, spec in base.specs.items():
        *parents, leaf = spec.path
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node.setdefault(leaf, []).append(tensors[name])
    stack = lambda arrays: arrays[0] if len(arrays) == 1 else np.stack(arrays)  # noqa: E731
    return Model(base.config, jax.tree.map(stack, tree, is_leaf=lambda x: isinstance(x, list))).tree


FAST = ("random", "rules")  # and "magnitude" below, where ties are told apart


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in FAST else pytest.mark.slow)
        for name, dtype in zip(MERGES | OTHERS, itertools.cycle(["float32", "bfloat16"]), strict=False)
    ],
)
def test_the_merge_written_with_the_coefficients_is_the_model_whose_entropy_is_measured(name, dtype):
    sizes = AWKWARD | {"head_dim": 30, "vocab_size": 4500, "tie_word_embeddings": name == "random"}
    check_entropies(dtype, sizes, MergeConfig(EXPERTS, **(MERGES | OTHERS)[name]))


FAMILIES = {
    "Gemma2": {"architectures": ["Gemma2ForCausalLM"], "tie_word_embeddings": True, "query_pre_attn_scalar": 9},
    "Qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1},
    "SmolLM3": {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4},
    "Granite": {"architectures": ["GraniteForCausalLM"], "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "Gemma2")) for f in FAMILIES])
def test_so_is_that_of_other_families(family):
    sizes = {"head_dim": 8, "sliding_window": 4, "vocab_size": 4500, **FAMILIES[family]}
    check_entropies("float32", sizes, MergeConfig(EXPERTS, **MERGES["random"]))


def check_entropies(dtype: str, sizes: dict, merge: MergeConfig):
    base, experts = make_family(EXPERTS, dtype, **sizes)
    step, groups = step_of(base, experts, merge)
    raw = np.random.default_rng(1).uniform(0.1, 0.9, (len(groups), len(EXPERTS))).astype(np.float32)
    prompts = prompts_of(tokens(4500), "all")
    found = step.entropies(raw, draw({"math": prompts}, 0, 4, seed=0))
    given = {e: {n: float(raw[i, k]) for i, n in enumerate(groups)} for k, e in enumerate(EXPERTS)}
    written = merge_to_arrays(
        base, experts, replace(merge, coefficients=given), norms=random_norms(base, EXPERTS)
    ).tensors
    wanted = entropies(base.config, as_tree(base, written), prompts)
    total = sum(len(prompt.tokens) for prompt in prompts)
    assert sorted(found) == pytest.approx(sorted(np.array(wanted) / total), rel=3e-6 if dtype == "float32" else 1e-4)
    assert max(found) > 0.05


@pytest.mark.slow
def test_ties_are_told_apart_as_in_a_merge():
    """The very bits of the merge, of deltas of which a tenth ties at every threshold."""
    base, experts = coarse_family(EXPERTS, num_hidden_layers=2)
    merge = MergeConfig(EXPERTS, ties="exact", **MERGES["magnitude"])
    wanted, mixture = (
        merge_to_arrays(base, experts, merge).tensors,
        Mixture(base, experts, merge, make_mesh(ONE_DEVICE)),
    )
    tensor, ones = mixture.tree["layers"]["mlp"]["up_proj"], jnp.ones(len(EXPERTS))
    for layer in range(2):
        found = merged(mixture.arithmetic, ones, decoded(jax.tree.map(lambda x, at=layer: x[at], tensor)), jnp.int32(0))
        np.testing.assert_array_equal(found, wanted[f"model.layers.{layer}.mlp.up_proj.weight"])


@pytest.mark.slow
def test_entropies_and_gradients_do_not_depend_on_the_devices():
    """Of sizes that the devices cannot share evenly."""
    base, experts = make_family(EXPERTS, "bfloat16", **AWKWARD | {"head_dim": 30})
    merge = MergeConfig(EXPERTS, **MERGES["random"])
    batch = draw({"math": prompts_of(tokens(base.config["vocab_size"]), "all")}, 0, 4, seed=0)
    found = {}
    for mesh in (ONE_DEVICE, "layer=2,row=4"):
        step, groups = step_of(base, experts, merge, mesh)
        found[mesh] = step.gradient(np.full((len(groups), len(EXPERTS)), START, np.float32), batch)
    (rows, gradient), (spread_rows, spread_gradient) = found.values()
    np.testing.assert_allclose(spread_rows, rows, rtol=1e-6, atol=0)
    np.testing.assert_allclose(spread_gradient, gradient, rtol=0, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


def test_devices_share_the_rows_of_every_layer():
    base, experts = make_family(EXPERTS, "bfloat16")
    step, _ = step_of(base, experts, MergeConfig(EXPERTS, **MERGES["random"]), "layer=2,row=4")
    q_proj = step.mixture.tree["layers"]["self_attn"]["q_proj"]
    assert q_proj.base.addressable_shards[0].data.size == q_proj.base.size / 8


@pytest.mark.slow
def test_a_step_holds_no_second_copy_of_the_layers():
    """Not one of the merge, and none of base and experts in another dtype: little is added by a layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 64}
    batch = draw({"math": prompts_of(tokens(64), "all")}, 0, 4, seed=0)
    beside = {}
    for layers in (6, 12):
        base, experts = make_family(EXPERTS, "bfloat16", num_hidden_layers=layers, **sizes)
        step, groups = step_of(base, experts, MergeConfig(EXPERTS, **MERGES["magnitude"]))
        zeros = np.zeros((len(groups), len(EXPERTS)), np.float32)
        step(zeros, zeros, zeros, 0, batch)
        one_model = step.mixture.model_bytes / (1 + len(EXPERTS))
        beside[layers] = step.peak_bytes - step.mixture.model_bytes
    hidden = 4 * batch.tokens.size * sizes["hidden_size"]
    assert beside[12] < one_model
    assert beside[12] - beside[6] < 6 * (3 * hidden + 2000)


def test_coefficients_outside_the_bounds_are_clipped_and_get_no_gradient():
    raw = jnp.array([[-0.1, 0.0], [1.0, 1.2], [0.4, 0.5]])
    arguments = jnp.arange(3), jnp.full(3, jnp.nan)
    assert coefficients_of(raw, *arguments).tolist() == jnp.array([[0, 0], [1, 1], [0.4, 0.5]]).tolist()
    gradient = jax.grad(lambda raw: coefficients_of(raw, *arguments).sum())(raw)
    assert gradient.tolist() == [[0, 1], [1, 0], [1, 1]]


def test_a_rule_for_a_tensor_decides_and_its_group_gets_no_gradient():
    base, experts = make_family(EXPERTS, "float32", num_hidden_layers=2)
    step, groups = step_of(base, experts, MergeConfig(EXPERTS, **MERGES["rules"]))
    batch = draw({"math": prompts_of(tokens(64), "all")}, 0, 4, seed=0)
    _, gradient = step.gradient(np.full((len(groups), 2), START, np.float32), batch)
    still = [name for name, row in zip(groups, gradient, strict=True) if not row.any()]
    assert still == ["model.layers.1.self_attn.o_proj.weight"]


def test_groups_are_one_or_the_layers_and_the_rest_or_the_tensors():
    specs = make_family(EXPERTS)[0].specs
    assert groups_of("task", specs)[0] == ("all",)
    groups, of_tensor, _ = groups_of("layer", specs)
    assert groups == ("layer 0", "layer 1", "layer 2", "outside the layers")
    assert [groups[g] for g in of_tensor[:2]] == ["outside the layers", "layer 0"]
    assert groups_of("linear", specs)[0] == tuple(specs)


def test_prompts_come_again_only_when_all_have_come_and_a_step_s_are_always_the_same():
    prompts = [prompts_of([[1 + i] * (1 + i)], "all")[0] for i in range(7)]
    drawn = [draw({"math": prompts, "law": prompts[:2]}, step, 3, seed=4) for step in range(7)]
    first = [row[0] for batch in drawn for row in batch.tokens[:3].tolist()]
    assert all(sorted(first[at : at + 7]) == list(range(1, 8)) for at in (0, 7, 14))
    assert first[:7] != first[7:14]
    assert {batch.tokens.shape[0] for batch in drawn} == {5}
    assert np.array_equal(drawn[5].tokens, draw({"math": prompts, "law": prompts[:2]}, 5, 3, seed=4).tokens)
    assert not np.array_equal(drawn[0].tokens, draw({"math": prompts, "law": prompts[:2]}, 0, 3, seed=5).tokens)


@pytest.mark.parametrize(("positions", "counted"), [("all", [0, 1, 2]), ("last", [2]), ("generated", [2, 3])])
def test_positions_that_count_and_their_weights(positions, counted):
    prompts = prompts_of([[5, 6, 7]], positions, [[8, 9]])
    batch = draw({"math": prompts, "law": prompts}, 0, 1, seed=0)
    assert batch.weights.sum(axis=1) == pytest.approx([1, 1])
    assert batch.chosen[batch.weights > 0].tolist() == 2 * counted


BAD = {
    "steps": 0,
    "batch_size": 0,
    "learning_rate": 0.0,
    "start": 1.5,
    "positions": "first",
    "new_tokens": 0,
    "split": "train",
    "limit": 0,
    "patience": -1,
    "min_delta": -1.0,
    "seed": -1,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match=f"--adamerging_{name}"):
        AdaMergingConfig(**{name: BAD[name]})


# The whole search, on models in files.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"), EXPERTS, "float32", num_hidden_layers=2)


def task(domain: str, seed: int) -> Task:
    generator = np.random.default_rng(seed)
    texts = [" ".join(f"word{i}" for i in generator.integers(0, 60, n)) for n in (4, 9, 14, 6, 11)]
    items = tuple(Item(f"{domain}{i}", text, ("word1",)) for i, text in enumerate(texts))
    return Task(f"words of {domain}", domain, lambda options: {"validation": items})


DOMAINS = {name: [task(name, seed)] for seed, name in enumerate(EXPERTS)}
SHORT = AdaMergingConfig(steps=12, batch_size=2, learning_rate=0.02)
DPPA = MergeConfig(EXPERTS, **MERGES["magnitude"])


@pytest.fixture
def run(root, tmp_path):
    """adamerge in tmp_path/work, on models opened anew as by another process."""

    def run(given=SHORT, merge=DPPA, domains=DOMAINS, work="work", **more) -> AdaMerged:
        job = JobConfig(merge, str(root / "base"), {name: str(root / name) for name in EXPERTS}, mesh=ONE_DEVICE)
        evaluation = Evaluation(JaxEvaluator(), AutoTokenizer.from_pretrained(root / "base"), TaskOptions(), tmp_path)
        with open_job(job) as opened, Candidates(opened, evaluation) as candidates:
            return adamerge(candidates, domains, merge, given, tmp_path / work, **more)

    return run


class Killed(Exception):
    pass


def kill_after(steps: int):
    def report(done: int, entropy: float) -> None:
        if done == steps:
            raise Killed

    return report


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_numbers_of_an_uninterrupted_one(run, tmp_path):
    whole = run(work="whole")
    for steps in (5, 9):
        with pytest.raises(Killed):
            run(report=kill_after(steps))
    with pytest.raises(ValueError, match="has not finished"):
        read_coefficients(tmp_path / "work" / "coefficients.json", EXPERTS)
    resumed = run()
    assert resumed.coefficients == whole.coefficients
    for name in ("entropies", "domain_entropies", "history", "final"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name), name)
    assert whole.entropies[-5:].mean() < whole.entropies[:5].mean()
    assert np.abs(whole.final - START).min() > 0.01
    again = run(report=kill_after(1))  # finished: no step is made
    assert again.coefficients == whole.coefficients
    assert "0.3" in run(replace(SHORT, seed=1, steps=1)).in_words()  # another seed begins anew
    assert json.loads((tmp_path / "work" / "coefficients.json").read_text())["finished"]


@pytest.mark.slow
def test_it_stops_when_the_entropy_no_longer_falls(run):
    found = run(replace(SHORT, steps=100, patience=3, min_delta=10.0))
    assert found.steps == 6
    assert found.stopped_early
    assert "ended early" in found.in_words()


def test_the_file_it_writes_gives_the_merge_by_layer(run, root, tmp_path):
    found = run(replace(SHORT, granularity="layer", steps=3))
    given = read_coefficients(tmp_path / "work" / "coefficients.json", EXPERTS)
    assert given == found.coefficients
    up, q, norm = (f"model.{name}.weight" for name in ("layers.1.mlp.up_proj", "layers.1.self_attn.q_proj", "norm"))
    assert given["law"][up] == given["law"][q] != given["law"][norm]
    experts = {name: str(root / name) for name in EXPERTS}
    run_merge(
        JobConfig(
            replace(DPPA, coefficients=given),
            str(root / "base"),
            experts,
            output=str(tmp_path / "merged"),
            mesh=ONE_DEVICE,
        )
    )
    _, tree = load_tree(tmp_path / "merged")
    base, *tuned = (load_tree(root / name)[1]["norm"] for name in ("base", *EXPERTS))
    dense = zip(EXPERTS, tuned, strict=True)
    added = sum(given[name][norm] * FACTORS[name][0] * (expert - base) for name, expert in dense)
    np.testing.assert_allclose(tree["norm"], base + added, rtol=1e-6)
    assert json.loads((tmp_path / "merged" / "recipe.json").read_text())["coefficients"] == given
    assert "by tensor, mean" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
def test_generated_positions_are_those_of_the_first_merge_s_answers(run, root, tmp_path):
    run(replace(SHORT, positions="generated", new_tokens=4, steps=1))
    kept = json.loads((tmp_path / "work" / "continuations.json").read_text())["answers"]
    start = replace(DPPA, coefficients=dict.fromkeys(EXPERTS, START))
    models = str(root / "base"), {name: str(root / name) for name in EXPERTS}
    run_merge(JobConfig(start, *models, output=str(tmp_path / "merged"), mesh=ONE_DEVICE))
    config, tree = load_tree(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    for domain, (of_domain,) in DOMAINS.items():
        asked = [tokenizer(item.prompt)["input_ids"] for item in of_domain.items(TaskOptions(), "validation")]
        assert kept[domain] == generate((DecoderConfig.from_hf(config), tree), asked, 4)


def test_a_bad_granularity_is_refused():
    with pytest.raises(ValueError, match="layers: not one of task, layer, linear"):
        AdaMergingConfig(granularity="layers")


def test_ties_is_refused(run):
    with pytest.raises(ValueError, match=r"--combine=sum, not 'ties'"):
        run(merge=MergeConfig(EXPERTS, method="ties"))


def test_a_domain_without_prompts_is_refused(run):
    empty = Task("nothing", "math", lambda options: {"validation": ()})
    with pytest.raises(ValueError, match="'math' has no validation prompts"):
        run(domains={"math": [empty]})


@pytest.mark.parametrize("granularity", ["task", "layer", "linear"])
def test_figure_shows_entropies_and_coefficients(granularity):
    specs = make_family(EXPERTS)[0].specs
    groups, *_ = groups_of(granularity, specs)
    history = np.random.default_rng(0).uniform(0.2, 0.4, (20, len(groups), 2)).astype(np.float32)
    parts = np.linspace((3.0, 2.0), (1.0, 1.5), 20)
    found = AdaMerged(EXPERTS, EXPERTS, groups, granularity, {}, parts.sum(axis=1), parts, history, history[-1])
    figure = draw_adamerging(found, "AdaMerging")
    entropy, coefficients, *maps = figure.axes
    assert entropy.get_lines()[-1].get_ydata() == pytest.approx(found.entropies)
    assert coefficients.get_lines()[1].get_ydata() == pytest.approx(history[:, :, 1].mean(axis=1))
    images = [image.get_array() for ax in maps for image in ax.images]
    assert [image.shape for image in images] == {"task": [], "layer": [(4, 2)], "linear": 2 * [(3, 9)]}[granularity]
    if granularity == "layer":
        np.testing.assert_allclose(images[0], history[-1])
    text = svg(figure, granularity)
    assert "entropy (nats)" in text
