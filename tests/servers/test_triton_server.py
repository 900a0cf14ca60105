"""A real tritonserver serves the repository of `keras_tnt.export.triton`, also to the client."""

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.export.verification import draw_picture
from tests.helpers.serving_client import client
from tests.helpers.subprocess_helpers import ROOT, Asker, Triton, marks

pytestmark = marks
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnü"]
TOLERANCE = 1e-5  # absolute, of probabilities, between the server and Keras


def build(seed):
    keras.utils.set_random_seed(seed)
    model = keras_tnt.TNT(
        input_shape=(32, 32, 3), outer_dim=16, inner_dim=8, depth=2, outer_heads=2, inner_heads=2,
        class_names=NAMES, name="tiny",
    )  # fmt: skip
    head = model.get_layer("head")
    head.kernel.assign(100 * keras.ops.convert_to_numpy(head.kernel))  # distinct probabilities
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Yields (model, server); the queue delay is long enough to batch concurrent requests."""
    folder = tmp_path_factory.mktemp("triton")
    model = build(0)
    keras_tnt.export.triton(model, folder / "repository", max_queue_delay=0.1)
    with Triton(folder / "repository", folder / "server") as server:
        yield model, server.wait_for("tiny_bytes")


@pytest.fixture(scope="module")
def asker():
    with Asker() as asker:
        yield asker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(5):
        (folder / f"{seed}.img").write_bytes(draw_picture(30 + seed))
    return sorted(map(str, folder.iterdir()))


def expected(model, pictures):
    return model.predict(keras_tnt.load_images(pictures, model), verbose=0)


def ask(server, *arguments):
    named = ["--model=tiny_bytes", "--protocol=kserve", f"--port={server.http}", "--timeout=60"]
    client.main([*map(str, arguments), *named])


def test_triton_protocol_buffer_parses_the_configurations(served, asker):
    _, server = served
    images, encoded = (
        asker("configuration", path=str(server.repository / name / "config.pbtxt"))
        for name in ("tiny", "tiny_bytes")
    )
    assert (images["name"], images["backend"]) == ("tiny", "onnxruntime")
    assert (encoded["name"], encoded["backend"]) == ("tiny_bytes", "python")
    assert images["input"] == [
        {"name": "images", "data_type": "TYPE_FP32", "dims": ["32", "32", "3"]}
    ]
    assert [output["name"] for output in images["output"]] == ["probabilities", "logits"]
    assert images["output"][0]["label_filename"] == "labels.txt"
    for config in (images, encoded):
        assert config["max_batch_size"] == 8
        assert config["dynamic_batching"] == {"max_queue_delay_microseconds": "100000"}
        assert [group["count"] for group in config["instance_group"]] == [1]
        assert [sample["batch_size"] for sample in config["model_warmup"]] == [1, 8]


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_predictions_match_keras(kind, served, asker, pictures):
    model, server = served
    answer = asker("classify", kind=kind, address=f"127.0.0.1:{getattr(server, kind)}",
                   model="tiny_bytes", pictures=pictures)  # fmt: skip
    probabilities = expected(model, pictures)
    np.testing.assert_allclose(answer["probabilities"], probabilities, atol=TOLERANCE)
    best = np.argsort(-probabilities, axis=-1)[:, :5]
    assert answer["classes"] == [[NAMES[i] for i in row] for row in best]
    np.testing.assert_allclose(
        answer["scores"], np.take_along_axis(probabilities, best, -1), atol=TOLERANCE
    )


def test_concurrent_requests_are_batched(served, asker, pictures):
    model, server = served
    address = f"127.0.0.1:{server.http}"
    before = asker("statistics", address=address, model="tiny_bytes")
    answers = asker("classify", kind="http", address=address, model="tiny_bytes",
                    pictures=pictures[:1], together=24)  # fmt: skip
    after = asker("statistics", address=address, model="tiny_bytes")
    inferences, executions = (
        int(after[name]) - int(before[name]) for name in ("inference_count", "execution_count")
    )
    assert inferences == 24
    assert executions < 24
    assert max(int(entry["batch_size"]) for entry in after["batch_stats"]) > 1
    for answer in answers:
        np.testing.assert_allclose(
            answer["probabilities"], expected(model, pictures[:1]), atol=TOLERANCE
        )


def test_broken_image_fails_only_its_own_request(served, asker, pictures, tmp_path):
    model, server = served
    broken = tmp_path / "broken.img"
    broken.write_bytes(draw_picture(30)[:100])
    with pytest.raises(RuntimeError, match="Image 1 of the batch cannot be read as an image"):
        asker("classify", kind="grpc", address=f"127.0.0.1:{server.grpc}", model="tiny_bytes",
              pictures=[pictures[0], str(broken)])  # fmt: skip

    def one(path):
        found = []
        with contextlib.suppress(client.ServerError):
            kserve = client.KServeClient("127.0.0.1", server.http, "tiny_bytes", timeout=60)
            found = kserve.predict([Path(path).read_bytes()])
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, [pictures[0], broken] * 8))
    assert found[1::2] == [[]] * 8
    best = NAMES[expected(model, pictures[:1]).argmax()]
    assert [rows[0][0][0] for rows in found[::2]] == [best] * 8


def test_client_uses_the_kserve_protocol(served, pictures, capsys):
    model, server = served
    ask(server, *pictures, "--json")
    rows = json.loads(capsys.readouterr().out)
    for path, probabilities in zip(pictures, expected(model, pictures), strict=True):
        assert [name for name, _ in rows[path]] == [
            NAMES[i] for i in np.argsort(-probabilities)[:5]
        ]
        np.testing.assert_allclose(rows[path][0][1], probabilities.max(), atol=TOLERANCE)
    ask(server, "--call=metadata")
    assert json.loads(capsys.readouterr().out) == {
        "inputs": {"image_bytes": "BYTES (batch, 1)"},
        "outputs": {
            "classes": "BYTES (batch, 5)",
            "probabilities": "FP32 (batch, 7)",
            "scores": "FP32 (batch, 5)",
        },
    }
    ask(server, "--call=status")
    assert json.loads(capsys.readouterr().out)["1"] == "READY"
    ask(server, *pictures[:2], "--benchmark=6", "--concurrency=1,3", "--batch=2")
    assert [row["concurrency"] for row in json.loads(capsys.readouterr().out)] == [1, 3]


def test_refused_request_is_a_one_line_client_error(served, pictures):
    _, server = served

    def refused(*arguments):
        with pytest.raises(client.ServerError) as caught:
            client.main([pictures[0], "--timeout=60", *arguments])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    kserve = ["--protocol=kserve", f"--port={server.http}"]
    assert "version 7" in refused("--model=tiny_bytes", "--version=7", *kserve)
    for protocol, port in (("rest", server.http), ("grpc", server.grpc), ("kserve", server.grpc)):
        said = refused("--model=tiny_bytes", f"--protocol={protocol}", f"--port={port}")
        assert "--protocol=rest or grpc asks TF Serving, kserve Triton or MLServer" in said
    done = subprocess.run(
        [sys.executable, ROOT / "savedmodels" / "client.py", pictures[0], "--model=no", *kserve],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "unknown model: 'no'" in done.stderr


def test_new_version_is_served_under_load_without_errors(served, pictures):
    model, server = served
    newer = build(1)
    answers, errors, stop = [], [], threading.Event()
    kserve = client.KServeClient("127.0.0.1", server.http, "tiny_bytes", timeout=60)
    picture = Path(pictures[0]).read_bytes()

    def keep_asking():
        while not stop.is_set():
            try:
                answers.append(kserve.predict([picture])[0][0])
            except client.ServerError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        keras_tnt.export.triton(newer, server.repository)
        server.wait_for("tiny_bytes", 2)
        time.sleep(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    old, new = (expected(m, pictures[:1])[0] for m in (model, newer))
    assert errors == []
    kinds = []
    for name, score in answers:
        fits = [abs(p[NAMES.index(name)] - score) < TOLERANCE for p in (old, new)]
        assert any(fits), (name, score)
        kinds.append(fits.index(True))
    assert kinds[0] == 0 and kinds[-1] == 1


def test_memory_is_bounded_in_a_soak_test(served, pictures):
    """Runs for KERAS_TNT_SOAK seconds. Defaults to 10."""
    _, server = served
    seconds = float(os.environ.get("KERAS_TNT_SOAK", 10))
    kserve = client.KServeClient("127.0.0.1", server.http, "tiny_bytes", timeout=60)
    batch = [Path(path).read_bytes() for path in pictures]
    measured = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.benchmark(kserve.predict, batch, 20, 4)
        measured.append(server.memory())
    print(f"{20 * len(measured) * len(batch)} images in {seconds} s, MiB: {measured}")
    # Permanent allocations happen in the first quarter; afterwards memory must not grow.
    settled = measured[len(measured) // 4]
    assert max(measured) < 1.1 * settled + 32


def test_shutdown_under_load_completes_accepted_requests(tmp_path, pictures):
    model = build(0)
    keras_tnt.export.triton(model, tmp_path / "repository", name="last", instances=2)
    picture = Path(pictures[0]).read_bytes()
    best = NAMES[expected(model, pictures[:1]).argmax()]
    asked = []  # (start time, whether the answer is right, or the error message)

    with Triton(tmp_path / "repository", tmp_path / "server") as server:
        server.wait_for("last_bytes")
        kserve = client.KServeClient("127.0.0.1", server.http, "last_bytes", timeout=60)
        stopped = threading.Event()

        def keep_asking():
            while not stopped.is_set():
                start = time.monotonic()
                try:
                    asked.append((start, kserve.predict([picture] * 4)[0][0][0] == best))
                except client.ServerError as error:
                    asked.append((start, str(error)))
                    time.sleep(0.01)

        threads = [threading.Thread(target=keep_asking) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        server.process.terminate()
        told = time.monotonic()
        assert server.process.wait(60) == 0
        stopped.set()
        for thread in threads:
            thread.join()
    before = [answer for start, answer in asked if start < told - 0.2]
    after = [answer for start, answer in asked if start > told]
    assert len(before) > 8
    assert set(before) == {True}, set(before)
    # Later requests are either answered correctly or get an error.
    assert all(answer is True or "server" in str(answer) for answer in after), set(after)
