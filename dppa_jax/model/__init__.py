"""Decoders and encoders in JAX and Flax, and greedy generation. See README.md in this folder."""

from dppa_jax.model.config import DecoderConfig, EncoderConfig, model_config
from dppa_jax.model.decoder import Decoder, decoder_layer, forward
from dppa_jax.model.encoder import classify
from dppa_jax.model.generate import generate
from dppa_jax.model.tree import abstract_tree, init_tree

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EncoderConfig",
    "abstract_tree",
    "classify",
    "decoder_layer",
    "forward",
    "generate",
    "init_tree",
    "model_config",
]
