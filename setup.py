from pathlib import Path

from setuptools import find_packages, setup

BENCH = ["matplotlib", "torchmetrics"]
SERVE = ["fastapi", "uvicorn", "pydantic>=2", "prometheus-client", "gradio"]
RAY = ["ray[serve]"]
TEST = ["pytest", "pytest-xdist", "ruff", "hypothesis", "distvae", "imageio", "imageio-ffmpeg", "optimum-quanto"]
TEST += ["peft", "openai", "selenium"]

setup(
    name="xfuser",
    version="1.0.0",
    description="Runs Diffusers pipelines on many devices: two lines wrap a pipeline, torchrun starts it",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["xfuser", "xfuser.*"]),
    package_data={"xfuser": ["py.typed", "assets/**/*", "planner/*.json"]},
    install_requires=[
        "torch>=2.7",  # fully_shard(ignored_params=...)
        "diffusers>=0.36",
        "transformers>=4.57",
        "accelerate",
        "filelock",
        "safetensors",
        "yunchang",
    ],
    extras_require={
        "flash-attn": ["flash-attn"],
        "distvae": ["distvae"],
        "bench": BENCH,
        "serve": SERVE,
        "ray": SERVE + RAY,
        "test": TEST + BENCH + SERVE + RAY,
    },
    entry_points={"console_scripts": ["xdit=xfuser.cli.main:main"]},
)
