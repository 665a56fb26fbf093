"""What vLLM's own worker processes import (`worker_extension_cls`): sums over the weights that they compute with."""

import torch
from vllm.model_executor.layers import utils


def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Products with the weights as they are, in place of vLLM's packed copies on CPUs.

    A packed copy cannot be looked into, and that of a tied lm_head is not renewed by `reload_weights` (vLLM 0.32), so
    that new weights would be read out by the old embeddings.
    """
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = keep_weights


class Sums:
    """Methods that `collective_rpc` finds on vLLM's workers."""

    def weight_sums(self) -> tuple[str, dict[str, int]]:
        """The dtype of the linears and the `bit_sum` of every parameter in use, of this worker's shard of them."""
        parameters = dict(self.model_runner.get_model().named_parameters(remove_duplicate=False))
        dtype = next(parameter.dtype for name, parameter in parameters.items() if "o_proj" in name)
        return str(dtype).removeprefix("torch."), {name: bit_sum(tensor) for name, tensor in parameters.items()}


def bit_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes as 64-bit integers, modulo 2⁶⁴: exact, in any order, and additive over its parts.

    Narrower integers where a row is no whole number of them, so that a part has the words that it has in the whole.
    """
    row = tensor.shape[-1] * tensor.element_size()
    words = torch.int64 if row % 8 == 0 else torch.int32 if row % 4 == 0 else torch.int16
    return int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))
