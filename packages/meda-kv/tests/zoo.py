"""Tiny random models of the families that must work, with inputs as their processors would give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from meda_kv.attention.reference import masked_generate
from torch import Tensor

__all__ = ["FAMILIES", "VLM_FAMILIES", "generate", "kept_positions", "masked_reference", "plain_cache", "tiny_vlm"]

torch.set_num_threads(1)  # threads cost more than they bring at these sizes

PAD, BOS, START, END, IMAGE, VIDEO, FIRST_WORD = 0, 1, 3, 4, 5, 6, 8
VOCABULARY = 96
SIDE, PATCH = 32, 8

Pixels = tuple[dict[str, Tensor], list[int]]  # tensors of the processor, placeholders per image


@dataclass(frozen=True)
class _Family:
    build: Callable[..., Any]
    pixels: Callable[[Any, int, int, torch.Generator], Pixels] | None = None
    types: str | None = None  # name under which the processor returns token kinds


def _text(hf: Any, kind: str, **changes: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.15,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return {"model_type": kind, **base, **changes}


def _tower(**changes: Any) -> dict[str, Any]:
    base = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.15,
    }
    return {**base, **changes}


def _images(rows: int, count: int, generator: torch.Generator, *inner: int) -> Tensor:
    return torch.randn(rows * count, *inner, 3, SIDE, SIDE, generator=generator)


def _llava(hf: Any, **text: Any) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_tower()},
            text_config=_text(hf, "llama", **text),
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


def _llava_pixels(model: Any, rows: int, count: int, generator: torch.Generator) -> Pixels:
    return {"pixel_values": _images(rows, count, generator)}, [16] * count


def _llava_next(hf: Any, **text: Any) -> Any:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config={"model_type": "clip_vision_model", **_tower()},
            text_config=_text(hf, "mistral", sliding_window=None, **text),
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        )
    )


def _llava_onevision(hf: Any, **text: Any) -> Any:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_tower()},
            text_config=_text(hf, "qwen2", **text),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        )
    )


def _tiled_pixels(model: Any, rows: int, count: int, generator: torch.Generator) -> Pixels:
    """Base picture and two tiles; odd rows of newlines and cut borders are counted by the model itself."""
    tensors = {
        "pixel_values": _images(rows, count, generator, 3),
        "image_sizes": torch.tensor(([[SIDE, 2 * SIDE], [2 * SIDE, SIDE - 6]] * count)[:count] * rows),
    }
    with torch.no_grad():
        output = model.model.get_image_features(
            **tensors,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    features = getattr(output, "pooler_output", output)
    return tensors, [int(one.shape[0]) for one in features[:count]]


def _qwen_text(hf: Any, kind: str, **text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return _text(hf, kind, head_dim=16, hidden_size=64, rope_parameters=rope, **text)


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def _qwen2_vl(hf: Any, **text: Any) -> Any:
    tower = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
    }
    config = hf.Qwen2VLConfig(
        vision_config={**tower, "initializer_range": 0.3},
        text_config=_qwen_text(hf, "qwen2_vl_text", **text),
        **_qwen_ids(),
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(hf: Any, **text: Any) -> Any:
    tower = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 64,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "window_size": 2 * PATCH * 2,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.15,
    }
    config = hf.Qwen2_5_VLConfig(
        vision_config=tower, text_config=_qwen_text(hf, "qwen2_5_vl_text", **text), **_qwen_ids()
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(hf: Any, **text: Any) -> Any:
    tower = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 64,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.15,
    }
    config = hf.Qwen3VLConfig(vision_config=tower, text_config=_qwen_text(hf, "qwen3_vl_text", **text), **_qwen_ids())
    return hf.Qwen3VLForConditionalGeneration(config)


def _qwen_pixels(model: Any, rows: int, count: int, generator: torch.Generator) -> Pixels:
    grids = ([[1, 4, 4], [1, 4, 8]] * count)[:count]
    patches = sum(t * h * w for t, h, w in grids) * rows
    values = torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator)
    return {"pixel_values": values, "image_grid_thw": torch.tensor(grids * rows)}, [t * h * w // 4 for t, h, w in grids]


def _internvl(hf: Any, **text: Any) -> Any:
    tower = _tower(image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config={"model_type": "internvl_vision", **tower},
            text_config=_text(hf, "qwen2", **text),
            image_token_id=IMAGE,
            image_seq_length=4,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


def _internvl_pixels(model: Any, rows: int, count: int, generator: torch.Generator) -> Pixels:
    return {"pixel_values": _images(rows, count, generator)}, [4] * count


def _idefics3(hf: Any, **text: Any) -> Any:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            vision_config=_tower(),
            text_config=_text(hf, "llama", **text),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
    )


def _smolvlm(hf: Any, **text: Any) -> Any:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            vision_config=_tower(),
            text_config=_text(hf, "llama", **text),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        )
    )


def _idefics_pixels(model: Any, rows: int, count: int, generator: torch.Generator) -> Pixels:
    values = _images(rows, count, generator).reshape(rows, count, 3, SIDE, SIDE)
    return {
        "pixel_values": values,
        "pixel_attention_mask": torch.ones(rows, count, SIDE, SIDE, dtype=torch.bool),
    }, [4] * count


def _gemma3(hf: Any, **text: Any) -> Any:
    changes = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 12,
        "query_pre_attn_scalar": 8,
    }
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_tower()},
            text_config=_text(hf, "gemma3_text", **{**changes, **text}),
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        )
    )


def _text_only(hf: Any, **text: Any) -> Any:
    config = _text(hf, "llama", **text)
    config.pop("model_type")
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config))


_ZOO: dict[str, _Family] = {
    "llava": _Family(_llava, _llava_pixels),
    "llava_next": _Family(_llava_next, _tiled_pixels),
    "llava_onevision": _Family(_llava_onevision, _tiled_pixels),
    "qwen2_vl": _Family(_qwen2_vl, _qwen_pixels, "mm_token_type_ids"),
    "qwen2_5_vl": _Family(_qwen2_5_vl, _qwen_pixels, "mm_token_type_ids"),
    "qwen3_vl": _Family(_qwen3_vl, _qwen_pixels, "mm_token_type_ids"),
    "internvl": _Family(_internvl, _internvl_pixels),
    "idefics3": _Family(_idefics3, _idefics_pixels),
    "smolvlm": _Family(_smolvlm, _idefics_pixels),
    "gemma3": _Family(_gemma3, _internvl_pixels, "token_type_ids"),
    "text": _Family(_text_only),
}
FAMILIES = list(_ZOO)
VLM_FAMILIES = [name for name in FAMILIES if name != "text"]


def tiny_vlm(family: str, seed: int = 0, attn: str = "sdpa", **overrides: Any) -> tuple[Any, Callable[..., dict]]:
    """A random model of one family and a maker of its inputs.

    `overrides` are fields of the text configuration. The maker is ``inputs(batch=1, images=2, text=12, padded=False,
    seed=0)``: `text` words follow the pictures; with `padded` row i has 3 i words fewer and padding on the left.
    """
    import transformers as hf

    entry = _ZOO[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = entry.build(hf, **overrides).float().eval()
        _shake(model)
    model.set_attn_implementation(attn)
    model.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=PAD, bos_token_id=BOS)

    def inputs(
        batch: int = 1, images: int = 2, text: int = 12, padded: bool = False, seed: int = 0
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, Tensor] = {}
        counts: list[int] = []
        if entry.pixels is not None and images:
            tensors, counts = entry.pixels(model, batch, images, generator)
        rows = [_row(counts, text - (3 * row if padded else 0), generator) for row in range(batch)]
        length = max(len(row) for row in rows)
        ids = torch.full((batch, length), PAD)
        mask = torch.zeros(batch, length, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = torch.tensor(row)
            mask[index, length - len(row) :] = 1
        result = {"input_ids": ids, "attention_mask": mask, **tensors}
        if entry.types is not None:
            result[entry.types] = (ids == IMAGE).long()
        return result

    return model, inputs


def _shake(model: Any) -> None:
    """Give every parameter a spread that makes attention uneven; the defaults of 0.02 hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name:
                parameter.normal_(0.0, 0.02)  # logits of about 0.1, so that float32 rounding stays below 1e-6
            elif parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.normal_(0.0, 0.15)
            elif parameter.ndim == 1 and "norm" not in name and "bias" in name:
                parameter.normal_(0.0, 0.1)


