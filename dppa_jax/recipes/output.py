"""What a recipe puts beside the weights of a merge: the recipe itself, and the chat template."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dppa_jax.architecture.specs import TensorSpec
from dppa_jax.config.run import JobConfig
from dppa_jax.merging.tokenizers import Tokenizer
from dppa_jax.recipes.document import RecipeError
from dppa_jax.recipes.write import Unsayable, recipe_of_job

RECIPE_FILE = "mergekit_config.yml"  # which programs look for in a merge


def recipe_text(job: JobConfig, specs: Mapping[str, TensorSpec], dtype: str, needed: bool = False) -> str:
    """Return the recipe of a merge as YAML: the one it was made from, or what its flags say.

    Args:
      specs, dtype: of the base.
      needed: raise an error where no recipe can say what the flags do; else "" is returned.

    Raises:
      RecipeError: no recipe can.
    """
    if job.from_recipe:
        return job.from_recipe.text
    try:
        return recipe_of_job(job, specs, dtype)
    except Unsayable as reason:
        if needed:
            raise RecipeError(f"--print_recipe: no recipe can say this merge: {reason}") from None
        return ""


def chat_template(job: JobConfig, models: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of the chat template that a recipe asks for, by name; of `auto` the one that most models have.

    Of several that equally many have, the first one counts.
    """
    wanted = job.from_recipe.chat_template if job.from_recipe else ""
    if wanted == "auto":
        found = [Tokenizer(name, model.directory, model.config).template for name, model in models.items()]
        counted = Counter(filter(None, found))
        wanted = counted.most_common(1)[0][0] if counted else ""
    return {"chat_template.jinja": wanted} if wanted else {}
