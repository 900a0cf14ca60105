"""KerasCV's layers as functions of a seed, and in a run that is interrupted and resumed.

Importing KerasCV modifies Keras, so tests that need it run in a separate process.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from training import keras_cv_augmentation

ROOT = Path(__file__).parent.parent.parent
FUNCTIONS = ("uniform", "normal", "gamma", "shuffle", "get_global_generator")

COMMAND = """
import os, signal, sys
import numpy as np
from safetensors.numpy import load_file
from training import train
from absl import flags

FLAGS = ("--augmentation=keras_cv", "--randaugment", "--erasing=0.5", "--mixup=0.8", "--cutmix=1",
         "--batch_size=8", "--steps_per_epoch=3", "--epochs=2", "--evaluate_epochs=2",
         "--notensorboard", "--checkpoint_steps=100")

def run(workdir):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train.py", *FLAGS, f"--workdir={workdir}"])
    return train.main([])

from training import loop, models
models.TNT_DIGITS |= {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2}
root = sys.argv[1]
assert not run(root + "/undisturbed")
update = loop.Run.update
seen = []

def stopping(self, batch, step):
    seen.append(batch)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, batch, step)

loop.Run.update = stopping
assert run(root + "/stopped") == 143
loop.Run.update = update
assert not run(root + "/stopped")
states = [load_file(f"{root}/{name}/checkpoints/step_000000006.safetensors")
          for name in ("undisturbed", "stopped")]
for name, value in states[0].items():
    np.testing.assert_array_equal(states[1][name], value, err_msg=name)
images, labels = (np.concatenate([batch[key] for batch in seen]) for key in ("image", "label"))
assert images.shape == (32, 32, 32, 3) and -0.01 < images.min() and images.max() < 255.01
np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-5)
assert 0 < (labels.max(axis=1) < 1).mean()
print("the same to the bit")
"""


def test_draws_depend_on_the_seed_and_their_order():
    def draw(seed):
        with keras_cv_augmentation.draws_from(tf.constant(seed)):
            generator = tf.random.get_global_generator()
            return [
                tf.random.uniform((500,)),
                tf.random.uniform((500,)),
                generator.uniform((500,), 3, 9, tf.int32),
                tf.random.normal((500,), 5.0, 2.0),
                tf.random.gamma((500,), 3.0),
                tf.random.shuffle(tf.range(500)),
            ]

    originals = [getattr(tf.random, name) for name in FUNCTIONS]
    first, again, other = (np.array(draw(seed)) for seed in ([1, 2], [1, 2], [1, 3]))
    assert [getattr(tf.random, name) for name in FUNCTIONS] == originals
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and all((first[i] != other[i]).any() for i in range(6))
    assert first[2].min() == 3 and first[2].max() == 8
    assert abs(first[3].mean() - 5) < 0.4 and abs(first[3].std() - 2) < 0.3
    assert abs(first[4].mean() - 3) < 0.4
    assert sorted(first[5]) == list(range(500))


def test_random_functions_are_restored_after_an_error():
    original = tf.random.uniform
    with pytest.raises(RuntimeError), keras_cv_augmentation.draws_from(tf.constant([0, 0])):
        raise RuntimeError
    assert tf.random.uniform is original


@pytest.mark.slow
def test_resumed_run_is_bit_identical(tmp_path):
    command = [sys.executable, "-c", COMMAND, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert "the same to the bit" in result.stdout, result.stdout[-2000:] + result.stderr[-3000:]
