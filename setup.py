"""Packaging of keras_tnt, with an extra for each optional feature."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Parsed, because importing keras_tnt needs Keras, which build environments do not have.
VERSION = re.search(
    r'^__version__ = "([^"]+)"$',
    (ROOT / "keras_tnt" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

TENSORFLOW = ["tensorflow>=2.20,<3"]  # first version with tf.io.decode_webp
JAX = ["jax>=0.8.1,<1"]
TORCH = ["torch>=2.6,<3"]
IMAGES = ["pillow>=11"]
PARQUET = ["pyarrow>=16"]
HUGGINGFACE = ["datasets>=4,<6"]
PLOTS = ["matplotlib>=3.9,<4", *IMAGES]
TRAIN = [
    *TENSORFLOW,
    "absl-py>=2.1,<3",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources>=6",  # tensorflow-datasets 4.9 imports it without requiring it
    "keras-cv==0.9.*",
    *PARQUET,
    "scikit-learn>=1.5,<2",
    *PLOTS,
    "tensorboard>=2.20,<3",  # implements tf.summary.scalar
    "tqdm>=4.66,<5",  # the progress bar on a terminal
    "grpcio>=1.68,<2",  # checks that a tf.data service is running
    "pyyaml>=6",  # --config
]
# Experiment trackers for --logger. They pin older packages than the tests use: not in `test`;
# `make trackers` tests them.
WANDB = ["wandb>=0.17,<1"]
MLFLOW = ["mlflow>=2.14,<4"]
# Detection and segmentation heads, and the metrics and plots of their examples.
DENSE = [
    *TENSORFLOW,
    "keras-hub>=0.32,<1",
    "faster-coco-eval>=1.7,<2",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources>=6",
    "scikit-learn>=1.5,<2",
    *PLOTS,
]
EXPORT = [
    *TENSORFLOW,
    *JAX,
    "tf2onnx>=1.17,<2",
    "onnx>=1.20,<2",
    "onnxruntime>=1.24.1,<2",
    "tensorflow-serving-api>=2.19,<3",
    "grpcio>=1.68,<2",
    *IMAGES,
]
EDGE = ["ai-edge-litert>=2.0.2,<3", "openvino>=2026.1,<2027"]
DOCS = ["sphinx>=8.2,<10", "furo>=2025.7.19", "myst-parser>=4,<6", "absl-py>=2.1,<3"]
TEST = [
    *TRAIN,
    *DENSE,
    *EXPORT,
    *EDGE,
    *TORCH,
    *PARQUET,
    *HUGGINGFACE,
    "webdataset>=1,<2",  # writes tar files in the tests
    *DOCS,
    "scikit-image>=0.25,<1",  # test photographs
    "ml_dtypes>=0.5.1,<1",
    "protobuf>=5.28.3",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "cosmic-ray>=8.4.1,<9",  # make mutation
    "kubernetes-validate>=1.32",
    "markdown-it-py>=3,<5",  # parses the pages whose code the tests run
    "ruff>=0.17,<0.18",  # make lint, with the next three
    "codespell>=2.4,<3",
    "import-linter>=2.5,<3",
    "basedpyright>=1.40,<2",
    "nbformat>=5.10,<6",  # the notebooks of examples/
    "nbclient>=0.10,<1",
    "ipykernel>=6.29,<8",
    "build>=1.2,<2",  # make dist
    "twine>=6,<8",
]

setup(
    name="keras-tnt",
    version=VERSION,
    description="Transformer-in-Transformer image models for Keras 3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="keras_tnt",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["keras", "tensorflow", "jax", "torch", "vision transformer", "TNT", "DeiT", "CaiT"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["keras_tnt", "keras_tnt.*"]),
    entry_points={"console_scripts": ["keras-tnt=keras_tnt.cli:main"]},
    package_data={
        "keras_tnt": [
            "py.typed",
            "export/servers/*.py",  # imported by servers, not by the package
            *(f"**/*.{kind}" for kind in ("txt", "csv", "html", "h", "cpp")),
        ]
    },
    install_requires=[
        "keras>=3.15,<4",
        "numpy>=1.26,<3",
        "safetensors>=0.5,<1",
        "h5py>=3.11",
        "filelock>=4,<5",
        "huggingface_hub>=1,<3",
    ],
    extras_require={
        "tensorflow": TENSORFLOW,
        "jax": JAX,
        "torch": TORCH,
        "images": IMAGES,
        "parquet": PARQUET,
        "huggingface": HUGGINGFACE,
        "plots": PLOTS,
        "train": TRAIN,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "dense": DENSE,
        "export": EXPORT,
        "edge": EDGE,
        "docs": DOCS,
        "test": TEST,
    },
)
