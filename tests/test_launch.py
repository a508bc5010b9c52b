"""The launch scripts: what they would run, what they run, and what they refuse."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
PROMPT = """--config.system_prompt=it's "quoted" $HOME $(date) `id` ü"""
CONFIG = ["--config=configs/phase2.py:qwen2.5-7b", PROMPT]
LAUNCHERS = {
    "local.sh": ["2"],
    "slurm.sbatch": [],
    "tpu_vm.sh": ["run"],
    "jobset.sh": ["--image=registry/etagent:1", "--claim=runs", "--tpu=tpu-v5-lite-podslice", "--topology=4x8"],
}
QUIET = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "TPU_", "CUDA_", "JAX_"))
} | {"JAX_PLATFORMS": "cpu"}  # fmt: skip


def launch(script: str, *arguments: str, **how) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "check": False, "cwd": ROOT, "env": QUIET, **how}
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], **how)


def dry_run(script: str, *arguments: str, **how) -> list[list[str]]:
    """The words of each command that would be run."""
    done = launch(script, *arguments, "--dry-run", **how)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def stand_in(folder: Path, name: str, code: str = "") -> dict[str, str]:
    """An environment in which the command `name` notes its words in `folder`/calls and then runs `code` in bash."""
    folder.mkdir(exist_ok=True)
    words = "import json, sys; print(json.dumps(sys.argv[1:]))"
    script = f'#!/usr/bin/env bash\n{sys.executable} -c "{words}" {name} "$@" >> {folder}/calls\n{code}\n'
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return {**QUIET, "PATH": f"{folder}:{os.environ['PATH']}"}


def calls(folder: Path) -> list[list[str]]:
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def job_set(*arguments: str) -> dict:
    done = launch("jobset.sh", *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    first, *text, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<'END'", "END")
    return yaml.safe_load("\n".join(text))


def workers(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_shell_scripts_are_clean():
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck is not None, "shellcheck is not installed: pip install -r requirements-test.txt"
    files = [*LAUNCH.iterdir(), *(ROOT / ".ci").iterdir()]
    scripts = [str(file.relative_to(ROOT)) for file in files if file.is_file() and file.read_text().startswith("#!")]
    flags = ["--external-sources", "--check-sourced", "--source-path=SCRIPTDIR"]
    done = subprocess.run([shellcheck, *flags, *scripts], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*LAUNCHERS, "sglang_server.sh", "sglang_router.sh"])
def test_every_launcher_has_help_with_examples(script):
    done = launch(script, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert "examples:" in done.stdout
    assert "--dry-run" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_launcher_hands_the_trainer_its_arguments_as_they_are(script):
    if script == "jobset.sh":
        command = workers(job_set(*LAUNCHERS[script], *CONFIG))["template"]["spec"]["containers"][0]["command"]
        command = [word.replace("$$(", "$(") for word in command]  # as Kubernetes does
    else:
        command = dry_run(script, *LAUNCHERS[script], *CONFIG)[
            {"local.sh": 2, "slurm.sbatch": 1, "tpu_vm.sh": 0}[script]
        ]
        if script == "tpu_vm.sh":  # the shell of the worker reads it once more
            command = shlex.split(command[-1].removeprefix("--command="))
    assert [word for word in command if word in CONFIG] == CONFIG


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cofnig=configs/phase2.py"], "unknown argument '--cofnig=configs/phase2.py'"),
        (["--config=configs/phase2.py", "--config.run=runs/x"], "the run directory is given by --run=DIR"),
        ([], "give a configuration"),
    ],
)
def test_every_launcher_refuses_what_it_does_not_know(script, arguments, sentence, tmp_path):
    done = launch(script, *LAUNCHERS[script], *arguments)
    assert done.returncode == 2
    assert f"{script}: {sentence}" in done.stderr
    assert done.stdout == ""


# --- local.sh ---


