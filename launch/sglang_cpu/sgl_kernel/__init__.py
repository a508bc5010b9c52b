"""The names that SGLang's server imports from `sgl_kernel`, of which no CPU build is published; none can be called.

SGLang 0.5.23 calls them for speculative decoding and for moving cached keys only.
"""

from collections.abc import Callable
from typing import NoReturn

NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


def _absent(name: str) -> Callable[..., NoReturn]:
    def call(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there: this server runs without SGLang's CPU kernels")

    return call


globals().update({name: _absent(name) for name in NAMES})
