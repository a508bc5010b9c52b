"""Serve a Hugging Face model folder with the embedded engine over SGLang's HTTP API.

    python -m etagent_jax.serve --model runs/quickstart/phase2/model --port 30000
    curl localhost:30000/generate -d '{"text": "…", "sampling_params": {"max_new_tokens": 32, "temperature": 0}}'
    curl localhost:30000/generate -d '{"text": "…", "sampling_params": {"max_new_tokens": 0},
                                       "return_logprob": true, "logprob_start_len": 0}'

The second request samples nothing: it asks how probable the given tokens are.
The environment variable SGLANG_API_KEY stands for --api-key, so that the key is not among the processes' arguments.
SIGTERM or Ctrl-C ends it, with exit status 0.
"""

import argparse
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_DEFAULT_CONTEXT = 4096
GRACE_SECONDS = 5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m etagent_jax.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, weights and tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("SGLANG_API_KEY"),
        help="what clients must send as `Authorization: Bearer …` (default: SGLANG_API_KEY, if it is set)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, default=16, help="sequences generated side by side (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, help=f"most tokens of one sequence (default: the model's, at most {MAX_DEFAULT_CONTEXT})"
    )
    parser.add_argument(
        "--max-queued-requests", type=int, default=2048,
        help="most requests that wait for a slot; further ones are answered 503 (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name, least in (("port", 0), ("slots", 1), ("context", 2), ("max-queued-requests", 0)):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(options)
    except (OSError, ValueError) as error:
        sys.exit(f"serve: {error}")
    except KeyboardInterrupt:
        pass


def serve(options: argparse.Namespace) -> None:
    """Load the model and answer requests until a signal; ValueError or OSError say what cannot be."""
    listener = _listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    if not (options.api_key or ipaddress.ip_address(host).is_loopback):
        print(
            f"serve: warning: without an API key, whoever can reach {host}:{port} can generate and change the weights; "
            "set SGLANG_API_KEY, or listen on 127.0.0.1",
            file=sys.stderr,
        )

    # Imported here so that --help and bad options answer at once.
    import asyncio

    import uvicorn

    from etagent_jax.model import weights
    from etagent_jax.model.folder import read_config
    from etagent_jax.policy.engine import Engine, check_fit
    from etagent_jax.policy.interface import Sampling
    from etagent_jax.policy.server import make_app
    from etagent_jax.tokenizer import Tokenizer

    config = read_config(options.model)
    tokenizer = Tokenizer.load(options.model)
    context = options.context or min(config.max_position, MAX_DEFAULT_CONTEXT)
    check_fit(config, tokenizer, context, options.model)
    engine = Engine(weights.load(options.model), tokenizer, slots=options.slots, context=context)
    try:
        warm_up = (0,) * min(32, context - 1)
        asyncio.run(engine.generate(warm_up, Sampling(temperature=0, max_new_tokens=1)))
        app = make_app(engine, tokenizer, str(options.model), options.api_key, max_queued=options.max_queued_requests)
        # h11 bounds the bytes of a request's headers.
        settings = uvicorn.Config(
            app, http="h11", log_level="warning", lifespan="off", timeout_graceful_shutdown=GRACE_SECONDS
        )
        server = uvicorn.Server(settings)
        listener.listen(2048)
        print(
            f"serving {options.model} at http://{host}:{port} ({options.slots} slots of {context} tokens)", flush=True
        )
        server.run(sockets=[listener])
    finally:
        engine.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything slow is done."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
    return listener


if __name__ == "__main__":
    main()
