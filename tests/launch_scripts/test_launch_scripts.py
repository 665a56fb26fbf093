"""launch/: what each starter asks of its cluster, and what it gives to the program."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver
from command import launch
from families import fine_tuned, llama_config, random_weights, write_model
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from safetensors.numpy import load_file
from support import assert_same_bits

from dppa_jax import launch as program  # noqa: F401  defines the flags

ROOT = Path(__file__).parents[2]
STARTERS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix != ".md" and path.is_file())
GIVEN = ["--flagfile=a.cfg", "--tensor_rate=.*q_proj.*|it's $HOME=0", "--output=with space"]


def jobset() -> dict:
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def container() -> dict:
    [only] = pod()["containers"]
    return only


def pod() -> dict:
    return job()["template"]["spec"]


def job() -> dict:
    [replicated] = jobset()["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def value(flag: str) -> str:
    """Of a flag in the JobSet's arguments."""
    [found] = [text.split("=", 1)[1] for text in container()["args"] if text.startswith(f"--{flag}=")]
    return found


def program_flags(name: str) -> list[list[str]]:
    """The flags of dppa_jax in every command line of a starter, of its header and of its line in launch/README.md."""
    if name == "jobset.yaml":
        return [container()["args"]]
    text = re.sub(r"\\\n *#? *", "", (ROOT / "launch" / name).read_text() + (ROOT / "launch/README.md").read_text())
    after = {
        "local.py": r"local\.py [^\n]*?-- (.*)",
        "slurm.sh": r"slurm\.sh (--.*)",
        "tpu_pod.sh": r"tpu_pod\.sh run (--.*)",
    }
    shown = re.findall(after[name], text) + re.findall(r"-m dppa_jax\.launch (.*)", text)
    return [re.findall(r"--[^\s`\"…]+(?![^\s`\"])", line) for line in shown]  # without those of value …


