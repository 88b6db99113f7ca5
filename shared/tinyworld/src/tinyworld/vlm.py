"""A tiny multimodal language model: the real LLaVA classes of transformers at 0.2 M parameters.

A CLIP vision transformer of one block turns every 32x32 picture into 16 tokens, a Llama of four blocks with grouped
queries reads them between words. It answers the questions of `tinyworld.albums`; `save_vlm` writes a checkpoint folder
like those of large models, so that code for `AutoModelForImageTextToText` and `AutoProcessor` runs on it offline.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vfm_core.errors import UserError

from tinyworld.albums import PATCH, SIDE, VOCABULARY, Album
from tinyworld.catalogue import LANGUAGE_MODELS, weights_path
from tinyworld.models import MEAN, STD, load_state, read_weights, seeded

CHAT = (
    "<bos>{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <sep> <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} <eos>{% endif %}{% endfor %}"
)
"""Chat template: a picture is ``<sep> <image>``, an answer ends with ``<eos>``."""


def build_vlm(
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    positions: int = 32768,
) -> Any:
    """A model with random weights; the global generator is left alone.

    Parameters
    ----------
    seed : int
        Of the weights.
    hidden, layers, heads, kv_heads : int
        Of the language model; larger shapes are for timing. The vision tower stays 64 wide.
    intermediate : int, optional
        Width inside the feed-forward blocks, twice `hidden` by default.
    positions : int
        Largest context, for the record: rotary positions have no table.

    Returns
    -------
    transformers.LlavaForConditionalGeneration
        In eval mode, float32, on the CPU.

    Raises
    ------
    UserError
        A shape that does not fit together; transformers is not installed.
    """
    _check_shape(hidden, layers, heads, kv_heads)
    hf = _transformers()
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    special = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"]}
    text = hf.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        initializer_range=0.96 / hidden**0.5,  # 0.12 at width 64; the usual 0.02 trains far too slowly there
        tie_word_embeddings=True,
        **special,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **special,
    )
    with seeded(seed), torch.no_grad():
        model = hf.LlavaForConditionalGeneration(config).float().eval()
        words = model.get_input_embeddings().weight
        words.copy_(0.3 * torch.randn(words.shape))
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(5)
    model.generation_config = hf.GenerationConfig(do_sample=False, max_new_tokens=32, **special)
    return model


def build_processor() -> Any:
    """The processor: words to ids, pictures to normalised 32x32 tensors, ``<image>`` to 16 placeholders.

    Returns
    -------
    transformers.LlavaProcessor
        Pads on the left.

    Raises
    ------
    UserError
        transformers is not installed.
    """
    hf = _transformers()
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<sep>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    pictures = hf.CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return hf.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def load_vlm(seed: int = 0, *, pretrained: bool = True, path: Path | None = None) -> tuple[Any, Any]:
    """The shipped model and its processor.

    Parameters
    ----------
    seed : int
        Training seed (0, 1 or 2); of the initial weights without `pretrained`.
    pretrained : bool
        False for random weights.
    path : Path, optional
        Weights made by ``tinyworld train vlm`` instead of the shipped ones.

    Returns
    -------
    model : transformers.LlavaForConditionalGeneration
        In eval mode, float32, on the CPU.
    processor : transformers.LlavaProcessor

    Raises
    ------
    UserError
        No weights for this seed, weights that do not fit, or transformers is not installed.
    """
    entry = LANGUAGE_MODELS["vlm"]
    if pretrained and path is None and seed not in entry.seeds:
        remedy = f"shipped: {', '.join(map(str, entry.seeds))}; make others with `tinyworld train vlm --seed {seed}`"
        raise UserError("no weights for this seed", where="tinyworld.vlm", given=seed, remedy=remedy)
    model = build_vlm(seed)
    if pretrained:
        tensors = read_weights(path or weights_path(entry.file(seed, "albums")))
        load_state(model, {**tensors, "lm_head.weight": tensors["model.language_model.embed_tokens.weight"]})
    return model, build_processor()


def save_vlm(folder: str | Path, seed: int = 0, *, pretrained: bool = True) -> Path:
    """Write a checkpoint folder that ``from_pretrained`` of transformers loads offline, whole or not at all.

    Parameters
    ----------
    folder : str or Path
        New, or empty.
    seed, pretrained
        As in `load_vlm`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    UserError
        The folder holds something; otherwise as `load_vlm`.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError("the folder holds something", where="save_vlm", given=folder, remedy="name a new one")
    model, processor = load_vlm(seed, pretrained=pretrained)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
        model.config.save_pretrained(partial)
        model.generation_config.save_pretrained(partial)
        # Not model.save_pretrained: that draws a progress bar.
        tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        processor.save_pretrained(partial)
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def answers(model: Any, processor: Any, albums: Sequence[Album], question: int = 0, batch: int = 40) -> list[str]:
    """What ``model.generate`` answers, greedily, to one question about every album.

    Parameters
    ----------
    model, processor
        From `load_vlm`.
    albums : sequence of Album
        Of any lengths: shorter prompts are padded on the left.
    question : int
        Index into `Album.questions`.
    batch : int
        Albums at a time.

    Returns
    -------
    list of str
        Words up to the end token, which is left out; an answer that does not end keeps "..." as its last word.
    """
    found = []
    for start in range(0, len(albums), batch):
        part = albums[start : start + batch]
        texts, images = [album.prompt(question) for album in part], [list(album.images) for album in part]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True).to(model.device, model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        for row in ids:
            end = row.index(model.config.eos_token_id) if model.config.eos_token_id in row else None
            found.append(processor.tokenizer.decode(row[:end]) + ("" if end is not None else " ..."))
    return found


def _check_shape(hidden: int, layers: int, heads: int, kv_heads: int) -> None:
    for what, value in (("hidden", hidden), ("layers", layers), ("heads", heads), ("kv_heads", kv_heads)):
        if value < 1:
            raise UserError(f"{what} must be positive", where="build_vlm", given=value)
    if hidden % (2 * heads) or heads % kv_heads:
        given, remedy = f"{hidden}, {heads}, {kv_heads}", "2 * heads must divide hidden, kv_heads must divide heads"
        raise UserError("hidden, heads and kv_heads do not fit", where="build_vlm", given=given, remedy=remedy)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        remedy = "pip install 'tinyworld[vlm]'"
        raise UserError("transformers is not installed", where="tinyworld.vlm", remedy=remedy) from error
    return transformers