def _row(counts: list[int], text: int, generator: torch.Generator) -> list[int]:
    def words(number: int) -> list[int]:
        return torch.randint(FIRST_WORD, VOCABULARY, (number,), generator=generator).tolist()

    row = [BOS]
    for count in counts:
        row += [*words(2), START, *[IMAGE] * count, END]
    return row + words(text)


def plain_cache(model: Any) -> Any:
    """The ordinary cache of a model."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def generate(
    model: Any, inputs: dict[str, Tensor], cache: Any, steps: int = 4, **options: Any
) -> tuple[Tensor, Tensor]:
    """Greedy generation: logits [T, B, vocabulary] and tokens [B, T]."""
    result = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(result.logits), result.sequences[:, inputs["input_ids"].shape[1] :]


def kept_positions(cache: Any, prompt: int) -> dict[int, Tensor]:
    """Positions [B, Hkv, S'] of the prompt that every compressed layer holds; -1 elsewhere."""
    kept = {}
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "positions"):
            positions = layer.positions
            real = positions < prompt
            if layer.valid is not None:
                real = real & layer.valid
            kept[index] = torch.where(real, positions, -1)
    return kept


def masked_reference(model: Any, inputs: dict[str, Tensor], kept: Any, steps: int | Tensor, **options: Any) -> Tensor:
    """Logits [T, B, vocabulary] of the full cache with evicted keys masked per layer and head.

    `kept` holds per layer the positions [B, Hkv, S'] that stay (a list, or by layer index); `steps` is a number of
    greedy tokens or the tokens [B, T] to force. With ``turn=`` [B, t] its t logits follow those of the T tokens.
    """
    return masked_generate(model, inputs, kept, steps, **options)[0]
