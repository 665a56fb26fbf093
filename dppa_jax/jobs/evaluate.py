"""--job=evaluate: the accuracy of any models on any tasks."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from dppa_jax.checkpoint.in_memory import for_evaluator
from dppa_jax.checkpoint.tokenizer import has_tokenizer
from dppa_jax.config.run import EvaluateConfig
from dppa_jax.evaluate.evaluation import open_evaluation
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.jobs.evaluated import announce, check_answers, check_tasks
from dppa_jax.jobs.places import check_apart, directories
from dppa_jax.report.sections import finish, new_report, show
from dppa_jax.report.tables import Cell, ResultTable
from dppa_jax.runtime.progress import steps
from dppa_jax.where import open_all


def run_evaluate(job: EvaluateConfig) -> dict[str, Scores]:
    """Evaluate every model on every task; print the accuracies, and write them as a report to job.workdir.

    Each is asked with its own tokenizer, or all with that of the model that --tokenizer names.
    """
    config, models = job.evaluation, job.models
    check_tasks(config)
    opened = open_all(models, job.seed, dequantise=job.dequantise)
    check_apart({}, directories(opened), job.workdir)
    places = {name: model.directory for name, model in opened.items()}
    with_tokenizer = [directory for directory in places.values() if has_tokenizer(directory)]
    default = places[job.tokenizer] if job.tokenizer else [*with_tokenizer, *places.values()][0]
    tasks = every_task(config.tasks)
    for model in opened.values():
        check_answers(model, tasks, alone=True)
    with open_evaluation(config, default, Path(job.workdir), shared=bool(job.tokenizer)) as evaluation:
        announce(evaluation, config)
        readers = {name: evaluation.readers.of(name, model.config, places[name]) for name, model in opened.items()}
        for reader in readers.values():  # what cannot be encoded is refused before anything is asked
            for task in tasks:
                evaluation.questions(task, reader=reader)
        with steps("evaluate", len(opened)) as advance, ExitStack() as closed:
            found = {}
            for name, model in opened.items():
                closed.callback(model.close)  # at the end, as adapters read the base
                fingerprint, weights = model.content_digest(), partial(for_evaluator, model)
                found[name] = evaluation.scores(name, fingerprint, weights, tasks, reader=readers[name])
                advance()
        rows = {task.name: [Cell.of_scores([found[name][task.name]]) for name in models] for task in tasks}
        table = ResultTable("Accuracy (%)", "task", tuple(models), rows, name="accuracies")
        show([table])
        finish(Path(job.workdir), new_report("Evaluation", job.command, models, config, evaluation, [table]))
    return found
