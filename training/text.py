"""Both tokenizers of the nano model, from the words that its prompts use, and prompts through the encoders.

T5 gets a SentencePiece unigram model, CLIP a byte-pair encoding; both fold the case and know every letter,
so that a prompt of unseen words is spelt out and not lost.
"""

import io
import json
import string
import tempfile
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from training.looks import COLOUR_NAMES, FAMILIES
from training.models import MAX_SEQUENCE_LENGTH, VOCABULARY
from training.pool import POOL

# Words that people put around a subject and a look.
COMMON = [
    "a an the of in on at with and or to for from by as is are this that it its my style drawing picture",
    "photo image painting portrait illustration art look looks made drawn painted draw paint make turn",
    "render in the style of a picture of a photo of an illustration of a painting of man woman person",
    "girl boy child dog cat bird fish animal flower tree house car street city mountain sea beach forest",
    "sky sun moon star snow rain night day morning evening light dark bright soft warm cold big small old",
    "new young happy sad smiling sitting standing running flying eating drinking holding wearing hat",
    "dress shirt glasses table chair window door garden kitchen room background ground white black red",
    "green blue yellow orange purple pink brown grey gold silver watercolour watercolor oil sketch pencil",
    "ink cartoon anime comic pixel vintage retro modern minimal detailed",
]


def prompt_corpus() -> list[str]:
    """Names of subjects and words of looks as the pool has them; nothing held out."""
    subjects = [s["name"] for s in json.loads((POOL / "subjects.json").read_text()) if not s["held_out"]]
    looks = [
        look["words"]
        for path in sorted(POOL.glob("train-*"))
        for look in json.loads((path / "looks.json").read_text())
    ]
    return subjects * 2 + looks


def build_tokenizers(folder: Path) -> None:
    """Train CLIP's and T5's tokenizer on the pool's prompts and save them to `folder`.

    Each has at most VOCABULARY entries.
    """
    corpus = [
        *prompt_corpus(),
        *COMMON * 3,
        *FAMILIES,
        *COLOUR_NAMES,
        *string.ascii_lowercase,
        *string.digits,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        _train_clip(corpus, Path(scratch)).save_pretrained(folder / "tokenizer")
        _train_t5(corpus, Path(scratch)).save_pretrained(folder / "tokenizer_2")


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """CLIP's and T5's tokenizer as saved by `build_tokenizers`, or by a pipeline."""
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5TokenizerFast.from_pretrained(
        folder / "tokenizer_2"
    )


def encode_prompts(
    tokenizers: tuple[CLIPTokenizer, T5TokenizerFast], encoders: nn.ModuleDict, prompts: list[str]
) -> tuple[Tensor, Tensor]:
    """T5 states `(B, MAX_SEQUENCE_LENGTH, D)` and pooled CLIP `(B, P)`; equal prompts are encoded once."""
    unique = sorted(set(prompts))
    place = next(encoders.parameters()).device
    index = torch.tensor([unique.index(prompt) for prompt in prompts], device=place)
    clip, t5 = tokenizers
    t5_ids = t5(
        unique, padding="max_length", truncation=True, max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt"
    ).input_ids
    # Causal, and read at its end: CLIP needs no padding to 77 here.
    clip_ids = clip(unique, padding=True, truncation=True, return_tensors="pt").input_ids
    states = encoders["text_encoder_2"](t5_ids.to(place)).last_hidden_state
    pooled = encoders["text_encoder"](clip_ids.to(place)).pooler_output
    return states[index], pooled[index]


def _train_clip(corpus: list[str], folder: Path) -> CLIPTokenizer:
    blank = CLIPTokenizer()  # for its normalizer and pre-tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = blank.backend_tokenizer.normalizer
    backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    backend.train_from_iterator(corpus, trainer)
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    # The two special tokens come last, as in CLIP.
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _train_t5(corpus: list[str], folder: Path) -> T5TokenizerFast:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)
