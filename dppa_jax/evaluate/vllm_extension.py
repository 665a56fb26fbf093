"""An extension of vLLM's own worker processes (`worker_extension_cls`): sums over the weights in use."""

import torch
from vllm.model_executor.layers import utils


def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Let a linear on a CPU compute with its weights as they are, in place of a copy that vLLM packs.

    A packed copy cannot be inspected. And `reload_weights` (vLLM 0.32) does not renew the packed copy of a tied
    lm_head: with new weights, vLLM would compute logits by the old embeddings.
    """
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = keep_weights


class Sums:
    """Methods that `collective_rpc` finds on vLLM's workers."""

    def weight_sums(self) -> tuple[str, dict[str, int]]:
        """Return the dtype of the linears, and the `bit_sum` of every parameter in this worker's shard."""
        parameters = dict(self.model_runner.get_model().named_parameters(remove_duplicate=False))
        dtype = next(parameter.dtype for name, parameter in parameters.items() if "o_proj" in name)
        sums = {name: bit_sum(tensor, "experts" in name) for name, tensor in parameters.items()}
        return str(dtype).removeprefix("torch."), sums


def bit_sum(tensor: torch.Tensor, permuted: bool = False) -> int:
    """Add up a tensor's bytes as 64-bit integers, modulo 2⁶⁴: exact in any order, and additive over parts of rows.

    Where the bytes of a row do not divide into 64-bit integers, narrower ones are taken: a part of the rows then has
    the same words as in the whole tensor.

    Args:
      permuted: add up elements, as vLLM keeps the linears of experts in an order that its kernels like.
    """
    row = tensor.element_size() if permuted else tensor.shape[-1] * tensor.element_size()
    words = torch.int64 if row % 8 == 0 else torch.int32 if row % 4 == 0 else torch.int16
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))
