"""mergekit itself resolves the forty recipes to the same values, tensor by tensor."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from forty import FILE, FORTY, LAYERS, TENSORS, resolved
from mergekit_python import mergekit_python

pytestmark = pytest.mark.slow

RESOLVE_ALL = """
import json, sys
import yaml
import mergekit.merge  # registers the methods
from mergekit import merge_methods
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
from mergekit.parameter_resolver import resolve_parameters

layers, tensors, recipes = json.load(open(sys.argv[1]))
found = {}
for name, recipe in recipes.items():
    config = MergeConfiguration.model_validate(recipe)
    slices = config.slices or [OutputSliceDefinition(sources=[
        InputSliceDefinition(model=one.model, layer_range=(0, layers), parameters=one.parameters)
        for one in config.models])]
    where = [(one, i, stop - start) for one in slices
             for start, stop in [one.sources[0].layer_range] for i in range(stop - start)]
    values = {}
    for tensor, layer, after in tensors:
        one, i, count = where[layer] if layer is not None else (slices[-1 if after else 0], 0, 2)
        t = i / (count - 1) if count > 1 else 1
        reader = ConfigReader(config=config, t=t, slice_out=one)
        spec = merge_methods.get(config.merge_method).spec
        models = [source.model for source in one.sources]
        shared, own = resolve_parameters(spec, tensor_name=tensor, inputs={model: tensor for model in models},
                                         sources=reader.parameter_sources, base_model=reader.base_model, t=t)
        values[tensor] = [shared, [own[model] for model in models]]
    found[name] = values
json.dump(found, sys.stdout)
"""


def by_mergekit(tmp_path: Path) -> dict:
    documents = list(yaml.safe_load_all(FILE.read_text()))
    tensors = [(one.name, one.layer, one.after) for one in TENSORS]
    file = tmp_path / "recipes.json"
    file.write_text(json.dumps([LAYERS, tensors, {one["name"]: one for one in documents}]))
    done = subprocess.run(
        [mergekit_python(), "-c", RESOLVE_ALL, str(file)],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_value_is_mergekits(tmp_path):
    """A scale that is not given is null in mergekit, which multiplies by nothing."""
    theirs, different = by_mergekit(tmp_path), []
    for one in FORTY:
        models, found = resolved(one)
        for tensor in TENSORS:
            shared, own = theirs[one.name][tensor.name]
            pairs = {name: (values[tensor.name], shared[name]) for name, values in found.merge.items()}
            for name, by_model in found.models.items():
                for place, model in enumerate(models.names):
                    if model:
                        value = own[place][name]
                        pairs[f"{name} of {model}"] = by_model[place][tensor.name], 1 if value is None else value
            different += [(one.name, tensor.name, name, *pair) for name, pair in pairs.items() if not close(*pair)]
    assert different == []


def close(ours: float, theirs: float) -> bool:
    return ours == pytest.approx(theirs, abs=1e-9)
