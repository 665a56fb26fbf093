"""The LLaMA model in JAX and Flax, and greedy generation with it. See README.md in this folder."""

from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.decoder import Llama, abstract_tree, decoder_layer, forward, init_tree
from dppa_jax.model.generate import generate

__all__ = ["Llama", "LlamaConfig", "abstract_tree", "decoder_layer", "forward", "generate", "init_tree"]
