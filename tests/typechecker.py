"""What pytest's jaxtyping hook checks signatures with: beartype, an int passing for a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
