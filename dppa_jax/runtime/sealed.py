"""The key-value store of JAX's coordinator, where each value carries a code that only this job's processes can make.

The coordinator asks for no password: whoever reaches its port can read, write and delete what is in the store. So a
value is sealed. In front of it stands an HMAC-SHA256 of its key and its bytes, made with the job's secret, and a value
with another code is refused.

A value that was recorded in an earlier run with the same secret must not pass either. So each process first tells a
random number of its own, and the seal is made of the secret and all these numbers.
"""

import hmac
import secrets
from collections.abc import Callable

import jax

SECRET = "DPPA_JAX_SECRET"  # the environment variable that holds the job's secret, the same in every process
MEETING = "dppa_jax/meeting"
PIECE = 4_000_000  # bytes of one entry; a larger value is divided, so that each piece arrives soon over a slow network
MOST_PIECES = 255  # of one value; the number is a byte
CODE_BYTES = 32
FOREIGN = (
    "another program writes to the job's coordinator. Give each job a port of its own, and let nobody else reach it."
)


class ForeignValueError(ValueError):
    """A value in the store was not written by a process of this job."""


class SealedStore:
    """The store as the processes of one job use it.

    Args:
      client: JAX's client of the store.
      seal: what codes are made with; whoever has it belongs to the job.
      prefix: of every key.
    """

    def __init__(self, client, seal: bytes, prefix: str):
        self._client, self._seal, self._prefix = client, seal, prefix

    def put(self, name: str, content: bytes, replace: bool = False) -> None:
        """Write a value.

        Args:
          replace: write over a value that is there.

        Raises:
          ForeignValueError: a value is there, and `replace` is False.
          ValueError: the value is too large.
          jax.errors.JaxRuntimeError: the coordinator has gone.
        """
        if len(content) > (most := PIECE * MOST_PIECES):
            raise ValueError(f"{name}: {len(content)} bytes, and processes tell each other at most {most} at a time.")
        pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)] or [b""]
        pieces[0] = bytes([len(pieces)]) + pieces[0]
        for number, piece in enumerate(pieces):
            key = f"{self._prefix}/{name}/{number}"
            try:
                self._client.key_value_set_bytes(key, self._code(key, piece) + piece, allow_overwrite=replace)
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise
                raise ForeignValueError(f"{name} is there already: {FOREIGN}") from None

    def get(self, name: str, fetch: Callable[[str], bytes]) -> bytes:
        """Return a value.

        Args:
          fetch: returns what the store has for a key, or waits for it.

        Raises:
          ForeignValueError: its code is wrong.
        """
        first = self._piece(name, 0, fetch)
        return first[1:] + b"".join(self._piece(name, number, fetch) for number in range(1, first[0]))

    def _piece(self, name: str, number: int, fetch: Callable[[str], bytes]) -> bytes:
        key = f"{self._prefix}/{name}/{number}"
        found = fetch(key)
        code, piece = found[:CODE_BYTES], found[CODE_BYTES:]
        if not hmac.compare_digest(code, self._code(key, piece)):
            raise ForeignValueError(f"{name} does not carry the code of this job: {FOREIGN}")
        return piece

    def _code(self, key: str, piece: bytes) -> bytes:
        return hmac.digest(self._seal, key.encode() + b"\0" + piece, "sha256")


def meet(client, fetch: Callable[[str], bytes], secret: bytes, process: int, processes: int) -> SealedStore:
    """Agree with the other processes of the job on a seal. All of them must call this.

    Args:
      client: JAX's client of the store.
      fetch: waits for what the store has for a key.
      secret: of the job; empty if it has none.
      process, processes: the number of this process, and how many there are.

    Raises:
      ForeignValueError: a process has another secret, or belongs to another job.
    """
    meeting, numbers = SealedStore(client, secret, MEETING), []
    meeting.put(str(process), secrets.token_bytes(CODE_BYTES))
    for other in range(processes):
        try:
            numbers.append(meeting.get(str(other), fetch))
        except ForeignValueError:
            raise ForeignValueError(
                f"process {other} has another ${SECRET} than process {process}, or another job uses the same "
                f"coordinator. Give all processes of a job the same ${SECRET}, and each job a port of its own."
            ) from None
    seal = hmac.digest(secret, b"".join(numbers), "sha256")
    token = hmac.digest(seal, b"token", "sha256").hex()[:16]
    return SealedStore(client, seal, f"dppa_jax/{token}")
