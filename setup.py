"""The package's metadata; its tools are configured in pyproject.toml."""

from setuptools import find_namespace_packages, setup

GYM, LM_EVAL, WANDB = ["reasoning-gym>=0.1.20"], ["lm-eval>=0.4.13"], ["wandb>=0.18"]
TPU = ["jax[tpu]>=0.10,<0.11.1"]  # with the compiler that diffpo_jax.plan asks

setup(
    name="diffpo_jax",
    version="0.1.0",
    description="Reinforcement learning of fast, accurate reasoning in masked-diffusion language models (DiFFPO), in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["diffpo_jax*", "configs*"], exclude=["*__pycache__*"]),
    package_data={"diffpo_jax.web": ["*.html", "*.css", "*.js"]},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "chex>=0.1.90",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "huggingface-hub>=0.30",
        "importlib-resources>=6",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10,<0.11.1",  # 0.11.1 breaks flax 0.12.8
        "jinja2>=3.1",  # chat templates
        "math-verify>=0.8",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=17",
        "rich>=13.7",
        "safetensors>=0.8",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "transformers>=5",
    ],
    extras_require={
        "gym": GYM,
        "lm-eval": LM_EVAL,
        "tpu": [*TPU, "gcsfs>=2024.6"],  # and buckets
        "wandb": WANDB,
        "torch": ["torch>=2.4"],  # what benchmarks/sampler.py compares with
        "test": [
            *GYM, *LM_EVAL, *TPU, *WANDB, "hypothesis>=6.100", "ipykernel>=6.29", "mypy>=1.16", "nbclient>=0.10", "pytest>=8.2",
            "pytest-xdist>=3.6", "ruff>=0.12", "selenium>=4",
        ],  # fmt: skip
    },
)
