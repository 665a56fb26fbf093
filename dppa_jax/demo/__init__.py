"""`demo:base`, `demo:math`, `demo:finance` and `demo:law`: a family of small models that is trained on first use."""

_FAMILY = ("MEMBERS", "directory", "families")

__all__ = ["MEMBERS", "directory", "families"]


def __getattr__(name: str):
    """Import the code that trains only when it is asked for; the table of tasks needs only the family's texts."""
    if name in _FAMILY:
        from dppa_jax.demo import family

        return getattr(family, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