def test_local_starts_one_supervisor_over_processes_that_share_the_devices():
    cd, install, run = dry_run("local.sh", "2", "--devices=4", "--run=runs/my run", "--config=configs/sft.py")
    assert cd == ["cd", str(ROOT)]
    assert install == ["env", "REQUIREMENTS=requirements.txt", "bash", "-eu", "launch/environment.sh"]
    assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"} <= set(run[: run.index("-m")])
    supervisor, trainer = run[: run.index("--")], run[run.index("--") + 1 :]
    assert supervisor[-4:] == ["-m", "etagent_jax.supervise", "--processes=2", "--run=runs/my run"]
    assert trainer[1:] == ["-m", "etagent_jax.train", "--config=configs/sft.py", "--config.run=runs/my run"]


def test_local_deals_out_the_gpus(tmp_path):
    lines = "\n".join(f"echo 'GPU {i}: a GPU (UUID: …)'" for i in range(4))
    environment = stand_in(tmp_path, "nvidia-smi", lines)
    del environment["JAX_PLATFORMS"]
    _, install, run = dry_run("local.sh", "2", "--config=configs/sft.py", env=environment)
    assert "REQUIREMENTS=requirements.txt requirements-cuda.txt" in install
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in run
    assert not any(word.startswith("JAX_") for word in run)
    chosen = {**environment, "CUDA_VISIBLE_DEVICES": "1,3"}
    assert "CUDA_VISIBLE_DEVICES=1,3" in dry_run("local.sh", "2", "--config=configs/sft.py", env=chosen)[2]
    done = launch("local.sh", "3", "--config=configs/sft.py", env=environment)
    assert (done.returncode, "4 GPUs cannot be dealt out evenly to 3 processes" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["zero"], "the number of processes, which comes first, must be a whole number above 0, got 'zero'"),
        (["2", "3"], "unexpected argument '3'"),
        (["2", "--devices=3"], "3 devices cannot be dealt out evenly to 2 processes"),
    ],
)
def test_local_refuses_numbers_that_do_not_fit(arguments, sentence):
    done = launch("local.sh", *arguments, "--config=configs/sft.py")
    assert done.returncode == 2
    assert sentence in done.stderr


# --- slurm.sbatch ---


def test_slurm_runs_a_supervisor_in_every_task():
    cd, step, *_ = dry_run("slurm.sbatch", "--run=runs/big", "--config=configs/sft.py")
    assert cd == ["cd", str(ROOT)]
    assert step[0] == "srun"
    assert "--kill-on-bad-exit=1" in step
    inner = step[step.index(".venv/bin/python") :]
    assert inner[1:5] == ["-m", "etagent_jax.supervise", "--run=runs/big", "--"]
    assert inner[6:] == ["-m", "etagent_jax.train", "--config=configs/sft.py", "--config.run=runs/big"]


