"""Which rows are worked on together, and which process has them.

A block is a few consecutive decoder layers, or a chunk of rows of the embeddings. Its matrices are one kind of linear
of all the block's layers, their norms, a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppa_jax.architecture.specs import TensorSpec, layer_count
from dppa_jax.merging.rows import Matrix, RowRange
from dppa_jax.runtime.processes import share

CHUNK = 1 << 24  # elements of embeddings at a time, in a process that has no layers


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


def make_blocks(specs: Mapping[str, TensorSpec], block_layers: int) -> list[Block]:
    """Layers in blocks of `block_layers`, then embeddings and head in chunks no larger than a matrix, then the norm."""
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
        blocks.append(Block(tuple(map(whole_matrix, alike.values())), chosen))
    largest = max((matrix.elements for block in blocks for matrix in block.matrices), default=CHUNK)
    for spec in specs.values():
        if spec.layer is None:
            step = max(1, largest // spec.columns)
            for start in range(0, spec.rows, step):
                rows = RowRange(spec.name, start, min(start + step, spec.rows))
                blocks.append(Block((Matrix((rows,), spec.columns),)))
    return blocks


def whole_matrix(group: Sequence[TensorSpec]) -> Matrix:
    """The tensors of one kind and shape, one below the other."""
    ranges = tuple(RowRange(spec.name, 0, spec.rows) for spec in group)
    return Matrix(ranges, group[0].columns, tuple(spec.linear for spec in group if spec.linear is not None))