@pytest.mark.parametrize("name", STARTERS)
def test_flags_and_flagfiles_of_starters_exist(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = program_flags(name)
    assert any("--output=" in flag for line in shown for flag in line)
    for line in shown:
        given = [flag.replace("$(JOB_COMPLETION_INDEX)", "0") for flag in line]
        with flagsaver.flagsaver():
            flags.FLAGS(["dppa_jax.launch", *given])  # raises for what does not exist


@pytest.mark.parametrize("name", STARTERS)
def test_starters_say_how_they_are_used(name):
    head = (ROOT / "launch" / name).read_text()[:2500]
    for what in ("Hardware: ", "How to start: ", "What to edit: "):
        assert what in head
    assert f"| `{name}` |" in (ROOT / "launch/README.md").read_text()


@pytest.mark.parametrize("name", [name for name in STARTERS if name.endswith(".sh")])
def test_shellcheck_finds_nothing(name):
    checker = Path(sys.executable).parent / "shellcheck"
    checked = subprocess.run([checker, "--norc", ROOT / "launch" / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_jobset_is_of_the_published_api():
    """Types are checked on reading; a field that the API does not have would be lost."""
    given = jobset()
    assert JobsetV1alpha2JobSet.from_dict(given).to_dict() == given
    assert (given["apiVersion"], given["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_jobset_has_a_process_a_pod_and_the_first_is_the_coordinator():
    given = jobset()
    [replicated] = given["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    assert job()["completionMode"] == "Indexed"
    assert job()["parallelism"] == job()["completions"] == int(value("num_processes"))
    name = given["metadata"]["name"]
    assert value("coordinator").split(":")[0] == f"{name}-{replicated['name']}-0-0.{name}"
    assert "subdomain" not in given["spec"]["network"]  # it is the JobSet's name then
    assert container()["resources"]["limits"]["nvidia.com/gpu"] > 0


def test_jobset_starts_all_processes_again_when_one_fails():
    assert jobset()["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job()["backoffLimit"] == 0
    assert pod()["restartPolicy"] == "Never"


def test_jobset_keeps_output_and_workdir_on_the_shared_volume():
    [mount], [volume] = container()["volumeMounts"], pod()["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"]
    for flag in ("output", "workdir"):
        assert value(flag).startswith(f"{mount['mountPath']}/")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(NAME, SCRIPT): a command that notes its arguments, which `calls` of the result has, and runs SCRIPT."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, script: str = "") -> Path:
        command, log = tmp_path / name, tmp_path / f"{name}.log"
        command.write_text(f'#!/bin/bash\n{{ printf "%s\\0" "$@"; echo; }} >> "{log}"\n{script}\n')
        command.chmod(0o755)
        return log

    return make


def calls(log: Path) -> list[list[str]]:
    return [line.split("\0")[:-1] for line in re.split(r"(?<=\0)\n", log.read_text())[:-1]]


@pytest.fixture
def slurm(monkeypatch):
    """What Slurm sets for the batch script."""
    for name, number in {"JOB_ID": "42", "CPUS_PER_TASK": "3", "GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", number)
    return ["bash", str(ROOT / "launch" / "slurm.sh"), *GIVEN]


def test_jobset_takes_the_secret_that_its_head_makes():
    [given] = container()["env"]
    head = (ROOT / "launch" / "jobset.yaml").read_text()
    name, key = re.search(r"\| kubectl create secret generic (\S+) --from-file=(\S+)=/dev/stdin", head).groups()
    reference = {"secretKeyRef": {"name": name, "key": key}}
    assert given == {"name": "DPPA_JAX_SECRET", "valueFrom": reference}


def test_slurm_gives_all_processes_a_secret_of_this_start_that_no_command_line_shows(slurm, stand_in, tmp_path):
    log = stand_in("srun", f'echo "$DPPA_JAX_SECRET" >> "{tmp_path}/secrets"')
    assert [subprocess.run(slurm).returncode for _ in range(2)] == [0, 0]
    secrets = (tmp_path / "secrets").read_text().split()
    assert len(set(secrets)) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets)
    assert all("--export=ALL" in call and not set(secrets) & set(call) for call in calls(log))


def test_slurm_starts_a_process_a_host_with_all_its_gpus(slurm, stand_in, tmp_path):
    log = stand_in("srun", f'echo "$JAX_LOCAL_DEVICE_IDS" > "{tmp_path}/devices"; exit 5')
    assert subprocess.run(slurm).returncode == 5
    [call] = calls(log)
    assert call[call.index("python") :] == ["python", "-m", "dppa_jax.launch", "--coordinator=auto", *GIVEN]
    assert "--cpus-per-task=3" in call
    assert (tmp_path / "devices").read_text() == "0,1,2,3\n"
    options = re.findall(r"^#SBATCH --(\S+)", Path(slurm[1]).read_text().split("\nset ")[0], re.MULTILINE)
    assert {"ntasks-per-node=1", "requeue", "open-mode=append", "signal=B:USR1@120"} <= set(options)


def test_slurm_job_goes_back_to_the_queue_before_its_time_is_over(slurm, stand_in):
    stand_in("srun", "echo started; exec sleep 30")
    log = stand_in("scontrol")
    with subprocess.Popen(slurm, stdout=subprocess.PIPE, start_new_session=True) as batch:
        assert batch.stdout.readline() == b"started\n"
        batch.send_signal(signal.SIGUSR1)
        batch.wait(timeout=10)
        os.killpg(batch.pid, signal.SIGKILL)  # as Slurm does
    assert calls(log) == [["requeue", "42"]]


def tpu_pod(*command: str) -> int:
    return subprocess.run(["bash", "launch/tpu_pod.sh", *command], cwd=ROOT, timeout=30).returncode


def test_tpu_pod_runs_the_same_flags_on_all_hosts(stand_in):
    log = stand_in("gcloud", "exit 7")
    assert tpu_pod("run", *GIVEN) == 7
    [call] = calls(log)
    assert call[:4] == ["compute", "tpus", "tpu-vm", "ssh"]
    assert "--worker=all" in call
    [remote] = [argument.removeprefix("--command=") for argument in call if argument.startswith("--command=")]
    words = shlex.split(remote)
    start = words.index("dppa_jax.launch")
    assert words[start + 1 : words.index("2>&1")] == ["--coordinator=auto", *GIVEN]
    assert words[words.index("set") :][:3] == ["set", "-o", "pipefail;"]


def test_tpu_pod_waits_for_its_slice_and_says_when_none_comes(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    stand_in("sleep")
    answers = '[[ $4 == create ]] || { echo >> "$COUNT"; '
    log = stand_in("gcloud", answers + '[[ $(wc -l < "$COUNT") == 3 ]] && echo ACTIVE || echo PROVISIONING; }')
    assert tpu_pod("create") == 0
    assert [call[3] for call in calls(log)] == ["create", *["describe"] * 3]
    stand_in("gcloud", "[[ $4 == create ]] || echo FAILED")
    assert tpu_pod("create") == 1


def test_tpu_pod_installs_the_repository_on_all_hosts_and_deletes_the_slice(stand_in):
    log = stand_in("gcloud")
    assert (tpu_pod("install"), tpu_pod("delete")) == (0, 0)
    copied, _, installed, deleted = calls(log)
    assert copied[3:4] == ["scp"]
    assert "--worker=all" in copied
    assert "--worker=all" in installed
    assert "./dppa_jax" in installed[-1]
    assert deleted[:4] == ["compute", "tpus", "queued-resources", "delete"]
    zones = {argument for call in (copied, installed, deleted) for argument in call if argument.startswith("--zone=")}
    assert len(zones) == 1
    assert tpu_pod("destroy") == 2


def test_tpu_pod_copies_a_secret_that_no_command_line_shows(stand_in, tmp_path):
    secret = tmp_path / "copied"
    log = stand_in("gcloud", f'[[ "$6" == *.secret ]] && cp --preserve=mode "$5" "{secret}"; exit 0')
    assert (tpu_pod("install"), tpu_pod("run")) == (0, 0)
    assert re.fullmatch("[0-9a-f]{64}", secret.read_text())
    assert secret.stat().st_mode & 0o777 == 0o600
    *_, run = calls(log)
    assert 'DPPA_JAX_SECRET="$(cat ~/dppa_jax.secret)" && export DPPA_JAX_SECRET &&' in run[-1]
    assert secret.read_text() not in log.read_text()


@pytest.mark.parametrize("name", STARTERS)
def test_what_starters_fetch_and_run_has_a_checksum(name):
    text = (ROOT / "launch" / name).read_text()
    assert not re.search(r"(curl|wget)\b|\|\s*(sudo\s+)?(ba)?sh\b", text)
    for line in re.findall(r"pip install .*--target.*", text):
        assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(line.split())


LOCAL = """
import os, sys
sys.path.insert(0, {folder!r})
import local
local.GRACE_SECONDS = 1
sys.exit(local.run([["sh", "-c", command] for command in sys.argv[1:]], dict(os.environ)))
"""


def at_the_same_time(*commands: str) -> subprocess.Popen:
    """Shell commands as the processes of the local starter, which gives them a second when one fails."""
    script = LOCAL.format(folder=str(ROOT / "launch"))
    return subprocess.Popen([sys.executable, "-c", script, *commands], stdout=subprocess.PIPE, text=True)


def test_local_starter_lets_the_others_say_why_they_end_and_gives_the_first_failure():
    run = at_the_same_time("exit 3", "sleep 0.4; echo process 0 failed; exit 4", "echo asleep; exec sleep 60")
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 3
    assert sorted(said.splitlines()) == ["[1] process 0 failed", "[2] asleep"]


def test_local_starter_hands_signals_on():
    run = at_the_same_time("trap 'echo cleaned up; exit 130' INT; echo ready; while :; do sleep 0.1; done")
    assert run.stdout.readline() == "[0] ready\n"
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert (run.returncode, said) == (130, "[0] cleaned up\n")


def test_local_starter_gives_its_processes_a_secret_of_this_start(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    local, given = importlib.import_module("local"), []
    monkeypatch.setattr(local, "run", lambda commands, environment: given.append((commands, environment)) or 0)
    assert [local.main(["--processes=2"]) for _ in range(2)] == [0, 0]
    secrets = [environment["DPPA_JAX_SECRET"] for _, environment in given]
    assert len(set(secrets)) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets)
    assert not any(secret in str(commands) for commands, _ in given for secret in secrets)


@pytest.mark.slow
def test_local_starter_merges_to_the_same_bits_as_one_process(tmp_path):
    config = llama_config()
    base = random_weights(config)
    given = [
        f"--base={write_model(tmp_path / 'base', config, base)}",
        "--method=dppa",
        "--rate=0.8",
        "--factors=1.8,1.3",
    ]
    for seed, name in enumerate(("math", "law"), start=1):
        given.append(f"--expert={name}={write_model(tmp_path / name, config, fine_tuned(base, seed))}")
    starter = [sys.executable, ROOT / "launch" / "local.py", "--processes=2", "--devices=2", "--"]
    where = [f"--output={tmp_path / 'two'}", f"--workdir={tmp_path / 'runs'}"]
    run = subprocess.run([*starter, *given, *where], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert {line[:4] for line in run.stdout.splitlines()} == {"[0] ", "[1] "}
    launch(*given, f"--output={tmp_path / 'one'}", f"--workdir={tmp_path / 'runs'}")
    assert_same_bits(tensors(tmp_path / "two"), tensors(tmp_path / "one"))


def tensors(model: Path) -> dict:
    return {name: array for file in model.glob("*.safetensors") for name, array in load_file(file).items()}
