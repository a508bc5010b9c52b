"""New weights from the learner to the policy that generates."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import jax
from flax import nnx

from etagent_jax import distributed
from etagent_jax.learner.step import Learner, Params
from etagent_jax.model import weights
from etagent_jax.policy.engine import Engine
from etagent_jax.policy.sglang import SGLangError, SGLangPolicy
from etagent_jax.tokenizer import Tokenizer

KEPT = 2
"""Published versions on disk: the one that is served, and the one before it."""

TOKENIZER = "tokenizer"
FINISHED, UNFINISHED = "[0-9]" * 8, ".*.unfinished"


class Publication:
    """Versions of a model in `folder`, on storage that all processes and servers share.

    Each is a Hugging Face folder, `folder`/00000012, which appears when it is whole.  Versions that an earlier run
    left there are removed.  All processes make one, and call its methods together.
    ValueError if `folder` is not the same for all of them.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer):
        self.folder, self._tokenizer = Path(folder).absolute(), tokenizer
        distributed.check_same_directory(self.folder)
        if distributed.is_first():
            tokenizer.save(self.folder / TOKENIZER)
        self.clear()

    def write(self, learner: Learner, params: Params, version: int) -> Path:
        """Write `params`, in the dtype of the learner's model and with adapters merged; returns the folder.

        One of that version that is there is replaced.  No step may be taken meanwhile: it would donate `params`.
        """
        place = self.folder / f"{version:08d}"
        unfinished = self.folder / f".{place.name}.unfinished"
        merged = learner.serving_params(params) if learner.lora else params  # the rest is cast tensor by tensor
        eos_ids, pad_id = self._tokenizer.eos_ids, self._tokenizer.pad_id
        weights.save(merged, learner.config, unfinished, eos_ids, pad_id, durable=False)
        if distributed.is_first():
            shutil.copytree(self.folder / TOKENIZER, unfinished, dirs_exist_ok=True)
            if place.exists():
                shutil.rmtree(place)
            os.replace(unfinished, place)
        distributed.barrier()
        return place

    def forget(self) -> None:
        """Remove all versions but the newest KEPT."""
        if distributed.is_first():
            for path in sorted(self.folder.glob(FINISHED))[:-KEPT]:
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove all versions: no server will be asked to read one any more."""
        if distributed.is_first():
            for path in (*self.folder.glob(FINISHED), *self.folder.glob(UNFINISHED)):
                shutil.rmtree(path)
        distributed.barrier()


async def push_weights(
    learner: Learner, params: Params, version: int, policy: Engine | SGLangPolicy, publication: Publication | None
) -> None:
    """Serve `params` as `version` from now on.  All processes call it, and no other collective runs meanwhile.

    An engine, one in every process, takes a copy of them, for the next step donates the originals.  Servers read
    them from a folder of `publication`; while it is written, in a thread, the event loop goes on.  SGLangError, on
    every process, if a server does not take them.
    """
    if isinstance(policy, Engine):
        await _push_into(policy, learner, params, version)
    else:
        assert publication is not None, "servers read new weights from a folder"
        folder = await asyncio.to_thread(publication.write, learner, params, version)
        await serve_folder(policy, version, folder)
        await asyncio.to_thread(publication.forget)


async def serve_folder(policy: SGLangPolicy, version: int, folder: str | Path) -> None:
    """Serve the model in `folder` as `version` from now on.  All processes call it; the first tells the servers.

    SGLangError, on every process, if a server does not take it.
    """
    await tell_servers(lambda: policy.update_weights(version, folder))
    if not distributed.is_first():
        policy.expect(version, folder)


async def tell_servers(tell: Callable[[], Awaitable[None]]) -> None:
    """`tell` by the first process, for all.  All processes call it; SGLangError, on every process, if it fails."""
    failure = None
    if distributed.is_first():
        try:
            await tell()
        except SGLangError as error:
            failure = str(error)
    failure = await asyncio.to_thread(distributed.from_first, failure)
    if failure is not None:
        raise SGLangError(failure)


async def _push_into(engine: Engine, learner: Learner, params: Params, version: int) -> None:
    device = jax.local_devices()[0]
    replicate = weights.replicate(learner.mesh)

    def here(x: jax.Array) -> jax.Array:  # one array after the other, so that no device holds them all but this one
        return next(shard.data for shard in replicate(x).addressable_shards if shard.device == device)

    await engine.update_weights(version, nnx.State(jax.tree.map(here, learner.serving_params(params))))
