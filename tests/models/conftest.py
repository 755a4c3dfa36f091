"""Models that several tests need; each is loaded once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models

DATA = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the stored inputs and outputs."""
    return DATA


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        shutil.copytree(DATA / "golden_models" / name, tmp_path / name)
        return tmp_path / name

    return copy


@pytest.fixture(scope="session")
def smollm2() -> models.Source:
    """SmolLM2-135M-Instruct as GGUF; its metadata is read once."""
    return models.open(models.SMOLLM2)


@pytest.fixture(scope="session")
def llama_config() -> models.DecoderConfig:
    """A decoder small enough to compile quickly."""
    return models.DecoderConfig(
        vocab_size=19,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=20,
        max_positions=32,
    )


@pytest.fixture(scope="session")
def bert_config() -> models.BertConfig:
    """An encoder small enough to compile quickly."""
    return models.BertConfig(
        vocab_size=19, hidden_size=16, num_layers=2, num_heads=4, mlp_size=20, max_positions=32
    )


@pytest.fixture(scope="session")
def ids() -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).integers(1, 19, (2, 8)), jnp.int32)
