"""Serve two adapters over HTTP, with streaming.

    pip install -r examples/requirements.txt
    python examples/serve.py runs/poems runs/recipes
    curl -N localhost:8000/stream -H 'content-type: application/json' \\
        -d '{"adapter": "poems", "prompt": "The sea"}'

`prompt` may also be a list of messages. A client that goes away cancels its text.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import fastapi
import fastapi.responses
import pydantic
import uvicorn

from lora_jax import LoraError, serving
from lora_jax.serving.server import Server


class Question(pydantic.BaseModel):
    """A prompt for an adapter."""

    prompt: str | list[dict[str, Any]]
    adapter: str
    max_new_tokens: int = 128


def app_of(server: Server) -> fastapi.FastAPI:
    """Return the app of a server. Its functions run in threads, which share batches."""
    app = fastapi.FastAPI(title="lora_jax")

    @app.exception_handler(LoraError)
    def wrong(_: fastapi.Request, error: LoraError) -> fastapi.responses.JSONResponse:
        return fastapi.responses.JSONResponse({"error": str(error)}, status_code=400)

    @app.get("/adapters")
    def adapters() -> list[str]:
        return list(server.names)

    @app.post("/generate")
    def generate(asked: Question) -> dict[str, Any]:
        how = {"adapter": asked.adapter, "max_new_tokens": asked.max_new_tokens}
        (answer,) = server.generate([asked.prompt], **how)
        return answer._asdict()

    @app.post("/stream")
    def stream(asked: Question) -> fastapi.responses.StreamingResponse:
        how = {"adapter": asked.adapter, "max_new_tokens": asked.max_new_tokens}
        texts = server.stream(asked.prompt, **how)

        def pieces() -> Iterator[str]:
            with contextlib.closing(texts):
                yield from texts

        return fastapi.responses.StreamingResponse(pieces(), media_type="text/plain")

    return app


def main() -> None:
    """Open the runs, compile everything and listen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="a run directory; its base is opened")
    parser.add_argument("other", help="a run on the same base")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    name = options.other.rstrip("/").rpartition("/")[2]
    server = serving.open(options.run, {name: options.other})
    print(f"{', '.join(server.names)}: warmed up in {server.warm_up():.1f} s")
    uvicorn.run(app_of(server), port=options.port)


if __name__ == "__main__":
    main()
