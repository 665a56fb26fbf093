"""The trained family: what its members know, where it is kept, and that a seed determines it."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from dppa_jax import demo
from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.demo import family
from dppa_jax.demo.text import TASKS as TASKS_OF
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.local import JaxEvaluator
from dppa_jax.evaluate.tasks import TASKS


@pytest.fixture(scope="session")
def accuracies(trained, tmp_path_factory) -> dict[str, dict[str, float]]:
    """By member and task."""
    evaluator, options = JaxEvaluator(), TaskOptions()
    tokenizer = AutoTokenizer.from_pretrained(trained / "base")
    tasks = [TASKS[name] for names in TASKS_OF.values() for name in names]
    found = {}
    for member in demo.MEMBERS:
        directory = trained / member
        evaluation = Evaluation(evaluator, tokenizer, options, tmp_path_factory.mktemp(member))
        scores = evaluation.scores(member, member, lambda at=directory: at, tasks)
        found[member] = {name: score.accuracy for name, score in scores.items()}
    return found


@pytest.fixture
def brief(monkeypatch, tmp_path) -> Path:
    """An empty cache, and a recipe that takes a second."""
    monkeypatch.setenv("DPPA_JAX_CACHE", str(tmp_path))
    short = {member: family.replace(options, steps=3, batch_size=4) for member, options in family.TRAINING.items()}
    monkeypatch.setattr(family, "TRAINING", short)
    monkeypatch.setattr(family, "PRETRAINING_TEXTS", 40)
    monkeypatch.setattr(family, "FINE_TUNING_EXAMPLES", 40)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("domain", TASKS_OF)
def test_experts_clearly_beat_the_base_on_their_own_tasks(accuracies, domain):
    for task in TASKS_OF[domain]:
        assert accuracies[domain][task] > accuracies["base"][task] + 0.25, task
        assert accuracies[domain][task] > 0.5, task


@pytest.mark.slow
@pytest.mark.parametrize("domain", TASKS_OF)
def test_experts_know_their_own_domain_best(accuracies, domain):
    for task in TASKS_OF[domain]:
        others = [accuracies[other][task] for other in TASKS_OF if other != domain]
        assert accuracies[domain][task] > max(others) + 0.25, task


@pytest.mark.slow
def test_deltas_are_large(trained):
    """Larger than 0.03 somewhere, beyond which DARE is said to fail, and a good part of the weights everywhere."""
    base = load_file(trained / "base" / "model.safetensors")
    for domain in TASKS_OF:
        expert = load_file(trained / domain / "model.safetensors")
        for name in base:
            if "_proj" in name:
                delta = np.abs(expert[name] - base[name])
                assert delta.max() > 0.03, (domain, name)
                assert delta.mean() > 0.05 * np.abs(base[name]).mean(), (domain, name)


@pytest.mark.slow
def test_members_load_in_transformers(trained):
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(trained / "law")
    model = AutoModelForCausalLM.from_pretrained(trained / "law")
    item = TASKS["governing_law"].items(TaskOptions(limit=1))[0]
    prompt = tokenizer(item.prompt, return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=4)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) in item.answers


@pytest.mark.slow
def test_a_seed_determines_every_bit(brief, monkeypatch):
    first = family.families([0, 1])
    monkeypatch.setenv("DPPA_JAX_CACHE", str(brief / "other"))
    again = family.families([0])
    for member in demo.MEMBERS:
        weights = [(place / member / "model.safetensors").read_bytes() for place in (first[0], again[0], first[1])]
        assert weights[0] == weights[1]
        assert weights[0] != weights[2]


@pytest.mark.slow
def test_experts_by_adamr_have_the_base_of_the_family_and_smaller_deltas(brief):
    place = demo.directory("law@adamr")
    assert sorted(path.name for path in place.parent.iterdir()) == ["finance", "law", "math"]
    base, plain, pulled = (
        load_file(demo.directory(name) / "model.safetensors") for name in ("base", "law", "law@adamr")
    )
    moved = [sum(np.abs(one[name] - base[name]).sum() for name in base) for one in (plain, pulled)]
    assert 0 < moved[1] < moved[0]


def test_a_family_is_built_once(brief, monkeypatch):
    monkeypatch.setattr(family, "train", lambda config, tree, rows, options, report: (tree, np.zeros(1)))
    place = demo.directory("math", seed=3)
    assert sorted(path.name for path in place.parent.iterdir()) == sorted(demo.MEMBERS)
    monkeypatch.setattr(family, "build", lambda places: pytest.fail("built again"))
    assert demo.directory("law", seed=3).parent == place.parent


def test_a_broken_off_build_leaves_nothing(brief, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(family, "save_tree", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.directory("base")
    assert [path.name for path in brief.iterdir() if path.is_dir()] == []


def test_a_link_in_the_place_of_an_unfinished_family_is_refused(brief, tmp_path_factory):
    mine = tmp_path_factory.mktemp("mine")
    (mine / "file").write_text("precious")
    (brief / f"demo-{family.fingerprint()}-0.incomplete").symlink_to(mine)
    with pytest.raises(ValueError, match="is a link to"):
        demo.directory("base")
    assert [file.name for file in mine.iterdir()] == ["file"]


def test_where_a_family_cannot_be_kept_the_variable_that_helps_is_named(brief, monkeypatch):
    (brief / "file").write_text("")
    monkeypatch.setenv("DPPA_JAX_CACHE", str(brief / "file" / "cache"))
    with pytest.raises(OSError, match=r"file/cache: Not a directory; \$DPPA_JAX_CACHE names another directory"):
        demo.directory("base")


def test_an_unknown_member_is_refused_before_anything_is_trained(brief):
    with pytest.raises(
        ValueError, match="demo:medicine does not exist; there are demo:base, demo:math, demo:finance, demo:law"
    ):
        demo.directory("medicine")
    with pytest.raises(ValueError, match="demo:base@adamr does not exist; there are demo:base"):
        demo.directory("base@adamr")
    assert not os.listdir(brief)


def test_another_compiler_makes_another_family(monkeypatch):
    before = family.fingerprint()
    monkeypatch.setattr(jax, "__version__", "0.0.0")
    assert family.fingerprint() != before