def test_slurm_asks_for_one_task_a_gpu_a_warning_and_another_turn():
    header = [line.split(maxsplit=1)[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
              if line.startswith("#SBATCH")]  # fmt: skip
    asked = dict(flag.removeprefix("--").partition("=")[::2] for flag in header)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"] == "B:USR1@120"
    assert "requeue" in asked


@pytest.fixture
def slurm_job(tmp_path):
    """A repository with a .venv, in a job whose srun runs until it is cancelled and then ends as a stopped run."""
    repository = tmp_path / "repository"
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (repository / "launch").symlink_to(LAUNCH)
    stubs = tmp_path / "stubs"
    stand_in(stubs, "scancel", f"touch {tmp_path}/cancelled")
    stand_in(stubs, "scontrol")
    wait = f"touch {tmp_path}/started; until [ -e {tmp_path}/cancelled ]; do sleep 0.05; done; exit 143"
    environment = stand_in(stubs, "srun", wait)
    return environment | {"SLURM_SUBMIT_DIR": str(repository), "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "6"}


def test_before_its_time_is_up_a_slurm_job_saves_and_goes_back_to_the_queue(slurm_job, tmp_path):
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "--config=configs/sft.py"]
    with subprocess.Popen(script, env=slurm_job, cwd=tmp_path) as job:
        while not (tmp_path / "started").exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
    assert job.returncode == 143
    srun, *others = calls(tmp_path / "stubs")
    assert srun[0] == "srun"
    assert "--cpus-per-task=6" in srun
    assert others == [["scancel", "--signal=TERM", "17"], ["scontrol", "requeue", "17"]]


def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(slurm_job, tmp_path):
    (tmp_path / "cancelled").touch()
    done = launch("slurm.sbatch", "--config=configs/sft.py", env=slurm_job)
    assert done.returncode == 143
    assert [call[0] for call in calls(tmp_path / "stubs")] == ["srun"]


def test_slurm_says_where_it_must_be_submitted(tmp_path):
    done = launch("slurm.sbatch", "--config=configs/sft.py", env={**QUIET, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert "is not the repository; submit from its root" in done.stderr
    done = launch("slurm.sbatch", "--config=configs/sft.py")
    assert done.returncode == 2
    assert "this is not a Slurm job; submit it" in done.stderr


# --- tpu_vm.sh ---


def test_every_tpu_command_names_the_slice_and_its_place():
    place = ["--name=seven", "--zone=us-west4-a", "--project=mine"]
    for arguments in (["create"], ["create", "--queued"], ["install"], ["run", "--config=c.py"], ["logs"], ["stop"],
                      ["delete"], ["delete", "--queued"]):  # fmt: skip
        for words in dry_run("tpu_vm.sh", *arguments, *place):
            if "gcloud" in words:
                assert "--zone=us-west4-a" in words
                assert "--project=mine" in words
                assert any(word.startswith("seven") for word in words)


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5litepod-32", "v2-alpha-tpuv5-lite"), ("v5p-64", "v2-alpha-tpuv5"),
     ("v6e-16", "v2-alpha-tpuv6e")],
)  # fmt: skip
def test_the_runtime_follows_from_the_type(accelerator, version):
    [words] = dry_run("tpu_vm.sh", "create", f"--type={accelerator}")
    assert {f"--accelerator-type={accelerator}", f"--version={version}"} <= set(words)
    [queued, _] = dry_run("tpu_vm.sh", "create", f"--type={accelerator}", "--queued", "--spot")
    assert {"queued-resources", f"--runtime-version={version}", "--node-id=etagent", "--spot"} <= set(queued)


def test_a_slice_that_is_there_is_used(tmp_path):
    environment = stand_in(tmp_path, "gcloud", "echo READY")
    assert "etagent is there already" in launch("tpu_vm.sh", "create", env=environment).stdout
    assert [call[4] for call in calls(tmp_path)] == ["describe"]
    environment = stand_in(tmp_path, "gcloud", '[ "$4" != describe ]')
    assert launch("tpu_vm.sh", "create", env=environment).returncode == 0
    assert [call[4] for call in calls(tmp_path)[1:]] == ["describe", "create"]


def test_workers_get_libtpu_and_the_shared_storage():
    *_, install = dry_run("tpu_vm.sh", "install", "--nfs=10.0.0.2:/share")
    assert "--worker=all" in install
    assert install[-1] == "--command=bash etagent_jax/launch/tpu_worker.sh install 10.0.0.2:/share"
    assert "requirements-tpu.txt" in (LAUNCH / "tpu_worker.sh").read_text()
    assert "jax[tpu]" in (ROOT / "requirements-tpu.txt").read_text()


def test_a_run_on_a_worker_outlives_the_connection_and_stops_at_sigterm(tmp_path):
    """The gcloud of this test runs what is sent to workers here, in another home."""
    home = tmp_path / "home"
    copy = home / "etagent_jax"
    shutil.copytree(LAUNCH, copy / "launch")
    (copy / ".venv" / "bin").mkdir(parents=True)
    trainer = """#!/usr/bin/env bash
    printf '%s\\n' "$@"
    trap 'echo saved; exit 143' TERM
    touch started
    while true; do sleep 0.05; done
    """
    (copy / ".venv" / "bin" / "python").write_text(trainer)
    (copy / ".venv" / "bin" / "python").chmod(0o755)
    here = f'cd {home}; for word in "$@"; do case "$word" in --command=*) bash -c "${{word#*=}}" ;; esac; done'
    environment = stand_in(tmp_path / "stubs", "gcloud", here) | {"HOME": str(home)}

    assert "started" in launch("tpu_vm.sh", "run", *CONFIG, env=environment).stdout
    while not (copy / "started").exists():
        time.sleep(0.05)
    again = launch("tpu_vm.sh", "run", *CONFIG, env=environment)
    assert (again.returncode, "a run is going on already" in again.stderr) == (1, True)
    assert "stopped" in launch("tpu_vm.sh", "stop", env=environment).stdout
    assert "no run is going on" in launch("tpu_vm.sh", "stop", env=environment).stdout
    said = (copy / "supervise.log").read_text().splitlines()
    assert said[:3] == ["-m", "etagent_jax.supervise", "--run=/mnt/runs/etagent"]
    assert said[-4:] == [*CONFIG, "--config.run=/mnt/runs/etagent", "saved"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["start"], "the first argument must be create, install, run, logs, stop or delete, got 'start'"),
        (["stop", "--config=configs/sft.py"], "--config=configs/sft.py is for run, not for stop"),
        (["create", "--type=v9-8"], "no runtime version is known for the type 'v9-8'"),
    ],
)
def test_tpu_vm_refuses_what_it_cannot_do(arguments, sentence):
    done = launch("tpu_vm.sh", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


# --- jobset.sh ---


def test_a_job_set_is_one_supervised_pod_for_each_host_of_the_slice():
    manifest = job_set(*LAUNCHERS["jobset.sh"], "--name=seven", *CONFIG)
    job = workers(manifest)
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert manifest["metadata"]["name"] == manifest["spec"]["network"]["subdomain"] == "seven"
    assert job["parallelism"] == job["completions"] == 8  # 32 chips, 4 a host
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert container["command"][:5] == ["python", "-m", "etagent_jax.supervise", "--run=/runs/seven", "--"]
    assert container["command"][-3:] == [
        "--coordinator=seven-workers-0-0.seven:8476", "--processes=8", "--process=$(JOB_COMPLETION_INDEX)"
    ]  # fmt: skip
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]


