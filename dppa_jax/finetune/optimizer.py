"""Optimisers of fine-tuning, as optax transformations without a learning rate, which changes from step to step."""

import optax

from dppa_jax.config.finetune import AdamW


def transformation(options: AdamW) -> optax.GradientTransformation:
    """AdamW on gradients that are no longer than `max_gradient_norm`. All weights decay, norms and embeddings too.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    return optax.chain(
        optax.clip_by_global_norm(options.max_gradient_norm),
        optax.scale_by_adam(options.beta1, options.beta2),
        optax.add_decayed_weights(options.weight_decay),
    )
