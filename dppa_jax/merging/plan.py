"""What a merge will cost, from config.json files alone: memory, bytes, passes, block size; with speeds, the time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from dppa_jax.architecture.specs import CheckpointError, TensorSpec, pruned_specs
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.delta.fold import WAYS
from dppa_jax.merging.blocks import Block, cut_tensors, make_blocks, shares, survey_steps
from dppa_jax.merging.merger import SEARCHES, WRITES_BEHIND
from dppa_jax.merging.rows import Matrix
from dppa_jax.merging.speed import Speeds
from dppa_jax.merging.survey import SURVEYS
from dppa_jax.runtime import processes
from dppa_jax.runtime.memory import device_memory, size_text

DEVICE_SHARE = 0.8  # of a device's memory that is filled; the rest is for the allocator
BLOCK = 8 * 10**9  # bytes of base and experts in a block at most, where more would fit: the host holds two blocks
RUNTIME = 250_000_000  # bytes of a process without weights: Python, JAX, compiled functions; measured on a CPU
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What a merge reads, holds and writes.

    Attributes:
      read, merged: bytes of an element of base and experts together, and of the merged model.
      held: of base and the experts that a streamed merge holds at a time.
      base_again: of the base as often as it is read again, with further experts.
      total: of the sum of the experts before; 0 where all are held.
      delta: bytes of an element of an expert's saved delta; 0 when none is saved.
      experts: how many.
      survey: is there a survey, a pass of its own over the layers?
      ranks: are units ranked, in another pass over the layers?
      asks: are tensors that are cut into several blocks read before, as something is asked of them?
      counts: are thresholds found by counting?
      solves: are linears solved for, from products of their inputs?
      checked: bytes of an element of the merged model while it is checked for NaN and Inf: XLA on a CPU takes float16,
        and no other dtype, to float32 first.
      devices: of one process; rows are padded to a multiple of them.
    """

    read: int
    held: int
    base_again: int
    total: int
    merged: int
    delta: int
    experts: int
    survey: bool
    ranks: bool
    asks: bool
    counts: bool
    solves: bool
    checked: int
    devices: int

    @property
    def written(self) -> int:
        """Bytes of an element of all outputs."""
        return self.merged + self.experts * self.delta

    def weights(self, blocks: Sequence[Block], resident: bool) -> int:
        """Bytes of base and experts that are held: all of them, or the block worked on and the one read ahead."""
        each = self.read if resident else self.held
        sizes = [sum(map(self._elements, block.matrices)) * each for block in blocks]
        return sum(sizes) if resident else sum(max(sizes[turn::2], default=0) for turn in (0, 1))

    def results(self, blocks: Sequence[Block]) -> int:
        """Peak bytes of what is computed: the survey's sums; then rows that wait for the disk and the counts."""
        merging = self.waiting(blocks) + self._deltas(blocks) + self._largest(blocks) * self.checked
        merging += max(sum(map(self._elements, block.matrices)) for block in blocks) * self.total
        linears = [[self._elements(matrix) for matrix in block.matrices if matrix.linears] for block in blocks]
        if self.counts:  # the first fold leaves an eighth of the columns, in words of four counters
            merging += SEARCHES * max(max(block, default=0) for block in linears) // WAYS * 4
        surveying = min(SURVEYS, self.experts) * max(map(sum, linears)) // WAYS * 8  # two float32 sums in one number
        ranking = self._largest(blocks) * ITEMSIZE["float32"]
        return max(merging, surveying * self.survey, ranking * self.ranks)

    def waiting(self, blocks: Sequence[Block]) -> int:
        """Peak bytes of merged rows that wait for the disk."""
        sizes = [self._elements(matrix) * self.merged for block in blocks for matrix in block.matrices]
        return max(sum(sizes[i : i + WRITES_BEHIND + 1]) for i in range(len(sizes)))

    def copies(self, blocks: Sequence[Block]) -> int:
        """Bytes of the rows that an accelerator's host fetches before it writes them."""
        return self._largest(blocks) * self.merged + self._deltas(blocks)

    def solving(self, blocks: Sequence[Block]) -> int:
        """Peak bytes on the host to solve for linears: products of a block's inputs, and the equations of a linear."""
        linears = [[matrix for matrix in block.matrices for _ in matrix.linears] for block in blocks]
        held = max(sum(matrix.columns**2 for matrix in own) for own in linears) * self.experts * ITEMSIZE["float32"]
        sizes = {(matrix.elements // len(matrix.linears), matrix.columns) for own in linears for matrix in own}
        equations = max((2 * columns**2 + 4 * size for size, columns in sizes), default=0)
        return (held + equations * 2 * ITEMSIZE["float32"]) * self.solves

    def _deltas(self, blocks: Sequence[Block]) -> int:
        """Bytes of pruned deltas: one is computed while the last one is written."""
        return min(2, self.experts) * self._largest(blocks) * ITEMSIZE["float32"] if self.delta else 0

    def _largest(self, blocks: Sequence[Block]) -> int:
        """Elements of the largest matrix."""
        return max(self._elements(matrix) for block in blocks for matrix in block.matrices)

    def _elements(self, matrix: Matrix) -> int:
        return -(-matrix.rows // self.devices) * self.devices * matrix.columns


@dataclass(frozen=True)
class Plan:
    """The cost of a merge. Figures of a process are those of the one that has most."""

    parameters: int
    models: int  # base and experts
    processes: int
    mesh: tuple[int, int]  # of each process
    platform: str
    block_layers: int
    small_blocks: bool  # see `make_blocks`
    blocks: int  # of a process
    resident: bool
    passes: int  # over the inputs
    bytes_read: int
    bytes_written: int
    process_parameters: int
    process_read: int  # bytes
    process_written: int  # bytes
    device_bytes: int  # peak, per device
    device_memory: int  # of one device
    host_bytes: int  # peak resident set of a process; a CPU's devices are part of it
    host_memory: int  # that a process can have; 0: not known

    @property
    def fits(self) -> bool:
        """Is the memory enough, of a device and, where it is known, of the host?"""
        on_devices = self.platform == "cpu" or self.device_bytes <= self.device_memory
        return on_devices and not 0 < self.host_memory < self.host_bytes

    def lines(self) -> list[tuple[str, str]]:
        """What `--job=plan` prints, and a merge logs."""
        layer, row = self.mesh
        several = f", in each of {self.processes} processes: {self.processes * layer * row} devices"
        one = f": {layer * row} devices"
        lines = [
            ("models", f"base + {self.models - 1} experts of {count(self.parameters)} parameters"),
            ("mesh", f"layer={layer}, row={row}" + (several if self.processes > 1 else one)),
            ("blocks", f"{self.blocks}, of {self.block_layers} layers"),
            ("residency", "read once, kept on the devices" if self.resident else f"streamed, {self.passes} passes"),
            ("read", self._moved(self.bytes_read, self.process_read)),
            ("written", self._moved(self.bytes_written, self.process_written)),
        ]
        if self.platform != "cpu":
            lines.append(("peak per device", self._fit(self.device_bytes, self.device_memory)))
        return [*lines, ("peak per process", self._fit(self.host_bytes, self.host_memory))]

    def with_another_pass(self, dtypes: Sequence[str], held: bool = False) -> "Plan":
        """Add the pass in which every process reads base and experts, to find the q of every linear.

        With `held`, the devices hold the base and one expert after another meanwhile, whole.
        """
        sizes = [self.parameters * ITEMSIZE[each] for each in dtypes]
        whole, models = sum(sizes), held * (sizes[0] + max(sizes[1:]))
        on_host = models if self.platform == "cpu" else 0
        return replace(
            self,
            device_bytes=max(self.device_bytes, models // math.prod(self.mesh)),
            host_bytes=max(self.host_bytes, RUNTIME + on_host),
            passes=self.passes + 1,
            bytes_read=self.bytes_read + whole * self.processes,
            process_read=self.process_read + whole,
        )

    def seconds(self, speeds: Speeds) -> float:
        """Predict the seconds of the process that has most to do, at these speeds."""
        return speeds.start + max(needed for _, needed, _ in self._work(speeds))

    def time(self, speeds: Speeds) -> str:
        """How these seconds come about."""
        told = ", ".join(f"{what} {needed:.1f} s ({speed})" for what, needed, speed in self._work(speeds))
        return f"{self.seconds(speeds):.1f} s: start {speeds.start:.1f} s + the longest of {told}"

    def _work(self, speeds: Speeds) -> tuple[tuple[str, float, str], ...]:
        """What is done at the same time: its name, seconds and speed."""
        return (
            ("compute", self.process_parameters / speeds.merge, f"{speeds.merge / 1e9:.3f} B parameters/s"),
            ("read", self.process_read / speeds.read, f"{size_text(speeds.read)}/s"),
            ("write", self.process_written / speeds.write, f"{size_text(speeds.write)}/s"),
        )

    def _moved(self, total: int, most: int) -> str:
        return size_text(total) + f", at most {size_text(most)} by a process" * (self.processes > 1)

    def _fit(self, peak: int, memory: int) -> str:
        if not memory:
            return size_text(peak)
        fits = f"{size_text(peak)} of {size_text(memory)}"
        return fits if peak <= memory else f"{fits}: too much; {self._advice()}"

    def _advice(self) -> str:
        if self.resident:
            return "give --residency=streamed"
        if self.block_layers > self.mesh[0]:
            return f"give --block_layers={self.mesh[0]}"
        if self.platform == "cpu":
            return "no block is smaller: merge fewer experts, or on a machine with more memory"
        return "give more devices in --mesh"


def make_plan(
    specs: Mapping[str, TensorSpec],
    dtypes: Sequence[str],
    config: MergeConfig,
    mesh: tuple[int, int],
    block_layers: int,
    residency: str,
    device_memory: int,
    platform: str,
    processes: int = 1,
    save_delta: bool = False,
    host_memory: int = 0,
    small_blocks: bool = False,
) -> Plan:
    """Plan a merge of base and experts, given the base's tensors and the dtype of each model, base first.

    Residency "auto" keeps everything on the devices when it fits, except on a CPU: there the operating system's page
    cache already makes the second read a copy in memory. `block_layers` 0 takes those of `_Cuts.layers_at_a_time`. Each
    of `processes` has such a mesh.
    """
    work, specs = make_work(dtypes, config, math.prod(mesh), save_delta), pruned_specs(specs, config.prune)
    room = DEVICE_SHARE * device_memory * work.devices
    cuts = _Cuts(shares(specs, processes), work, mesh[0], room, small_blocks)
    resident = residency == "resident" or (residency == "auto" and platform != "cpu" and cuts.fits(mesh[0], True))
    block_layers = block_layers or cuts.layers_at_a_time(platform, resident)
    blocks, on_devices = cuts.blocks(block_layers, resident), cuts.peak(block_layers, resident)
    elements = list(map(_elements, cuts.shares))
    base_again = 0 if resident else work.base_again
    before = [0 if resident else cuts.read_before(own, block_layers) for own in (specs, *cuts.shares)]
    return Plan(
        parameters=_elements(specs),
        models=len(dtypes),
        processes=processes,
        mesh=mesh,
        platform=platform,
        block_layers=min(block_layers, cuts.layers),
        small_blocks=small_blocks and not resident,
        blocks=max(map(len, blocks)),
        resident=resident,
        passes=1 + work.survey + work.ranks,
        bytes_read=(_elements(specs) + before[0]) * work.read + _elements(specs) * base_again,
        bytes_written=_elements(specs) * work.written,
        process_parameters=max(elements),
        process_read=max((a + b) * work.read + a * base_again for a, b in zip(elements, before[1:], strict=True)),
        process_written=max(elements) * work.written,
        device_bytes=on_devices // work.devices,
        device_memory=device_memory,
        host_bytes=RUNTIME + _on_host(work, blocks, on_devices, platform),
        host_memory=host_memory,
    )


def _on_host(work: Work, blocks: Sequence[Sequence[Block]], on_devices: int, platform: str) -> int:
    """Peak bytes that a process holds on the host; a CPU's devices are part of it."""
    if platform == "cpu":  # there is one heap, which keeps what is freed in pieces: what waits takes twice its size
        return on_devices + max(map(work.waiting, blocks)) + max(map(work.solving, blocks))
    return max(work.weights(own, resident=False) + work.copies(own) + work.solving(own) for own in blocks)


class _Cuts:
    """The ways to cut the work into blocks, and what each holds in memory.

    Args:
      shares: the tensors of each process; of processes whose tensors are alike, one is looked at.
      axis: the size of the mesh's layer axis, of which a block has a multiple of layers.
      room: bytes of the devices of a process that may be filled.
      small: see `make_blocks`; not for weights that stay on the devices.
    """

    def __init__(self, shares: Sequence[Mapping[str, TensorSpec]], work: Work, axis: int, room: float, small: bool):
        self.shares = list({tuple(spec.shape for spec in own.values()): own for own in shares if own}.values())
        self.layers = max(len({spec.layer for spec in own.values()} - {None}) for own in self.shares)
        self._work, self._axis, self._room, self._small = work, axis, room, small

    def blocks(self, layers: int, resident: bool) -> list[list[Block]]:
        """The blocks of each process, of so many layers."""
        small = self._small and not resident
        return [make_blocks(own, min(layers, self.layers), small) for own in self.shares]

    def read_before(self, specs: Mapping[str, TensorSpec], layers: int) -> int:
        """Elements of a model that are read of these tensors before the merge: surveyed, asked, and ranked by units."""
        blocks = make_blocks(specs, layers, self._small)
        surveyed = sum(step.block.elements for step in survey_steps(blocks)) if self._work.survey else 0
        asked = [block for own in cut_tensors(blocks).values() for block in own] if self._work.asks else []
        surveyed += sum(block.elements for block in asked)
        return surveyed + self._work.ranks * sum(block.elements for block in blocks if block.layers)

    def peak(self, layers: int, resident: bool) -> int:
        """Most bytes on the devices of a process."""
        work = self._work
        return max(work.weights(own, resident) + work.results(own) for own in self.blocks(layers, resident))

    def fits(self, layers: int, resident: bool) -> bool:
        """Is there room on the devices for blocks of so many layers?"""
        return self.peak(layers, resident) < self._room

    def layers_at_a_time(self, platform: str, resident: bool) -> int:
        """One layer per index of the layer axis on a CPU, or where linears are solved for; else as many as fit."""
        few = platform == "cpu" or self._work.solves
        return self._axis if few else self.most_layers_that_fit(resident)

    def most_layers_that_fit(self, resident: bool) -> int:
        """The most layers of a block that fit on the devices and in BLOCK, a multiple of the axis."""
        layer = max(block.elements for own in self.blocks(1, True) for block in own)
        layer *= self._work.read if resident else self._work.held
        most = min(-(-self.layers // self._axis), BLOCK // (layer * self._axis))
        larger = range(most * self._axis, self._axis, -self._axis)
        return next((layers for layers in larger if self.fits(layers, resident)), self._axis)


def make_work(dtypes: Sequence[str], config: MergeConfig, devices: int, save_delta: bool = False) -> Work:
    """The work of a merge of base and experts of these dtypes on the devices of one process."""
    sizes, output_dtype = [ITEMSIZE[each] for each in dtypes], config.output_dtype or dtypes[0]
    held = sizes[1:][: config.experts_at_a_time]
    groups = -(-(len(sizes) - 1) // config.experts_at_a_time)
    return Work(
        read=sum(sizes),
        held=sizes[0] + sum(held),
        base_again=sizes[0] * (groups - 1),
        total=ITEMSIZE["float32"] if groups > 1 else 0,
        merged=ITEMSIZE[output_dtype],
        delta=ITEMSIZE[config.delta_dtype] if save_delta else 0,
        experts=len(dtypes) - 1,
        survey=config.is_surveyed,
        ranks=config.ranks_units,
        asks=config.combination.asks_tensors and not config.combines_rows,
        counts=config.is_counted,
        solves=config.combination.solves,
        checked=ITEMSIZE["float32"] if output_dtype == "float16" and not config.allow_nonfinite else 0,
        devices=devices,
    )


def _elements(specs: Mapping[str, TensorSpec]) -> int:
    """Count the elements of tensors."""
    return sum(math.prod(spec.shape) for spec in specs.values())


def dtype_name(config: Mapping) -> str:
    """The weights' dtype as config.json says; float32 when it does not."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ITEMSIZE:
        raise CheckpointError(f"config.json: dtype {name!r} cannot be merged; it must be {', '.join(ITEMSIZE)}.")
    return name


def count(parameters: int) -> str:
    """A number of parameters as people say it: 6.738 B, 0.413 M."""
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def plan_of(
    job: JobConfig,
    specs: Mapping[str, TensorSpec],
    dtypes: Sequence[str],
    mesh: tuple[int, int],
    repeated: bool = False,
) -> Plan:
    """Plan one merge; with `repeated`, many merges of the same models, whose weights then stay in memory on a CPU, too.

    A further merge of SmolLM2-135M with one expert takes 0.13 s so, and 0.65 s streamed a layer at a time.
    """
    memory, platform = device_memory(job.device_memory)
    small_blocks = platform == "cpu" and not job.device_memory
    if job.device_memory:
        platform = "accelerator"  # an imagined device: plan for its memory, not for this machine's page cache
    elif platform != "cpu" and job.evaluation.tasks and job.evaluation.evaluator == "vllm":
        memory = int(memory * (1 - job.evaluation.gpu_memory_utilization))  # vLLM has the rest from its start on
    if repeated:
        platform = "accelerator"
    free = 0 if job.device_memory else psutil.virtual_memory().available
    several = job.num_processes or processes.count()
    cut = (job.block_layers, job.residency, memory, platform, several)
    plan = make_plan(specs, dtypes, job.merge, tuple(mesh), *cut, bool(job.save_delta), free, small_blocks)
    return plan.with_another_pass(dtypes, job.q.holds_models) if job.q and job.q.is_of_linears else plan
