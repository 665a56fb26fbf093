"""Merge fine-tuned language models by pruning and amplifying their delta parameters.

For notebooks: `load`, `merge`, `save`, `methods`. For other tools, which have the tensors themselves: `merge_tensors`,
`merge_state_dicts`. The command line is `dppa_jax`, or `python -m dppa_jax.launch`.
"""

from dppa_jax.delta.presets import METHODS as methods

_NOTEBOOK = ("Model", "load", "merge", "merge_state_dicts", "merge_tensors", "save")

__all__ = ["Model", "load", "merge", "merge_state_dicts", "merge_tensors", "methods", "save"]


def __getattr__(name: str):
    """Import what needs JAX only when it is asked for: `--helpshort` answers at once."""
    if name in _NOTEBOOK:
        from dppa_jax import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