def test_a_job_set_starts_lost_pods_anew_and_gives_up_at_wrong_arguments():
    manifest = job_set(*LAUNCHERS["jobset.sh"], "--restarts=100", *CONFIG)
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 100
    assert manifest["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    job = workers(manifest)
    assert job["backoffLimit"] == 0
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # or the policy above would be refused


def test_a_job_set_on_gpus():
    flags = ["--image=i", "--claim=c", "--gpus=8", "--nodes=2", "--gpu-type=nvidia-h100-80gb", *CONFIG]
    job = workers(job_set(*flags))
    assert job["parallelism"] == 2
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert job["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    alone = workers(job_set("--image=i", "--claim=c", "--gpus=1", *CONFIG))["template"]["spec"]["containers"][0]
    assert not any("coordinator" in word for word in alone["command"])


def test_what_is_applied_is_what_the_dry_run_shows(tmp_path):
    environment = stand_in(tmp_path, "kubectl", f"cat > {tmp_path}/applied")
    assert launch("jobset.sh", *LAUNCHERS["jobset.sh"], *CONFIG, env=environment).returncode == 0
    assert calls(tmp_path) == [["kubectl", "apply", "-f", "-"]]
    assert yaml.safe_load((tmp_path / "applied").read_text()) == job_set(*LAUNCHERS["jobset.sh"], *CONFIG)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--claim=c", "--gpus=1"], "give the container image"),
        (["--image=i", "--gpus=1"], "give the persistent volume claim"),
        (["--image=i", "--claim=c"], "give either --tpu and --topology, or --gpus"),
        (["--image=i", "--claim=c", "--gpus=1", "--name=Seven"], "--name must be"),
        (["--image=i", "--claim=c", "--gpus=1", "--run=runs/x"], "--run must be below /runs"),
        (["--image=i", "--claim=c", "--tpu=t", "--topology=16"], "--topology must be like 4x8 or 2x2x4, got '16'"),
        (["--image=i", "--claim=c", "--tpu=t", "--topology=1x2"], "the 2 chips of 1x2 are not whole hosts of 4"),
    ],
)
def test_jobset_refuses_what_cannot_be_applied(arguments, sentence):
    done = launch("jobset.sh", *arguments, "--config=configs/sft.py")
    assert done.returncode == 2
    assert sentence in done.stderr
