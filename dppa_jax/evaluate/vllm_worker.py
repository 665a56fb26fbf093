"""The child process that runs vLLM, in an interpreter that need not have JAX or this package.

Requests and answers are JSON lines; a request's "do" names what is wanted. An exception ends the process, and the
parent reports its last lines.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
MERGED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


class Engine:
    """vLLM with one model, whose weights can be replaced."""

    def __init__(self, directory: str, *, enforce_eager: bool | None, **options):
        """Args as of `vllm.LLM`; enforce_eager None compiles nothing on CPUs, where that takes longer than it saves."""
        from vllm import LLM
        from vllm.platforms import current_platform

        eager = current_platform.is_cpu() if enforce_eager is None else enforce_eager
        self.llm = LLM(
            model=directory,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            generation_config="vllm",  # no penalties and temperatures of the model's own
            worker_extension_cls="vllm_extension.Sums",
            disable_log_stats=True,
            seed=0,
            **options,
        )
        if engines := multiprocessing.active_children():
            threading.Thread(target=end_with, args=(engines,), daemon=True).start()

    def replace(self, directory: str) -> dict:
        """New weights in place, and no keys and values of the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        self.llm.reset_prefix_cache()
        return {}

    def sums(self, directory: str) -> dict:
        """The `bit_sum` of every parameter: as it is in use, and as a directory's files have it."""
        workers = self.llm.collective_rpc("weight_sums")
        dtype = workers[0][0]
        used: dict[str, int] = {}
        for _, sums in workers:
            for name, value in sums.items():
                used[name] = used.get(name, 0) + value
        wanted = directory_sums(Path(directory), dtype, len(workers))
        return {"used": modulo(used), "wanted": modulo(wanted)}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: list[int], stop: list[int], tell: Callable[[dict], None]
    ) -> dict:
        """Greedy; an answer ends with the first of the tokens `stop`. `tell` is told of every one that is finished."""
        from tqdm import tqdm
        from vllm import SamplingParams

        class Finished(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                tell({"working": n})
                return super().update(n)

        wanted = [
            SamplingParams(temperature=0.0, max_tokens=most, stop_token_ids=stop, ignore_eos=True, detokenize=False)
            for most in max_new_tokens
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(given, wanted, use_tqdm=Finished)
        return {"answers": [list(output.outputs[0].token_ids) for output in outputs]}


def end_with(processes: list) -> None:
    """End when one of these ends: vLLM waits for ever for an engine that was killed between two requests."""
    multiprocessing.connection.wait([process.sentinel for process in processes])
    time.sleep(1.0)  # for what they had to say
    print("vLLM's engine process has ended.", file=sys.stderr, flush=True)
    os._exit(1)


def directory_sums(directory: Path, dtype: str, shards: int) -> dict[str, int]:
    """What the sums over the shards of every parameter are when they hold a directory's weights, cast to `dtype`.

    Linears and embeddings are cut into shards; norms are on every one; keys and values on several when there are more
    shards than their heads. Rows that vLLM adds to a vocabulary are zero.
    """
    import torch
    from vllm_extension import bit_sum

    config = json.loads((directory / "config.json").read_text())
    key_copies = max(1, shards // (config.get("num_key_value_heads") or shards))
    found: dict[str, int] = {}
    for name, tensor in stored(directory):
        module = name.split(".")[-2]
        copies = shards if tensor.ndim == 1 else key_copies if module in ("k_proj", "v_proj") else 1
        name = name.replace(module, MERGED.get(module, module))
        found[name] = found.get(name, 0) + copies * bit_sum(tensor.to(getattr(torch, dtype)))
    if config.get("tie_word_embeddings"):
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return {name: value for name, value in found.items() if "rotary_emb" not in name}


def modulo(sums: dict[str, int]) -> dict[str, int]:
    """Sums of `bit_sum`s, which are modulo 2⁶⁴."""
    return {name: value % 2**64 for name, value in sums.items()}


def stored(directory: Path) -> Iterator[tuple[str, object]]:
    """Every tensor of a directory's safetensors files."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def requests() -> Iterator[dict]:
    """From stdin. When that ends, the parent has ended or wants an end: so do this process and vLLM's, at once."""
    lines: queue.Queue = queue.Queue()
    kill_members = runpy.run_path(str(HERE / "worker.py"))["kill_members"]

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        kill_members(os.getpgrp())
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    sys.path.append(str(HERE))  # last, for vllm_extension and for nothing that is found elsewhere
    try:
        serve(answers)
    except BaseException:
        traceback.print_exc(limit=-1)  # short: what an engine process said before is among the last lines, too
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit waits for vLLM's threads


def serve(answers: TextIO) -> None:
    def tell(line: dict) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    engine = None
    for request in requests():
        began = time.perf_counter()
        match request.pop("do"):
            case "start":
                engine = Engine(**request)
                answer = {}
            case "replace":
                answer = engine.replace(**request)
            case "sums":
                answer = engine.sums(**request)
            case "generate":
                answer = engine.generate(**request, tell=tell)
        tell({**answer, "seconds": time.perf_counter() - began})


if __name__ == "__main__":
    # The folder of this file has a vllm.py of its own.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    main()
