"""Options: fields of configs, from which flags, checks and help are made."""

import re
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest

from dppa_jax.benchmark.restart import alone_of
from dppa_jax.config import merge, method_options
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import method_option
from dppa_jax.config.option import REQUIRED, check, option, options, same
from dppa_jax.config.report import Choice, Sweep
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS, PARAMETERS, Parameter
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.flags import BY_NAME, CONFIGS, KINDS, make, read_path
from dppa_jax.jobs.compared import Compared, config_of
from dppa_jax.jobs.configs import job_config

EXPERTS = ("math", "law")


@dataclass(frozen=True)
class Walk:
    """Every kind of bound."""

    FLAG_PREFIX: ClassVar[str] = "walk_"
    HELP_GROUP: ClassVar[str] = "walking"

    rule: str = option(REQUIRED, "how", choices=("fast", "slow"))
    share: float = option(0.5, "share", within=(0, 1))
    steps: int | None = option(None, "how many", least=1)
    speed: float = option(1.0, "speed", above=0, infinite=True, flag="speed")
    part: float = option(0.0, "part", least=0, below=1, message="--{flag} is {value}, which is no part")
    sizes: tuple[int, ...] = option((1, 2), "sizes", least=0)

    def __post_init__(self):
        check(self)


def test_a_field_has_a_flag_with_its_prefix_kind_group_and_default():
    found = options(Walk)
    flags = {name: (said.flag, said.kind, said.default, said.optional) for name, said in found.items()}
    assert flags == {
        "rule": ("walk_rule", "string", "", False),
        "share": ("walk_share", "float", 0.5, False),
        "steps": ("walk_steps", "integer", 0, True),
        "speed": ("speed", "float", 1.0, False),
        "part": ("walk_part", "float", 0.0, False),
        "sizes": ("walk_sizes", "integers", ["1", "2"], False),
    }
    assert {said.group for said in found.values()} == {"walking"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "fas"}, "--walk_rule=fas: not one of fast, slow. Did you mean 'fast'?"),
        ({"share": 1.5}, "--walk_share=1.5: outside [0, 1]."),
        ({"share": float("nan")}, "--walk_share=nan: outside [0, 1]."),
        ({"steps": 0}, "--walk_steps=0: it must be 1 or more."),
        ({"speed": 0.0}, "--speed=0.0: it must be above 0."),
        ({"part": 1.0}, "--walk_part is 1.0, which is no part"),
        ({"sizes": (3, -1)}, "--walk_sizes=-1: it must be 0 or more."),
    ],
)
def test_a_value_that_is_not_allowed_is_told_with_its_flag(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Walk(**{"rule": "fast"} | given)


def test_what_is_within_the_bounds_is_taken():
    walk = Walk("slow", share=0, steps=1, speed=float("inf"), part=0.99, sizes=())
    assert make(Walk, {said.flag: said.default for said in options(Walk).values()}, rule="fast") == Walk("fast")
    assert replace(walk, rule="fast") == Walk("fast", 0, 1, float("inf"), 0.99, ())


def test_the_same_option_in_another_config_may_have_another_default():
    @dataclass(frozen=True)
    class Run:
        steps: int | None = same(Walk, "steps")
        share: float = same(Walk, "share", default=0.25)

        def __post_init__(self):
            check(self)

    assert (Run().steps, Run().share) == (None, 0.25)
    assert options(Run)["share"].default == 0.25
    assert options(Run)["share"].flag == "walk_share"
    with pytest.raises(ValueError, match="--walk_share=2"):
        Run(share=2)


def test_every_flag_has_a_kind_and_every_option_of_a_config_a_flag():
    declared = {said.flag for config in CONFIGS for said in options(config).values()}
    assert declared <= BY_NAME.keys()
    assert all(said.help and said.group for said in BY_NAME.values())


# ---- paths

NOT_PATHS = {"job", "tokenizer", "coefficient", "factors", "q", "mesh", "coordinator", "evaluate", "methods"}
NOT_PATHS |= {"merge_methods", "shape", "lora_targets", "expert_rate", "expert_density"}
PATHS = {"path": "~/x", "paths": ["~/x", "~/y"], "experts": ["math=~/x"]}


def test_a_flag_that_takes_any_text_takes_a_path_or_is_known_to_take_none():
    text = {name for name, said in BY_NAME.items() if said.kind in ("string", "words", "named") and not said.choices}
    assert text == NOT_PATHS, "give the option kind='path', or name it here"


@pytest.mark.parametrize("name", [name for name, said in BY_NAME.items() if said.kind in PATHS])
def test_the_home_directory_stands_for_a_tilde_in_every_flag_that_takes_a_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    kind = BY_NAME[name].kind
    found = KINDS[kind].read(f"--{name}", PATHS[kind])
    assert found in ("/home/me/x", ("/home/me/x", "/home/me/y"), {"math": "/home/me/x"})


def test_a_tilde_is_expanded_where_a_path_begins_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, read in (("orbax:~/x", f"orbax:{tmp_path}/x"), ("a/~/b", "a/~/b"), ("~nobody-here/x", "~nobody-here/x")):
        assert read_path("--base", given) == read
    (tmp_path / "found.json").write_text('{"coefficients": {"math": 0.25}}')
    models = {"base": "demo:base", "expert": ["math=demo:math"], "method": "ties", "coefficient": ["~/found.json"]}
    values = {name: said.default for name, said in BY_NAME.items()} | models | {"workdir": "~/wd"}
    config = job_config(values)
    assert config.merge.coefficients == {"math": 0.25}
    assert config.workdir == f"{tmp_path}/wd"
    assert "--workdir=~/wd" in config.command


# ---- options of single methods


def test_every_parameter_of_a_score_scale_or_combination_has_a_flag():
    records = [*SCORES.values(), *SCALES.values(), *COMBINATIONS.values()]
    assert {name for record in records for name in record.parameters} == PARAMETERS.keys()
    assert PARAMETERS.keys() <= BY_NAME.keys()


@pytest.fixture
def window(monkeypatch):
    """A parameter of the score "row"."""
    parameter = Parameter(default=0.2, help="width", lower=0.0, upper=1.0)
    row = replace(SCORES["row"], parameters=("row_window",))
    monkeypatch.setitem(PARAMETERS, "row_window", parameter)
    axis = merge.axis
    for place in (merge, method_options):
        monkeypatch.setattr(place, "axis", lambda name: {**axis(name), "row": row} if name == "score" else axis(name))
    return parameter


def test_a_methods_own_option_is_an_option_of_its_config(window):
    said = method_option("row_window", window)
    assert (said.flag, said.kind, said.group, said.default) == ("row_window", "float", "method", 0.2)
    own = {"method": "magnitude", "score": "row"}
    assert MergeConfig(EXPERTS, **own).method_options == {"row_window": 0.2}
    assert MergeConfig(EXPERTS, **own, method_options={"row_window": 0.5}).as_dict()["method_options"] == {
        "row_window": 0.5
    }
    with pytest.raises(ValueError, match=r"--row_window=2\.0: outside \[0, 1\]"):
        MergeConfig(EXPERTS, **own, method_options={"row_window": 2.0})
    with pytest.raises(ValueError, match=r"--row_window=0\.5: --method=magnitude has no such option"):
        MergeConfig(EXPERTS, "magnitude", method_options={"row_window": 0.5})


# ---- no option is dropped on the way to another config

GIVEN = MergeConfig(
    EXPERTS,
    "dppa",
    rate=0.8,
    allocate="uniform",
    factors={"math": (1.5, 1.2)},
    coefficients={"math": 0.5},
    max_fluctuation=0.04,
    significance_multiple=3.0,
    dpa_combine="max",
    ties="exact",
    tensor_rates=(("mlp", 0.5),),
    tensor_coefficients=(("o_proj", 0.5),),
    seed=3,
    delta_dtype="bfloat16",
    output_dtype="float16",
    allow_nonfinite=True,
    tensor_options={"lambda": {"": 0.5}},
)


def test_the_merge_of_a_benchmarked_candidate_has_every_option_that_was_given():
    alone = alone_of(GIVEN, "law")
    assert (alone.experts, alone.factors, alone.coefficients) == (("law",), {"law": (1.0, 1.0)}, {"law": 1.0})
    own = {"experts", "factors", "coefficients"}
    for field in fields(MergeConfig):
        if field.name not in own:
            assert getattr(alone, field.name) == getattr(GIVEN, field.name), field.name


@pytest.mark.parametrize("expert", [None, "law"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_a_report_has_every_option_that_is_not_its_methods(method, expert):
    sweep = Sweep(methods=(method,), rates=(0.7,), q={"math": 0.2, "law": 0.3})
    facts = COMBINATIONS[METHODS[method].combine]
    experts = EXPERTS if expert is None else (expert,)
    if len(experts) < facts.experts[0] or len(experts) > (facts.experts[1] or 9):
        pytest.skip(f"{method} merges {facts.experts} experts")
    config = config_of(Compared(Choice(method), 0.7, expert), experts, GIVEN, sweep)
    assert (config.method, config.rate, config.experts) == (method, 0.7, experts)
    assert [getattr(config, axis) for axis in ("score", "allocate", "scale", "combine")] == [
        getattr(METHODS[method], axis) for axis in ("score", "allocate", "scale", "combine")
    ]
    assert config.tensor_rates == (GIVEN.tensor_rates if METHODS[method].score else ())
    assert config.coefficients == ({"math": 0.5, "law": 1.0} if expert is None else {"law": facts.coefficient})
    assert config.tensor_coefficients == (GIVEN.tensor_coefficients if expert is None else ())
    own = {"method", "rate", "experts", "score", "allocate", "scale", "combine", "partitions", "factors", "q"}
    own |= {"coefficients", "tensor_coefficients", "tensor_rates", "method_options", "tensor_options"}
    for field in fields(MergeConfig):
        if field.name not in own:
            assert getattr(config, field.name) == getattr(GIVEN, field.name), field.name
