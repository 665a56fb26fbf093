"""Optimisers for fine-tuning, as optax transformations. The learning rate is applied by the step, as it changes."""

import optax

from dppa_jax.config.finetune import AdamW


def transformation(options: AdamW) -> optax.GradientTransformation:
    """Return AdamW without its learning rate: clip the gradient's norm, scale by Adam's moments, add weight decay.

    All weights decay, norms and embeddings too.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    return optax.chain(
        optax.clip_by_global_norm(options.max_gradient_norm),
        optax.scale_by_adam(options.beta1, options.beta2),
        optax.add_decayed_weights(options.weight_decay),
    )
