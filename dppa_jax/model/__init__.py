"""The LLaMA model in Flax, and greedy generation with it."""

from dppa_jax.model.config import LlamaConfig
from dppa_jax.model.decoder import Llama, abstract_tree, decoder_layer, forward, init_tree
from dppa_jax.model.generate import generate

__all__ = ["Llama", "LlamaConfig", "abstract_tree", "decoder_layer", "forward", "generate", "init_tree"]
