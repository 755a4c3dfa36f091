"""Every attack on every file of every kind of input ends in an error of ours, or does nothing."""

from __future__ import annotations

import faulthandler
import pathlib
import warnings
from collections.abc import Iterator

import pytest

from lora_jax.system.console import quiet_storage
from tests.attacks.attacks import ATTACKS
from tests.attacks.inputs import INPUTS
from tests.fuzz import kind
from tests.fuzz.bounds import bounded, check_message

pytestmark = pytest.mark.standard_promotion
MOST = 300_000_000  # bytes


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """End the process of a test that waits for ever, such as for the other end of a FIFO."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.matrix
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", INPUTS)
def test_reading_does_no_harm(name: str, attack: str, tmp_path: pathlib.Path) -> None:
    one, files = INPUTS[name], INPUTS[name].files()
    with quiet_storage(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, file in enumerate(files):
            folder, outside = tmp_path / str(number) / "input", tmp_path / str(number) / "secret"
            kind.write(folder, files)
            outside.write_bytes(files[file])
            ATTACKS[attack].do(folder / file, outside)
            try:
                with bounded(outside, MOST):
                    one.read(folder)
            except one.errors as error:
                check_message(error)
            else:
                allowed = not ATTACKS[attack].refused or (one.named and attack == "link-out")
                assert allowed, f"{file} was read"


def test_the_cache_of_the_model_hub_is_read(tmp_path: pathlib.Path) -> None:
    """Its files are links to blobs of the same model, and to nothing else."""
    model, blobs = tmp_path / "models--a--b", tmp_path / "models--a--b" / "blobs"
    kind.write(blobs, INPUTS["base"].files())
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    INPUTS["base"].read(snapshot)
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    with pytest.raises(INPUTS["base"].errors, match="out of its folder"):
        INPUTS["base"].read(snapshot)


@pytest.mark.parametrize("name", INPUTS)
def test_good_inputs_are_read(name: str, tmp_path: pathlib.Path) -> None:
    """The inputs can be read as they are, so that the attacks are what is refused."""
    kind.write(tmp_path / "input", files := INPUTS[name].files())
    INPUTS[name].read(tmp_path / "input")
    assert kind.stored(tmp_path / "input") == files, "reading changed a file"
