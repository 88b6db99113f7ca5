"""Real processors for the random models of `zoo`, made from image processors and a word list; nothing is downloaded."""

from __future__ import annotations

from typing import Any

from zoo import PATCH, SIDE

_ROWS = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
_IMAGE = {"internvl": "<IMG_CONTEXT>", "gemma3": "<image_soft_token>"}
_START = {"internvl": "<img>", "gemma3": "<start_of_image>"}
_END = {"internvl": "</img>", "gemma3": "<end_of_image>"}

PROCESSOR_FAMILIES = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "gemma3",
]
"""SmolVLM's processor is Idefics3's and needs a package of its own, so it is left out."""

CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + "PLACEHOLDER" + "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def tiny_tokenizer(family: str = "llava") -> Any:
    """Words to ids that agree with the models of `zoo`: 0 pad, 1 bos, 3 and 4 around an image, 5 image, 6 video."""
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    qwen = family.startswith("qwen")
    image = "<|image_pad|>" if qwen else _IMAGE.get(family, "<image>")
    video = "<|video_pad|>" if qwen else "<video>"
    start = "<|vision_start|>" if qwen else _START.get(family, "<start>")
    end = "<|vision_end|>" if qwen else _END.get(family, "<end>")
    special = ["<pad>", "<bos>", "<eos>", start, end, image, video, "<unk>"]
    idefics = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *_ROWS]
    words = ["user", "assistant", "system", *(f"w{i}" for i in range(20))]
    vocabulary = {word: i for i, word in enumerate([*special, *words, *idefics])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    named = {}
    if family == "internvl":
        named = {"start_image_token": start, "end_image_token": end, "context_image_token": image, "video_token": video}
    if family == "gemma3":
        named = {"boi_token": start, "eoi_token": end, "image_token": image}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        **({"extra_special_tokens": named} if named else {}),
    )
    extra = [start, end, image, video, *(idefics if family == "idefics3" else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in extra if t not in named.values()]})
    return tokenizer


def tiny_processor(family: str, chat: bool = False) -> Any:
    """The processor class of a family, sized for the model that ``zoo.tiny_vlm(family)`` makes."""
    import transformers as hf

    square = {"height": SIDE, "width": SIDE}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    tokenizer = tiny_tokenizer(family)
    if family == "llava":
        reader = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
        made: Any = hf.LlavaProcessor(
            reader,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif family == "llava_next":
        reader = hf.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=pinpoints
        )
        made = hf.LlavaNextProcessor(
            reader,
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif family == "llava_onevision":
        reader = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=pinpoints)
        made = hf.LlavaOnevisionProcessor(
            reader,
            tokenizer,
            hf.LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        )
    elif family.startswith("qwen"):
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        video = hf.Qwen3VLVideoProcessor if family == "qwen3_vl" else hf.Qwen2VLVideoProcessor
        reader = hf.Qwen2VLImageProcessor(
            patch_size=PATCH, merge_size=2, min_pixels=SIDE * SIDE, max_pixels=4 * SIDE * SIDE
        )
        made = getattr(hf, f"{name}Processor")(reader, tokenizer, video(patch_size=PATCH, merge_size=2))
    elif family == "internvl":
        reader = hf.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=4)
        made = hf.InternVLProcessor(reader, tokenizer, hf.InternVLVideoProcessor(size=square), image_seq_length=4)
    elif family == "idefics3":
        reader = hf.Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
        made = hf.Idefics3Processor(reader, tokenizer, image_seq_len=4)
    elif family == "gemma3":
        reader = hf.Gemma3ImageProcessor(size=square)
        made = hf.Gemma3Processor(reader, tokenizer, image_seq_length=4)
    else:
        raise KeyError(family)
    if chat:
        marker = made.image_token
        if family.startswith("qwen"):
            marker = f"<|vision_start|>{marker}<|vision_end|>"
        made.chat_template = CHAT.replace("PLACEHOLDER", marker)
    return made
