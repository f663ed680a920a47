"""Any `transformers` text, image, video or audio encoder, frozen: cells in, the states of all its layers out.

Needs the `encoders` extra. Nothing else in the package imports this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast._places import folder_or_repository
from crossan_fast.cache.build.inputs import (
    BrokenInput,
    count_samples,
    fit_spectrogram,
    read_audio,
    read_image,
    read_video,
)
from crossan_fast.cache.levels import Pooling

try:
    import transformers
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
except ImportError as error:
    raise ImportError(
        f"building a cache runs encoders of the transformers library, which cannot be imported ({error}); "
        "install it with `pip install crossan-fast[encoders]`"
    ) from error

Kind = Literal["text", "image", "video", "audio"]

_TOKENIZED_AT_ONCE = 4096


class FrozenEncoder:
    """One pretrained encoder and its preprocessing.

    The constructor reads configuration and preprocessor alone; `load` reads the weights.

    Args:
        source: a folder that `save_pretrained` wrote, or a name on the hub.
        kind: what it reads; needed only where a model reads two kinds (CLIP: its text or vision half is
            taken).
        max_length: tokens of a text, special ones included; longer ones are cut.
        lowercase: lower-case texts before the tokenizer sees them.

    Attributes:
        kind: `text`, `image`, `video` or `audio`.
        layers: K; `states` gives K + 1.
        width: D.
        fingerprint: SHA-256 of the weights, set by `load`.
        threads: how many threads may call `read` at once.
        mixes_sizes: whether inputs of different `sizes` may share a batch.

    Raises:
        FileNotFoundError, ValueError: the source cannot be loaded, or is no encoder this can run.
    """

    def __init__(
        self, source: str, *, kind: Kind | None = None, max_length: int = 30, lowercase: bool = False
    ) -> None:
        if kind is not None and kind not in get_args(Kind):
            known = get_args(Kind)
            raise ValueError(f"kind: expected one of {known}, got {kind!r}{nearest(kind, known)}")
        folder = folder_or_repository(source, "encoder")
        self.source = source if folder is None else str(folder.resolve())
        self.max_length = max_length
        self.lowercase = lowercase
        self.fingerprint = ""
        config = self._whole_config = self._pretrained(AutoConfig)
        if type(config) not in MODEL_MAPPING:
            raise ValueError(f"encoder {source!r}: transformers has no model for {type(config).__name__}")
        model_class: Any = MODEL_MAPPING[type(config)]
        self._input_name: str = model_class.main_input_name
        self._part = ""
        if hasattr(config, "vision_config"):
            config = self._choose_half(config, kind)
        elif config.is_encoder_decoder:
            self._part = "encoder"
        self._config = config
        self.model_type: str = config.model_type
        self.kind: Kind = kind or _kind_of(config, self._input_name)
        self.layers = self._from_config("num_hidden_layers")
        self.width = self._from_config("hidden_size")
        self._processor = self._load_processor()
        self.threads = 1 if self.kind == "text" else 4  # fast tokenizers may not be shared between threads
        self._waveforms = self.kind == "audio" and not hasattr(config, "num_mel_bins")
        self.mixes_sizes = not self._waveforms
        self._model: Any = None
        self._device, self._dtype = torch.device("cpu"), torch.float32

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Read the weights onto `device`, frozen, in evaluation mode, and compute in `dtype`."""
        bar = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            model, info = self._pretrained(AutoModel, dtype=dtype, output_loading_info=True)
        finally:
            if bar:
                transformers.utils.logging.enable_progress_bar()
        prefix = f"{self._part}." if self._part else ""
        # A pooler or a mask token plays no part in hidden states; anything else left at random spoils them
        # all.
        random = sorted(
            key
            for key in info["missing_keys"]
            if key.startswith(prefix) and "pooler" not in key and "mask" not in key
        )
        if random:
            raise ValueError(
                f"encoder {self.source!r}: the checkpoint lacks {len(random)} weights of "
                f"{type(model).__name__}, first {random[0]!r}"
            )
        if self._part:
            model = getattr(model, self._part)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._dtype = device, dtype
        self.fingerprint = _fingerprint(model)

    def unload(self) -> None:
        """Let go of the weights."""
        self._model = None

    def check_pooling(self, pooling: Pooling) -> None:
        """Raise where `cls` is asked of an encoder without a class token (VideoMAE, wav2vec 2)."""
        if pooling != "cls" or self.kind == "text":
            return
        with torch.device("meta"):  # its shape alone: no weights are read or made
            model: Any = AutoModel.from_config(self._whole_config)
        model = getattr(model, self._part) if self._part else model
        names = (name.rsplit(".", 1)[-1] for name, _ in model.named_parameters())
        if not any(name in ("cls_token", "class_embedding", "class_token") for name in names):
            raise ValueError(
                f"pool: encoder {self.source!r} ({self.model_type}) has no class token; expected pool=mean"
            )

    def sizes(self, cells: Sequence[str | Path]) -> list[int]:
        """What batches are sorted by: tokens of a text, samples of a waveform, 0 for inputs of one size."""
        if self.kind == "text":
            lengths: list[int] = []
            for start in range(0, len(cells), _TOKENIZED_AT_ONCE):
                texts = [self._text(str(cell)) for cell in cells[start : start + _TOKENIZED_AT_ONCE]]
                lengths += [len(tokens) for tokens in self._tokenize(texts)]
            return lengths
        if self._waveforms:
            return [count_samples(Path(cell), self._processor.sampling_rate) for cell in cells]
        return [0] * len(cells)

    def read(self, cell: str | Path) -> Tensor:
        """One cell as a model input without its batch dimension. Raises `BrokenInput`."""
        if self.kind == "text":
            text = self._text(str(cell))
            if not text.strip():
                raise BrokenInput("empty text")
            return torch.tensor(self._tokenize([text])[0])
        if self.kind == "image":
            return self._processed([read_image(Path(cell))])[0]
        if self.kind == "video":
            frames = getattr(self._config, "num_frames", None) or self._config.frames_per_clip
            return self._processed(list(read_video(Path(cell), frames)))
        return self._read_audio(Path(cell))

    @torch.inference_mode()
    def states(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """K + 1 states `[B, T, D]` of a batch of inputs, and bool `[B, T]`, True at real tokens, or None."""
        mask = None
        arguments: dict[str, Tensor] = {}
        if self.kind == "text":
            batch = torch.nn.utils.rnn.pad_sequence(
                list(inputs), batch_first=True, padding_value=self._processor.pad_token_id
            ).to(self._device)
            lengths = torch.tensor([len(tokens) for tokens in inputs], device=self._device)
            mask = torch.arange(batch.shape[1], device=self._device) < lengths.unsqueeze(1)
            arguments["attention_mask"] = mask.long()
        else:
            if len({tuple(tensor.shape) for tensor in inputs}) > 1:
                shapes = sorted({tuple(tensor.shape) for tensor in inputs})
                raise ValueError(
                    f"encoder {self.source!r}: its preprocessor gives inputs of different sizes, {shapes[0]} "
                    f"and {shapes[-1]}; set a fixed size or crop in its preprocessor_config.json"
                )
            batch = torch.stack(list(inputs)).to(self._device, self._dtype)
        output = self._model(**{self._input_name: batch}, **arguments, output_hidden_states=True)
        hidden = output.hidden_states
        if hidden is None or len(hidden) != self.layers + 1 or hidden[-1].shape[-1] != self.width:
            found = None if hidden is None else [list(state.shape) for state in hidden]
            raise ValueError(
                f"encoder {self.source!r} ({self.model_type}): expected {self.layers + 1} hidden states "
                f"[B, T, {self.width}], got {found}"
            )
        return hidden, mask

    def _text(self, text: str) -> str:
        return text.lower() if self.lowercase else text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        encoded = self._processor(texts, truncation=True, max_length=self.max_length, padding=False)
        return list(encoded["input_ids"])

    def _processed(self, images: list[Any]) -> Tensor:
        """`[n, 3, H, W]` of uint8 images `[H, W, 3]`."""
        from PIL import Image

        # As Pillow images: of a small array the processor would have to guess which side the channels are.
        pixels = self._processor([Image.fromarray(image) for image in images], return_tensors="np")
        array = np.asarray(pixels["pixel_values"], dtype=np.float32)
        return torch.from_numpy(array.reshape(len(images), *array.shape[-3:]))

    def _read_audio(self, path: Path) -> Tensor:
        sound = read_audio(path, getattr(self._processor, "sampling_rate", 16_000))
        if sound.ndim == 2:
            if self._waveforms or self._part:
                raise BrokenInput(f"{self.model_type} takes waveforms, got an array {list(sound.shape)}")
            fitted = fit_spectrogram(sound, self._config.max_length, self._config.num_mel_bins)
            return torch.from_numpy(fitted)
        if self._processor is None:
            raise BrokenInput("the encoder has no feature extractor, it can read spectrograms alone")
        try:
            features = self._processor(
                sound, sampling_rate=self._processor.sampling_rate, return_tensors="np"
            )
        except (ValueError, AssertionError) as error:  # too short for one window
            raise BrokenInput(f"unusable waveform of {len(sound)} samples: {error}") from error
        return torch.from_numpy(np.asarray(features[self._input_name][0], dtype=np.float32))

    def _load_processor(self) -> Any:
        if self.kind == "text":
            tokenizer = self._pretrained(AutoTokenizer)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token  # masked out; any known token will do
            if self.max_length > tokenizer.model_max_length:
                raise ValueError(
                    f"max_length: encoder {self.source!r} reads up to {tokenizer.model_max_length} tokens, "
                    f"got {self.max_length}"
                )
            return tokenizer
        if self.kind == "audio":
            try:
                return self._pretrained(AutoFeatureExtractor)
            except ValueError:
                if not hasattr(self._config, "num_mel_bins"):
                    raise
                return None  # spectrograms need none; a waveform will say what is missing
        # One backend whatever is installed, so that caches built on two machines agree.
        version = int(transformers.__version__.split(".")[0])
        pillow = {"backend": "pil"} if version >= 5 else {"use_fast": False}
        return self._pretrained(AutoImageProcessor, **pillow)

    def _choose_half(self, config: Any, kind: Kind | None) -> Any:
        halves = {"text": "text", "image": "vision", "audio": "audio"}
        half = halves.get(kind or "")
        if half is None or not hasattr(config, f"{half}_config"):
            raise ValueError(
                f"kind: encoder {self.source!r} reads text and images; expected kind=text or kind=image"
            )
        self._part = f"{half}_model"
        self._input_name = "input_ids" if kind == "text" else "pixel_values"
        return getattr(config, f"{half}_config")

    def _from_config(self, name: str) -> int:
        value = getattr(self._config, name, None)
        if not isinstance(value, int):
            raise ValueError(
                f"encoder {self.source!r} ({self.model_type}): expected a {name} in its configuration, "
                f"got {value!r}"
            )
        return value

    def _pretrained(self, loader: Any, **options: Any) -> Any:
        try:
            # Off, not the default: that asks on a terminal whether a repository's own code may run.
            return loader.from_pretrained(self.source, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError) as error:
            first = " ".join(str(error).split(". ")[0].split())
            raise ValueError(f"encoder {self.source!r}: {loader.__name__} cannot load it: {first}") from error


def _kind_of(config: Any, input_name: str) -> Kind:
    if input_name == "input_ids":
        return "text"
    if input_name in ("input_values", "input_features"):
        return "audio"
    video = hasattr(config, "num_frames") or hasattr(config, "frames_per_clip")
    return "video" if video else "image"


def _fingerprint(model: Any) -> str:
    """SHA-256 of all weights but poolers', whatever their names: those change with the library's version."""
    digests = []
    for name, tensor in model.state_dict().items():
        if "pooler" not in name:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests.append(hashlib.sha256(f"{list(tensor.shape)}".encode() + raw.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
