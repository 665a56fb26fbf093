"""The child process that runs vLLM, in an interpreter that need not have JAX or this package.

Requests and answers are JSON lines; the "do" of a request says what to do. An exception ends the process, and the
parent shows its last lines.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import runpy
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
HEAD = "lm_head.weight"
FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
EXPERT = re.compile(r"experts\.\d+\.(\w+)\.weight$")
FUSED_EXPERTS = {  # vLLM's names for the linears of all experts of a layer
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "w13_weight"),
    **dict.fromkeys(("down_proj", "w2"), "w2_weight"),
}


class Engine:
    """vLLM with one model, whose weights can be replaced."""

    def __init__(self, directory: str, *, enforce_eager: bool | None, **options):
        """Load a model.

        Args:
          directory: of the model.
          enforce_eager: compile nothing; None compiles nothing on CPUs, where compiling takes longer than it saves.
          **options: arguments of `vllm.LLM`.
        """
        from vllm import LLM
        from vllm.platforms import current_platform

        eager = current_platform.is_cpu() if enforce_eager is None else enforce_eager
        self.llm = LLM(
            model=directory,
            enforce_eager=eager,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            generation_config="vllm",  # ignore the penalties and temperatures of the model's generation config
            worker_extension_cls="vllm_extension.Sums",
            disable_log_stats=True,
            seed=0,
            **options,
        )
        if engines := multiprocessing.active_children():
            threading.Thread(target=end_with, args=(engines,), daemon=True).start()

    def replace(self, directory: str) -> dict:
        """Load other weights in place, and forget the keys and values of the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": directory})
        self.llm.reset_prefix_cache()
        return {}

    def sums(self, directory: str) -> dict:
        """Return the `bit_sum` of every parameter: as vLLM uses it, and as the files of a directory hold it."""
        workers = self.llm.collective_rpc("weight_sums")
        dtype = workers[0][0]
        used: dict[str, int] = {}
        for _, sums in workers:
            for name, value in sums.items():
                if "experts.gate." not in name:  # the router, which has its own name as well
                    name = name.replace("routed_experts.", "")
                    used[name] = used.get(name, 0) + value
        in_files = directory_sums(Path(directory), dtype, len(workers), HEAD in used)
        return {"used": modulo(used), "stored": modulo(in_files)}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: list[int], stop: list[int], tell: Callable[[dict], None]
    ) -> dict:
        """Generate greedily.

        Args:
          prompts: of token ids.
          max_new_tokens: for each prompt.
          stop: tokens that end an answer, which keeps the first of them.
          tell: is called for every answer that is finished.
        """
        from tqdm import tqdm
        from vllm import SamplingParams

        class Finished(tqdm):
            def update(self, n: float | None = 1) -> bool | None:
                tell({"working": n})
                return super().update(n)

        parameters = [
            SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=stop, ignore_eos=True, detokenize=False)
            for limit in max_new_tokens
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=Finished)
        return {"answers": [list(output.outputs[0].token_ids) for output in outputs]}


def end_with(processes: list) -> None:
    """End when one of these processes ends: vLLM waits for ever for an engine that was killed between two requests."""
    multiprocessing.connection.wait([process.sentinel for process in processes])
    time.sleep(1.0)  # for their last lines to arrive
    print("vLLM's engine process has ended.", file=sys.stderr, flush=True)
    os._exit(1)


def directory_sums(directory: Path, dtype: str, shards: int, has_head: bool) -> dict[str, int]:
    """Return the sum over all shards of every parameter, as it should be with the weights of a directory.

    Each shard holds a part of every linear and of the embeddings, and every norm. A bias is divided as the rows of its
    linear are. Where there are more shards than heads of keys and values, several shards hold the same ones. Rows that
    vLLM adds to a vocabulary are zero.

    Args:
      directory: of the model.
      dtype: to which the weights are cast.
      shards: how many processes of vLLM share the model.
      has_head: has vLLM's model a head? Some families use a tied one as embeddings only.
    """
    import torch
    from vllm_extension import bit_sum

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    key_copies = max(1, shards // (config.get("num_key_value_heads") or shards))
    sums: dict[str, int] = {}
    for name, tensor in tensors_of(directory):
        module = name.split(".")[-2]
        whole = tensor.ndim == 1 and module not in FUSED
        copies = shards if whole else key_copies if module in ("k_proj", "v_proj") else 1
        expert = EXPERT.search(name)
        if expert:
            name = f"{name[: expert.start()]}experts.{FUSED_EXPERTS[expert[1]]}"
        else:
            name = name.replace(module, FUSED.get(module, module))
        sums[name] = sums.get(name, 0) + copies * bit_sum(tensor.to(getattr(torch, dtype)), bool(expert))
    if has_head and (config.get("tie_word_embeddings") or HEAD not in sums):
        sums[HEAD] = sums["model.embed_tokens.weight"]
    return {name: value for name, value in sums.items() if "rotary_emb" not in name}


def modulo(sums: dict[str, int]) -> dict[str, int]:
    """Reduce sums of several `bit_sum`s modulo 2⁶⁴."""
    return {name: value % 2**64 for name, value in sums.items()}


def tensors_of(directory: Path) -> Iterator[tuple[str, object]]:
    """Yield the name and the value of every tensor in a directory's safetensors files."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def requests() -> Iterator[dict]:
    """Yield the requests on stdin. When stdin ends, so has the parent, or it wants to: end this process and vLLM's."""
    lines: queue.Queue = queue.Queue()
    kill_members = runpy.run_path(str(HERE / "groups.py"))["kill_members"]

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        kill_members(os.getpgrp())
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def main() -> None:
    """Serve requests until stdin ends or an exception is raised."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process is the engine's: another starts slowly
    sys.path.append(str(HERE))  # for vllm_extension; last, so that no other file there hides a library
    try:
        serve(answers)
    except BaseException:
        traceback.print_exc(limit=-1)  # short: the parent shows only the last lines, also of an engine process
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit waits for vLLM's threads


def serve(answers: TextIO) -> None:
    """Carry out requests one after another and write the answers."""

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
    # The folder of this file has a vllm.py, which must not hide vLLM.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    main()
