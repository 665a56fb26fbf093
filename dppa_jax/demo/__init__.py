"""`demo:base`, `demo:math`, `demo:finance` and `demo:law`: a family of small models, trained on first use."""

_FAMILY = ("MEMBERS", "directory", "families")

__all__ = ["MEMBERS", "directory", "families"]


def __getattr__(name: str):
    """Import what trains only when it is asked for: the table of tasks needs the family's texts alone."""
    if name in _FAMILY:
        from dppa_jax.demo import family

        return getattr(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
