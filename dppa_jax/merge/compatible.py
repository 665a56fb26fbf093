"""TODO."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from dppa_jax.architecture.specs import CheckpointError, TensorSpec


def check_compatible(base: Any, experts: Mapping[str, Any], quiet: bool = False) -> Mapping[str, TensorSpec]:
    """The tensors to merge: the base's. Experts must have them all, in the base's shapes but for added vocabulary.

    Of base and experts only `config` and `specs` are looked at, so that a plan needs no weights.
    """
    for name, expert in experts.items():
        layers, wanted = expert.config["num_hidden_layers"], base.config["num_hidden_layers"]
        if layers != wanted:
            raise CheckpointError(
                f"expert {name!r} has {layers} decoder layers, the base {wanted}: a different base model?"
            )
        for tensor, spec in base.specs.items():
            found = expert.specs.get(tensor)
            if found is None:
                raise CheckpointError(
                    f"expert {name!r} has no {tensor}, the base has; tie_word_embeddings is "
                    f"{expert.config.get('tie_word_embeddings', False)} there and "
                    f"{base.config.get('tie_word_embeddings', False)} in the base. Export it like the base."
                )
            if found.shape == spec.shape:
                continue
            vocabulary = tensor in ("model.embed_tokens.weight", "lm_head.weight")
            if vocabulary and found.shape[1:] == spec.shape[1:] and found.shape[0] > spec.shape[0]:
                extra = found.shape[0] - spec.shape[0]
                if not quiet:
                    logging.warning("expert %r: %d rows of %s beyond the base's are dropped", name, extra, tensor)
                continue
            raise CheckpointError(
                f"expert {name!r}: {tensor} has shape {found.shape}, base has {spec.shape}: different base model? "
                f"Experts must be fine-tuned from --base."
            )
        extra = [tensor for tensor in expert.specs if tensor not in base.specs]
        if extra:
            raise CheckpointError(f"expert {name!r} has {extra[0]}, which the base has not; a different base model?")
    return base.specs
