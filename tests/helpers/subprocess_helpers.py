"""Real servers on the loopback interface, from the environment that `make servers` builds."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-servers"
PYTHON = ENVIRONMENT / "bin" / "python"
PATIENCE = 120  # seconds for a server to start on a busy machine

# Marks of every module of server tests.
marks = [
    pytest.mark.one_backend,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / "ready").exists(), reason="no .venv-servers: `make servers` builds it"
    ),
]


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """A server process that logs to a file; subclasses define `command`.

    Args:
        repository: model repository.
        folder: directory for the server's files.
    """

    def __init__(self, repository, folder):
        self.repository, self.folder = Path(repository), Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.http, self.grpc, self.metrics = free_ports(3)
        # Passes only these variables of the environment, in particular no proxy settings.
        kept = ("PATH", "HOME", "XDG_CACHE_HOME", "TMPDIR", "LANG")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment["PATH"] = f"{ENVIRONMENT / 'bin'}:{self.environment['PATH']}"

    def __enter__(self):
        self.log = self.folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def wait_for(self, model, version=1):
        """Waits until a version of a model is ready."""
        end = time.monotonic() + PATIENCE
        while not self.answers(f"/v2/models/{model}/versions/{version}/ready"):
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            assert time.monotonic() < end, self.log.read_text(errors="replace")
            time.sleep(0.1)
        return self

    def answers(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def memory(self):
        """Returns the resident memory of the server's processes in MiB."""
        listed = subprocess.run(
            ["ps", "-o", "rss=", "-s", str(self.process.pid)], capture_output=True, text=True
        )
        return sum(map(int, listed.stdout.split())) / 1024


class Triton(Server):
    """The server bundled with nvidia-pytriton, polling its repository every second.

    It includes only Triton's Python backend: models of the ONNX Runtime backend are not served.
    """

    def command(self):
        ask = "import sys, sysconfig; print(*sys.version_info[:2], sep='.'); "
        ask += "print(sysconfig.get_path('purelib')); print(sysconfig.get_config_var('LIBDIR'))"
        told = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True)
        version, packages, libraries = told.stdout.split("\n")[:3]
        parts = Path(packages) / "pytriton" / "tritonserver"
        backend = self.folder / "backends" / "python"
        if not backend.exists():
            shutil.copytree(parts / "backends" / "python", backend)
            stub = "triton_python_backend_stub"
            shutil.copy(parts / "python_backend_stubs" / version / stub, backend)
        self.environment["LD_LIBRARY_PATH"] = f"{packages}/nvidia_pytriton.libs:{libraries}"
        return [
            str(parts / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            f"--backend-directory={backend.parent}",
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            "--exit-on-error=false",
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http}",
            f"--grpc-port={self.grpc}",
            f"--metrics-port={self.metrics}",
        ]


class MLServer(Server):
    def command(self):
        self.environment |= {
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_HTTP_PORT": str(self.http),
            "MLSERVER_GRPC_PORT": str(self.grpc),
            "MLSERVER_METRICS_PORT": str(self.metrics),
        }
        return [str(ENVIRONMENT / "bin" / "mlserver"), "start", str(self.repository)]


class Asker:
    """A tritonclient in a process of the servers' Python: `http_client_helpers.py`."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [PYTHON, Path(__file__).parent / "http_client_helpers.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.process.communicate(timeout=60)

    def __call__(self, function, **arguments):
        self.process.stdin.write(json.dumps([function, arguments]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]
