"""`demo:base`, `demo:math`, `demo:finance` and `demo:law`: a family of small models, trained on first use."""

from dppa_jax.demo.family import MEMBERS, directory, families

__all__ = ["MEMBERS", "directory", "families"]
