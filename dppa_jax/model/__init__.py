"""Decoders in JAX and Flax, and greedy generation with them. See README.md in this folder."""

from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.decoder import Decoder, decoder_layer, forward
from dppa_jax.model.generate import generate
from dppa_jax.model.tree import abstract_tree, init_tree

__all__ = ["Decoder", "DecoderConfig", "abstract_tree", "decoder_layer", "forward", "generate", "init_tree"]
