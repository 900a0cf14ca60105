"""Measures throughput and latency of Triton by concurrency, and its memory under load.

    python benchmarks/serving.py
    python benchmarks/serving.py --model=DeiTSmall --concurrency=1,4,16 --soak=600

The server that `make servers` installs serves the model for encoded images on the loopback
interface. savedmodels/client.py calls it from this process, so both share the machine.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras_tnt  # noqa: E402
from keras_tnt.export.verification import draw_picture  # noqa: E402
from tests.helpers.subprocess_helpers import ENVIRONMENT, Triton  # noqa: E402


def main():
    """Exports a model, serves it, and writes results and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="TNTSmall")
    parser.add_argument("--calls", type=int, default=100, help="at each concurrency")
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--soak", type=float, default=0, help="seconds of load to watch memory in")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving.json")
    options = parser.parse_args()
    if not (ENVIRONMENT / "ready").exists():
        sys.exit("serving.py: there is no .venv-servers; `make servers` builds it.")
    client = load_client()
    with tempfile.TemporaryDirectory() as folder:
        model = keras_tnt.create_model(options.model, weights=None)
        keras_tnt.export.triton(model, f"{folder}/repository", name="served", opset=23)
        with Triton(f"{folder}/repository", f"{folder}/server") as server:
            server.wait_for("served_bytes")
            kserve = client.KServeClient("127.0.0.1", server.http, "served_bytes", timeout=300)
            picture = [draw_picture(0)]
            rows = [
                client.benchmark(kserve.predict, picture, options.calls, int(number))
                for number in options.concurrency.split(",")
            ]
            found = {"model": options.model, "rows": rows}
            if options.soak:
                found["soak"] = soak(client, kserve, picture, server, options.soak)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    client.plot(rows, options.out.with_suffix(".png"))
    print(json.dumps(found, indent=1))


def load_client():
    """Imports savedmodels/client.py, which is not in a package."""
    path = ROOT / "savedmodels" / "client.py"
    spec = importlib.util.spec_from_file_location("client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def soak(client, kserve, picture, server, seconds):
    """Returns the images computed under load, eight calls at a time, and memory by minute."""
    start, images, held = time.monotonic(), 0, [server.memory()]
    while time.monotonic() - start < seconds:
        images += client.benchmark(kserve.predict, picture, 64, 8)["calls"]
        if time.monotonic() - start > 60 * len(held):
            held.append(server.memory())
    return {
        "seconds": seconds,
        "images": images,
        "MiB": [*map(round, held), round(server.memory())],
    }


if __name__ == "__main__":
    main()
