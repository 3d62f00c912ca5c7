"""Where `adapters==1.3.0` departs from its own definitions, and how a reference undoes it.

Each function changes a model that adapters.init() has prepared; oracle_reference.distance_of_unrepaired says how much.
"""

import functools
from collections.abc import Callable

import torch
from adapters.context import ForwardContext
from adapters.methods.lora import LoRAMergedLinear
from torch import Tensor, nn


def keep_positions(model: nn.Module) -> None:
    """T5: prefixes shift no positions.

    The library asks for the relative position bias of prefix and sequence together, as if the prefix were tokens at the
    positions from 0 on. So every real key is seen prefix_length too far to the right, and prefixes get a bias that
    depends on the query. Here real keys keep the bias that they have without a prefix, and prefixes have none.
    """
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = functools.partial(_bias_beside_prefix, module.compute_bias)


def _bias_beside_prefix(
    compute_bias: Callable[..., Tensor],
    query_length: int | Tensor,
    key_length: int,
    device: torch.device | None = None,
    cache_position: Tensor | None = None,
) -> Tensor:
    """[1, heads, queries, prefix + keys]; in self attention without a cache there are as many keys as queries."""
    real = int(query_length)
    bias = compute_bias(real, real, device=device, cache_position=cache_position)
    return nn.functional.pad(bias, (key_length - real, 0))


def repair_packed_projection(model: nn.Module) -> None:
    """DeBERTa (v1): the base is the base.

    The library gives the packed projection, which has no bias, a random one: results differ from the base's with no
    adapter at all, and from one process to the next. That bias is float32, so that other dtypes fail.

    Not repaired, since trained adapters depend on it: the projection holds q, k and v head by head, but the library
    writes the updates as if all of q came first, then k, then v.
    """
    for module in model.modules():
        if isinstance(module, LoRAMergedLinear):
            module.bias = None


def keep_scores_of_tokens(model: nn.Module) -> None:
    """DeBERTa (v2 and v3) with share_att_key: gates are those of the tokens.

    There the query and key projections, and so their LoRAs, also run on the relative positions' embeddings, which are
    one row. That is the library's result and is left as it is: an update of a matrix counts wherever it is used. But
    the library also reports the gates of that row, and fails where it puts them beside those of other batches.
    """
    for _, layer in model.iter_layers():
        attention = layer.attention.self
        attention.disentangled_attention_bias = functools.partial(
            _without_scores, attention.disentangled_attention_bias
        )


def _without_scores(compute_bias: Callable[..., Tensor], *args) -> Tensor:
    context = ForwardContext.get_context()
    asked, context.output_adapter_gating_scores = context.output_adapter_gating_scores, False
    try:
        return compute_bias(*args)
    finally:
        context.output_adapter_gating_scores = asked
