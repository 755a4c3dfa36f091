"""The worker of transformers for `generation.py`: greedy generation. It does not import JAX."""

import sys

import torch
import transformers
from worker import digest, prompts, serve  # from this folder: `benchmarks` imports JAX


def main() -> None:
    folder, length, new, threads, *rows = sys.argv[1:]
    torch.set_num_threads(int(threads))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = {
        attention: load(folder, dtype=torch.float32, attn_implementation=attention).eval()
        for attention in ("eager", "sdpa")
    }
    for side in model.values():
        side.generation_config.eos_token_id = None  # rows go on after the end of a text, as ours do

    def run(count, tokens, attention):
        ids = torch.tensor(prompts(count, int(length)))
        with torch.inference_mode():
            written = model[attention].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return written[:, ids.shape[1] :].numpy()

    runs = {
        f"{count} {tokens} {attention}": (
            lambda count=int(count), tokens=tokens, attention=attention: run(
                count, tokens, attention
            )
        )
        for count in rows
        for tokens in (1, int(new))
        for attention in model
    }
    wrote = digest(run(int(count), int(new), "sdpa") for count in rows)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    serve(runs, f"{versions}; wrote {wrote}")


if __name__ == "__main__":
    main()
