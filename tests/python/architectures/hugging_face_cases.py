"""Cases of the architectures that `adapters==1.3.0` supports, traced."""

import functools

import hugging_face_repairs as repairs
from case import Case
from hugging_face_models import FAMILIES
from oracle_reference import OracleReference

# LLaMA's and Mistral's mixins wrap down_proj as the intermediate and up_proj as the output projection.
_SWAPPED = {"intermediate_lora": "output_lora", "output_lora": "intermediate_lora"}
# An encoder alone has self attention; the library calls it an encoder's.
_ALONE = {"encoder_prefix": "self_prefix"}
_NO_PREFIX_WITH_BIAS = "the library adds BEiT's relative position bias, which has no columns for prefixes, and stops"


def _case(
    family: str, attention: str, oracle_attention: str | None = None, without: dict | None = None, **reference
) -> Case:
    """One traced case; `reference` goes to OracleReference. The oracle's attention is the base's if not given."""
    make = FAMILIES[family].make
    return Case(
        name=f"{family}_{attention}",
        make=functools.partial(make, attention),
        arguments=FAMILIES[family].arguments,
        reference=OracleReference(functools.partial(make, oracle_attention or attention), **reference),
        without=without or {},
    )


def _both(family: str, **given) -> list[Case]:
    return [_case(family, attention, **given) for attention in ("sdpa", "eager")]


_LIST = [
    *_both("bert"),
    *_both("roberta"),
    *_both("xlm_roberta"),
    _case("electra", "eager"),
    # With sdpa the library adds 1 to the scores of DistilBERT's prefixes: see oracle.oracle_for.
    *_both("distilbert", oracle_attention="eager", renamed={"self": "self_prefix"}),
    *_both("albert"),
    *_both("albert_groups"),
    _case("deberta", "eager", repair=repairs.repair_packed_projection),
    _case("deberta_v2", "eager"),
    _case("deberta_v2_shared", "eager", repair=repairs.keep_scores_of_tokens),
    *_both("vit", lora_order="kvq"),
    *_both("beit"),
    _case("beit_relative", "eager", without=dict.fromkeys(("unipelt", "mam", "prefix_gated"), _NO_PREFIX_WITH_BIAS)),
    *_both("clip_text", renamed={"clip_text_model_self_prefix": "self_prefix"}),
    *_both("clip_vision", renamed={"clip_vision_model_self_prefix": "self_prefix"}),
    *_both("whisper_encoder", renamed=_ALONE),
    *_both("gpt2"),
    _case("gptj", "eager"),
    *_both("llama", renamed=_SWAPPED),
    *_both("mistral", renamed=_SWAPPED),
    _case("t5", "eager", repair=repairs.keep_positions),
    _case("t5_gated", "eager", repair=repairs.keep_positions),
    # With sdpa and no padding the decoder's mask is sdpa's is_causal, which counts prefixes as the first tokens.
    *_both("bart", oracle_attention="eager"),
    *_both("mbart", oracle_attention="eager"),
]

CASES: dict[str, Case] = {case.name: case for case in _LIST}
