"""The examples run: the notebook's cells, and the app over loopback."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy
import socket
import threading
import time
from typing import Any

import pytest

from lora_jax import serving
from tests.serving.test_server import PROMPTS, Setup, setup  # noqa: F401  a fixture
from tests.training import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.standard_promotion


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell runs, with a tiny model and data of its own in place of the downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    rows = [{"word": f"word{i % 9}", "definition": f"word{(i + 3) % 9}"} for i in range(64)]
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text)
    base = tiny.write_model(tmp_path / "base", tiny.LLAMA)
    names: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, "quickstart.ipynb", "exec"), names)
        config = names["config"]
        if config.data.batch_size != 16:
            names["config"] = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, reference=str(base)),
                data=dataclasses.replace(
                    config.data,
                    source=str(tmp_path / "{split}.jsonl"),
                    eos="</s>",
                    max_length=16,
                    batch_size=16,
                    eval_batch_size=16,
                ),
            )
    assert names["run"].best["step"] in (10, 20)
    assert names["server"].names == ("quickstart",)


@pytest.fixture
def address(setup: Setup) -> Any:  # noqa: F811
    """The address of the app, which serves two adapters."""
    uvicorn = pytest.importorskip("uvicorn")
    for package in ("fastapi", "httpx"):
        pytest.importorskip(package)
    adapters = {name: setup.path(name) for name in ("one", "two")}
    server = serving.open(setup.base, adapters, batch_size=4, max_tokens=32)
    app = runpy.run_path(str(ROOT / "examples/serve.py"))["app_of"](server)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    web = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", server
    web.should_exit = True
    thread.join()


@pytest.mark.slow
def test_the_app_serves_two_adapters_with_streaming(address: Any) -> None:
    import httpx

    url, server = address
    with httpx.Client(base_url=url, timeout=300) as client:
        assert client.get("/adapters").json() == ["one", "two"]
        for name in ("one", "two"):
            asked = {"prompt": PROMPTS[1], "adapter": name, "max_new_tokens": 6}
            (wanted,) = server.generate(PROMPTS[1:2], name, max_new_tokens=6)
            assert client.post("/generate", json=asked).json() == wanted._asdict()
            with client.stream("POST", "/stream", json=asked) as answer:
                assert "".join(answer.iter_text()) == wanted.text
        wrong = client.post("/stream", json={"prompt": "a", "adapter": "tow"})
        assert wrong.status_code == 400 and "nearest: 'two'" in wrong.json()["error"]
        with client.stream("POST", "/stream", json={**asked, "max_new_tokens": 30}) as answer:
            next(answer.iter_text())
        for _ in range(1000):  # the text of a client that went away is cancelled, or ends
            if not server.decoder.busy():
                break
            time.sleep(0.01)
        assert len(server.generate(PROMPTS[:1], "one", max_new_tokens=2)) == 1
