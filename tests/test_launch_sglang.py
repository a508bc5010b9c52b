"""The launchers of SGLang and its router: what they would run, what they install, and how they watch over it."""

import contextlib
import http.server
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from etagent_jax.policy.sglang import SESSION_HEADER
from tests.servers import free_port
from tests.test_launch import LAUNCH, QUIET, ROOT, calls, dry_run, launch, stand_in

LAUNCHERS = {"sglang_server.sh": ["--cpu", "--model={model}"], "sglang_router.sh": ["--workers=http://a:1,http://b:2"]}
SERVER = """#!{python}
import http.server, os, socketserver, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    allow_reuse_address = True

if "importlib.metadata" in sys.argv[-1]:
    sys.exit(0)
print(" ".join(sys.argv[1:]), os.environ.get("PYTHONPATH"), flush=True)
if "--broken" in sys.argv:
    sys.exit("a flag that nobody knows")
if os.fork() == 0:  # as SGLang has processes of its own
    time.sleep(10000)
Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def arguments(script: str, model: Path) -> list[str]:
    return [word.format(model=model) for word in LAUNCHERS[script]]


def refusal(script: str, *arguments: str, **how) -> str:
    done = launch(script, *arguments, **how)
    assert done.returncode == 2
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_launcher_hands_on_what_follows_the_two_dashes(script, model, tmp_path):
    *_, run = dry_run(
        script, *arguments(script, model), f"--venv={tmp_path / 'my venv'}", "--dry-run", "--", "--x", "a b"
    )
    assert run[-3:-1] == ["--x", "a b"]


# --- sglang_server.sh ---


def test_on_a_cpu_torch_comes_first_and_sglang_without_what_it_asks_for(model, tmp_path):
    venv = tmp_path / "venv"
    make, torch, others, alone, run = dry_run("sglang_server.sh", "--cpu", f"--model={model}", f"--venv={venv}")
    assert make[1:] == ["-m", "venv", str(venv)]
    assert torch[-1] == "torch==2.13.0"
    assert "--no-deps" not in others
    assert {"transformers==5.19.0", "xgrammar==0.2.7"} < set(others)
    assert alone[-3:] == ["--no-deps", "sglang==0.5.23", "torchvision==0.15.2"]
    pinned = [line for line in (ROOT / "requirements-sglang-cpu.txt").read_text().splitlines() if line[:1] not in "#"]
    assert sorted(pinned) == sorted(
        [torch[-1], *others[others.index("--disable-pip-version-check") + 1 :], *alone[-2:]]
    )
    assert {"SGLANG_USE_CPU_ENGINE=1", "TORCHDYNAMO_DISABLE=1"} < set(run)
    assert run[run.index("--device") + 1] == "cpu"
    assert run[run.index("--model-path") + 1] == str(model)


def test_one_server_takes_all_visible_gpus(model, tmp_path):
    environment = stand_in(tmp_path / "stubs", "nvidia-smi", "\n".join(["echo 'GPU 0: a GPU (UUID: …)'"] * 4))
    flags = [f"--model={model}", "--host=0.0.0.0", "--port=31000", f"--venv={tmp_path / 'venv'}"]
    _, install, run = dry_run("sglang_server.sh", *flags, env=environment)
    assert install[-1] == "sglang==0.5.23"
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3" in run
    assert run[run.index("--tp") + 1] == "4"
    assert run[run.index("--host") + 1 : run.index("--host") + 4] == ["0.0.0.0", "--port", "31000"]
    assert "--device" not in run
    chosen = {**environment, "CUDA_VISIBLE_DEVICES": "2"}
    run = dry_run("sglang_server.sh", *flags, env=chosen)[-1]
    assert run[run.index("--tp") + 1] == "1"


def test_what_cannot_be_served_is_refused_before_anything_starts(model, tmp_path):
    assert "give the model's folder" in refusal("sglang_server.sh", "--cpu")
    assert "nowhere/config.json is not there" in refusal("sglang_server.sh", "--cpu", "--model=nowhere")
    assert "unknown argument '--tp=2'; the server's own" in refusal("sglang_server.sh", f"--model={model}", "--tp=2")
    assert "--port must be a whole number" in refusal("sglang_server.sh", f"--model={model}", "--cpu", "--port=http")
    none = {**QUIET, "PATH": "/usr/bin:/bin"}
    if not Path("/usr/bin/nvidia-smi").exists():
        assert "no NVIDIA GPU is here; --cpu serves without one" in refusal(
            "sglang_server.sh", f"--model={model}", env=none
        )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("sglang_server.sh", "--cpu", f"--model={model}", f"--port={port}")
    assert f"port {port} of 127.0.0.1 is in use" in said


def test_a_missing_interpreter_is_named(model, tmp_path):
    environment = {**QUIET, "PYTHON": "/nowhere/python3.11"}
    done = launch("sglang_server.sh", "--cpu", f"--model={model}", f"--venv={tmp_path / 'venv'}", env=environment)
    assert done.returncode != 0
    assert "no Python to make" in done.stderr
    assert "looked for /nowhere/python3.11" in done.stderr


def test_what_is_installed_once_is_not_installed_again(model, tmp_path):
    """The python of this test makes an environment of itself, and only notes what it is told to install."""
    venv = tmp_path / "venv"
    code = f"""case "$*" in
    "-m venv "*) mkdir -p {venv}/bin; cp "$0" {venv}/bin/python ;;
    *importlib.metadata*) exit 1 ;;
    *launch_server*) exit 7 ;;
    esac"""
    environment = stand_in(tmp_path / "stubs", "python3.11", code) | {"TMPDIR": str(tmp_path)}
    flags = ["--cpu", f"--model={model}", f"--venv={venv}", f"--port={free_port()}"]
    first, second = (launch("sglang_server.sh", *flags, env=environment) for _ in range(2))
    assert (first.returncode, second.returncode) == (1, 1)
    assert "the server died with status 7 before it was ready" in second.stderr
    installs = [call for call in calls(tmp_path / "stubs") if "install" in call]
    assert len(installs) == 3
    (venv / ".installed-sglang").write_text("an older list")
    launch("sglang_server.sh", *flags, env=environment)
    assert len([call for call in calls(tmp_path / "stubs") if "install" in call]) == 6


class Launcher:
    """sglang_server.sh over a stand-in for SGLang that answers at once and has a process of its own."""

    def __init__(self, model: Path, folder: Path, *flags: str, **environment: str):
        python = folder / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(SERVER.format(python=sys.executable))
        python.chmod(0o755)
        self.said = folder / "said"
        command = ["bash", str(LAUNCH / "sglang_server.sh"), "--cpu", f"--model={model}", f"--port={free_port()}"]
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                [*command, f"--venv={folder / 'venv'}", "--", *flags], stdout=out, stderr=subprocess.STDOUT,
                env={**QUIET, "TMPDIR": str(folder), **environment},
            )  # fmt: skip

    def wait_for(self, text: str, times: int = 1) -> None:
        while self.said.read_text().count(text) < times:
            assert self.process.poll() is None, self.said.read_text()
            time.sleep(0.05)

    def server(self) -> int:
        return int(self.said.read_text().rpartition("(process ")[2].split(",")[0])


def alive(group: int) -> list[int]:
    """The processes of a group, but for those that are dead and not yet buried."""
    listed = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_launcher_and_all_processes_of_the_server(model, tmp_path, end):
    launcher = Launcher(model, tmp_path, SGLANG_API_KEY="it's secret")
    launcher.wait_for(" serving ")
    group = launcher.server()
    assert len(alive(group)) == 2
    [key] = tmp_path.glob("*.yaml")
    assert key.read_text() == "api-key: 'it''s secret'\n"
    assert key.stat().st_mode & 0o077 == 0
    assert "secret" not in Path(f"/proc/{group}/cmdline").read_text()
    launcher.process.send_signal(end)
    assert launcher.process.wait() == 0
    assert alive(group) == []
    assert list(tmp_path.glob("*.yaml")) == []


def test_a_server_that_dies_is_started_again_until_it_dies_too_often(model, tmp_path):
    launcher = Launcher(model, tmp_path)
    for times in range(1, 6):
        launcher.wait_for(" serving ", times)
        group = launcher.server()
        os.kill(group, signal.SIGKILL)
        launcher.wait_for("the server died with status 137", times) if times < 5 else launcher.process.wait()
        assert alive(group) == []
    assert launcher.process.returncode == 1
    assert "the fifth time without a quiet minute: giving up" in launcher.said.read_text()


def test_a_server_that_never_becomes_ready_is_explained_and_not_tried_again(model, tmp_path):
    launcher = Launcher(model, tmp_path, "--broken")
    assert launcher.process.wait() == 1
    said = launcher.said.read_text()
    assert said.count("a flag that nobody knows") == 1
    assert "the server died with status 1 before it was ready" in said


def test_the_kernels_that_a_cpu_lacks_can_be_imported_and_not_called(monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH / "sglang_cpu")
    kernels = importlib.import_module("sgl_kernel")
    assert len(kernels.NAMES) == 8
    for name in kernels.NAMES:
        with pytest.raises(NotImplementedError, match=name):
            getattr(kernels, name)(1, key=2)


# --- sglang_router.sh ---


def test_the_router_keeps_a_trajectory_on_its_server(tmp_path):
    make, install, run = dry_run("sglang_router.sh", *LAUNCHERS["sglang_router.sh"], f"--venv={tmp_path / 'venv'}")
    assert make[1:] == ["-m", "venv", str(tmp_path / "venv")]
    assert install[-1] == "sglang-router==0.3.2"
    workers = run.index("--worker-urls")
    assert run[workers + 1 : workers + 3] == ["http://a:1", "http://b:2"]
    assert run[run.index("--policy") + 1] == "manual"


@contextlib.contextmanager
def worker(name: str) -> Iterator[str]:
    """The URL of a server that answers all with its name."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"model_path": "m", "name": name}).encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_behind_the_real_router_a_trajectory_stays_on_its_server():
    port, venv = free_port(), os.environ.get("SGLANG_ROUTER_VENV")
    url, body = f"http://127.0.0.1:{port}", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    with worker("one") as one, worker("two") as two, httpx.Client(base_url=url, trust_env=False) as client:

        def is_ready() -> bool:
            try:
                workers = client.get("/workers").json()["workers"]
            except httpx.TransportError:
                return False
            return [each["is_healthy"] for each in workers] == [True, True]

        def answers(session: str) -> set[str]:
            asked = [client.post("/generate", json=body, headers={SESSION_HEADER: session}) for _ in range(4)]
            return {answer.json()["name"] for answer in asked}

        command = ["bash", str(LAUNCH / "sglang_router.sh"), f"--workers={one},{two}", f"--port={port}"]
        with subprocess.Popen([*command, f"--venv={venv}"] if venv else command) as router:
            try:
                while not is_ready():
                    assert router.poll() is None
                    time.sleep(0.2)
                chosen = [answers(f"rollout/{number}") for number in range(12)]
            finally:
                router.terminate()
    assert all(len(names) == 1 for names in chosen)
    assert set.union(*chosen) == {"one", "two"}


def test_a_router_without_servers_is_refused():
    assert "give the servers" in refusal("sglang_router.sh")
    assert "'a:1' is no URL" in refusal("sglang_router.sh", "--workers=http://b:2,a:1")
