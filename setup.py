"""Packaging of ilvr_ds; `pip install .` gives the library and the `ilvr-ds` command.

`ILVR_BUILD_OPS=1 pip install --no-build-isolation .` also builds the native operators, for TORCH_CUDA_ARCH_LIST.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (root / "ilvr_ds/__init__.py").read_text())
assert version is not None
inside = {"ilvr_ds.csrc": "csrc", "ilvr_ds.recipes": "launch/recipes", "ilvr_ds.ds_configs": "ds_configs"}
native = {}
if os.environ.get("ILVR_BUILD_OPS") == "1":
    sys.path.insert(0, str(root))
    from ilvr_ds.ops.build import ahead_of_time

    native = ahead_of_time()

setup(
    name="ilvr_ds",
    version=version[1],
    description="Train vision-language models to reason in interleaved text and latent visual tokens, on DeepSpeed",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # the sources travel inside the package, for the build at first use; recipes and settings, to be named (shipped.py)
    packages=[*find_packages(include=["ilvr_ds", "ilvr_ds.*"]), *inside],
    package_dir=inside,
    package_data={
        "ilvr_ds": ["py.typed", "demo/trained/*"],
        "ilvr_ds.csrc": ["*.cpp", "*/*.cpp", "*/*.h", "*/*.cu", "*/*.cuh"],
        "ilvr_ds.recipes": ["*.yaml"],
        "ilvr_ds.ds_configs": ["*.json"],
    },
    **native,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.3",
        "webdataset>=1.0.2",
        "mlflow-skinny>=3.17",
        "sqlalchemy>=2.1",
        "alembic",
        "pandas",
        "psutil",
        "matplotlib>=3.8",
        "peft>=0.19",
        "accelerate",
        "packaging",
        "safetensors",
        "numpy",
        "pillow",
        "pyyaml",
        "requests",
        "tqdm",
        "argcomplete>=3.5",
        "ninja",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7", "bitsandbytes>=0.50", "liger-kernel>=0.8", "nvidia-ml-py"],
        "ui": ["mlflow>=3.17"],
        "serve": ["fastapi>=0.165", "uvicorn>=0.54"],
        "formats": ["pyarrow>=24", "datasets>=4.4", "zstandard>=0.23"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "playwright",
            "nbclient",
            "nbformat",
            "ipykernel",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-requests",
            "types-tqdm",
            "bitsandbytes>=0.50",
            "pyarrow>=24",
            "datasets>=4.4",
            "zstandard>=0.23",
            "fastapi>=0.165",
            "uvicorn>=0.54",
            "openai>=3.57",
        ],
    },
    entry_points={
        "console_scripts": ["ilvr-ds=ilvr_ds.cli:run"],
        "lmms_eval.models": ["ilvr_ds=ilvr_ds.evaluation.harness.lmms_eval_plugin:manifest"],
    },
)
