"""A file of recipes, each of which may use the results of those before it, as jobs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dppa_jax.config.run import JobConfig
from dppa_jax.flags import Values, read_path
from dppa_jax.recipes.configs import Said, check_flags, said_by
from dppa_jax.recipes.document import RecipeError, read_documents
from dppa_jax.recipes.grammar import recipe_of
from dppa_jax.recipes.recipe import Recipe
from dppa_jax.runtime import processes

JOBS = ("merge", "plan", "inspect")  # that take a recipe


def of_recipes(values: Values, make: Callable[[Said], JobConfig]) -> JobConfig:
    """Return the job of the last recipe of the file that --recipe names; those of the others come before it.

    Their outputs go to --workdir, each under its name.

    Args:
      values: of all flags.
      make: makes a job of what a recipe says.

    Raises:
      OSError: there is no such file.
      RecipeError: it is no file of recipes; names file, line and fix.
      ValueError: a flag says what the recipe says.
    """
    check_flags(values)
    if values["job"] not in JOBS:
        raise ValueError(f"--recipe: --job={values['job']} takes none; {', '.join(JOBS)} do. Give flags instead.")
    recipes = read_recipes(read_path("--recipe", values["recipe"]))
    workdir, jobs, like = Path(read_path("--workdir", values["workdir"])), [], {}
    named: dict[str, str] = {}
    with processes.first_alone("recipe"):  # process 0 fetches what the others then find
        for recipe in recipes:
            said = said_by(recipe, values, named, like)
            if recipe is not recipes[-1]:
                output = str(workdir / recipe.name)
                like[output] = like.get(said.values["base"], said.values["base"])
                named[recipe.name] = output
                said = replace(said, values={**said.values, "output": output, "overwrite": True, "evaluate": []})
            jobs.append(make(said))
    return replace(jobs[-1], earlier=tuple(jobs[:-1]))


def read_recipes(file: str) -> list[Recipe]:
    """Read a file of recipes; all but the last have names, by which later ones may refer to their results."""
    recipes = [recipe_of(value, text) for value, text in read_documents(file)]
    for place, recipe in enumerate(recipes):
        later = recipes[place + 1 :]
        if later and not recipe.name:
            raise RecipeError(f"{recipe.place}: of several recipes all but the last need a name:; add one.")
        _check_name(recipe, later)
    return recipes


def _check_name(recipe: Recipe, later: Sequence[Recipe]) -> None:
    """Refuse a name that is no directory's or another's, and the use of a result that is yet to come."""
    if later and (Path(recipe.name).name != recipe.name or recipe.name.startswith(".")):
        raise RecipeError(f"{recipe.place}: the name {recipe.name!r} is to be that of a directory in --workdir.")
    for other in later:
        if other.name and other.name == recipe.name:
            raise RecipeError(f"{other.place}: the name {recipe.name} is given twice, first in {recipe.place}.")
        for used in (recipe.base, *(part.model for part in recipe.parts)):
            if used and used == other.name:
                raise RecipeError(f"{recipe.place}: uses {used}, a later recipe of the file; put that one before it.")
