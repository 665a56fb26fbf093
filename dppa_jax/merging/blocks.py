"""Which rows are worked on together, and which process has them.

A block is a few consecutive decoder layers, or a chunk of rows of the embeddings. Its matrices are one kind of linear
of all the block's layers, their norms, a chunk. A layer of a mixture of experts makes several blocks on a CPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppa_jax.architecture.specs import TensorSpec, layer_count, row_pieces
from dppa_jax.merging.rows import Matrix, RowRange
from dppa_jax.runtime.processes import share

CHUNK = 1 << 24  # elements of embeddings at a time, in a process that has no layers
MOST = 1 << 26  # elements of a block of a mixture's layer; three experts of Qwen3-30B-A3B take 1.6 GB so, and 12 whole
CACHED = 1 << 23  # elements of a matrix of a mixture's experts; on a CPU, larger ones take up to three times as long


@dataclass(frozen=True)
class Block:
    """Matrices that are on the devices together; `layers` are those of its linears, none outside the layers."""

    matrices: tuple[Matrix, ...]
    layers: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of one model."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def linears(self) -> list[int]:
        """The places of its linears on their axis."""
        return [place for matrix in self.matrices for place in matrix.linears]


def layer_owners(layers: int, processes: int) -> list[int]:
    """The process that reads, merges and writes each layer: consecutive layers in equal shares."""
    return [process for process in range(processes) for _ in share(layers, processes, process)]


def owners(specs: Mapping[str, TensorSpec], processes: int) -> dict[str, int]:
    """The process of each tensor: that of its layer; what is before the layers is the first's, the rest the last's."""
    of_layer = layer_owners(layer_count(specs), processes)
    of_tensor, started = {}, False
    for name, spec in specs.items():
        started |= spec.layer is not None
        outside = processes - 1 if started else 0
        of_tensor[name] = outside if spec.layer is None else of_layer[spec.layer]
    return of_tensor


def shares(specs: Mapping[str, TensorSpec], processes: int) -> list[dict[str, TensorSpec]]:
    """The tensors of each process."""
    owner = owners(specs, processes)
    return [{name: spec for name, spec in specs.items() if owner[name] == process} for process in range(processes)]


def make_blocks(specs: Mapping[str, TensorSpec], block_layers: int, small: bool = False) -> list[Block]:
    """Layers in blocks of `block_layers`, then embeddings and head in chunks no larger than a matrix, then the norm.

    What is pruned outside the layers is not cut.

    Args:
      specs: the tensors of a process.
      small: cut a layer with many linears of one kind into matrices of at most CACHED elements, and these into blocks
        of at most MOST.
    """
    of_layer: dict[int, list[TensorSpec]] = {}
    for spec in specs.values():
        if spec.layer is not None:
            of_layer.setdefault(spec.layer, []).append(spec)
    layers = sorted(of_layer)
    blocks = []
    for first in range(0, len(layers), block_layers):
        chosen = tuple(layers[first : first + block_layers])
        alike: dict[tuple, list[TensorSpec]] = {}
        for spec in (spec for layer in chosen for spec in of_layer[layer]):
            alike.setdefault((spec.kind, spec.shape), []).append(spec)
        is_mixture = small and any(len(group) > len(chosen) for group in alike.values())
        parts = [part for group in alike.values() for part in _parts(group, small and len(group) > len(chosen))]
        blocks += _packed(Block(tuple(map(whole_matrix, parts)), chosen), MOST if is_mixture else 0)
    largest = max((matrix.elements for block in blocks for matrix in block.matrices), default=CHUNK)
    for spec in specs.values():
        if spec.layer is None and spec.linear is not None:  # its threshold is one of the whole tensor
            blocks.append(Block((whole_matrix([spec]),)))
        elif spec.layer is None:
            for start, stop in row_pieces(spec.rows, spec.columns, largest):
                blocks.append(Block((Matrix((RowRange(spec.name, start, stop),), spec.columns),)))
    return blocks


def cut_tensors(blocks: Sequence[Block]) -> dict[str, list[Block]]:
    """The blocks of each tensor that makes several."""
    names: dict[str, list[Block]] = {}
    for block in blocks:
        if not block.layers:
            names.setdefault(block.matrices[0].ranges[0].name, []).append(block)
    return {name: own for name, own in names.items() if len(own) > 1}


def _parts(group: Sequence[TensorSpec], small: bool) -> list[Sequence[TensorSpec]]:
    """Cut tensors of one shape into parts of at most CACHED elements, of equally many tensors where that works."""
    count = max(1, min(CACHED // (group[0].rows * group[0].columns), len(group))) if small else len(group)
    equal = max(size for size in range(1, count + 1) if len(group) % size == 0)
    count = equal if 2 * equal >= count else count
    return [group[start : start + count] for start in range(0, len(group), count)]


def _packed(block: Block, most: int) -> list[Block]:
    """Cut a block into blocks of at most so many elements, unless a matrix alone has more; 0 for no limit."""
    packed: list[list[Matrix]] = [[]]
    for matrix in block.matrices:
        if most and packed[-1] and sum(m.elements for m in (*packed[-1], matrix)) > most:
            packed.append([])
        packed[-1].append(matrix)
    return [Block(tuple(matrices), block.layers) for matrices in packed]


@dataclass(frozen=True)
class Step:
    """A block of a survey, and what is done with it.

    Attributes:
      whole: the places of all linears of the block's layers.
      adds_up: are the |δ| of its linears added up?
      compares: and are they compared with a multiple of the means, for which those of the whole layers are known?
    """

    block: Block
    whole: tuple[int, ...]
    adds_up: bool
    compares: bool


def survey_steps(blocks: Sequence[Block]) -> list[Step]:
    """The blocks of layers as a survey reads them: those of a layer that makes several twice, one after the other."""
    of_layers: dict[tuple[int, ...], list[Block]] = {}
    for block in (block for block in blocks if block.layers):
        of_layers.setdefault(block.layers, []).append(block)
    steps = []
    for parts in of_layers.values():
        whole = tuple(place for part in parts for place in part.linears)
        for kinds in [(True, True)] if len(parts) == 1 else [(True, False), (False, True)]:
            steps += [Step(part, whole, *kinds) for part in parts]
    return steps


def whole_matrix(group: Sequence[TensorSpec]) -> Matrix:
    """The tensors of one kind and shape, one below the other."""
    ranges = tuple(RowRange(spec.name, 0, spec.rows) for spec in group)
    return Matrix(ranges, group[0].columns, tuple(spec.linear for spec in group if spec.linear is not None))
