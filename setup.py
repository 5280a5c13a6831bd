"""Packaging of ilvr_ds; `pip install .` gives the library and the `ilvr-ds` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (root / "ilvr_ds/__init__.py").read_text())
assert version is not None

setup(
    name="ilvr_ds",
    version=version[1],
    description="Train vision-language models to reason in interleaved text and latent visual tokens, on DeepSpeed",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ilvr_ds", "ilvr_ds.*"]),
    package_data={"ilvr_ds": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "deepspeed>=0.19.3",
        "webdataset>=1.0.2",
        "mlflow-skinny>=3.17",
        "sqlalchemy>=2",
        "alembic",
        "pandas",
        "psutil",
        "peft>=0.19",
        "safetensors",
        "numpy",
        "pillow",
        "pyyaml",
        "requests",
        "tqdm",
        "ninja",
    ],
    extras_require={
        "cuda": ["flash-attn>=2.7", "bitsandbytes>=0.50"],
        "ui": ["mlflow>=3.17"],
        "dev": ["pytest", "pytest-timeout", "ruff", "mypy", "types-PyYAML", "types-requests", "types-tqdm", "bitsandbytes>=0.50"],
    },
    entry_points={"console_scripts": ["ilvr-ds=ilvr_ds.cli:main"]},
)
