"""Raw cells of an items file, read into what an encoder takes: text, images, frames, waveforms, spectrograms.

    text     the cell itself
    image    a file that Pillow opens, or a .npy of uint8 [H, W, 3]
    video    a folder of frames (images, in natural order of their names), or a .npy or .npz of
             uint8 [T, H, W, 3]
    audio    a PCM .wav, or a .npy: float [samples], a mono waveform at the encoder's sampling rate, or float
             [frames, mel], a spectrogram as the encoder takes it (padded with zeros or cut to its length)

Every reader raises `BrokenInput`, with the reason in a few words, for an input that cannot be used.
"""

from __future__ import annotations

import math
import re
import wave
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".npy"}

Array = npt.NDArray[np.generic]


class BrokenInput(ValueError):
    """One item's input cannot be used; the item goes without this modality."""


def read_image(path: Path) -> Array:
    """uint8 `[H, W, 3]`."""
    if path.suffix == ".npy":
        return _pixels(_load_array(path), 3, "[H, W, 3]")
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise BrokenInput("no such file") from None
    # Decoders of damaged files also raise SyntaxError (PNG), EOFError and ValueError.
    except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenInput(f"unreadable image: {_brief(error)}") from error


def frame_files(folder: Path) -> list[Path]:
    """The frames of a clip that is a folder, in order."""
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=_natural)


def read_video(path: Path, frames: int) -> Array:
    """uint8 `[frames, H, W, 3]`, evenly spaced, first and last included; shorter clips repeat frames."""
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise BrokenInput("folder without frames")
        images = [read_image(files[index]) for index in _spread(len(files), frames)]
        if len({image.shape for image in images}) > 1:
            raise BrokenInput("frames differ in size")
        return np.stack(images)
    if path.suffix not in (".npy", ".npz"):
        if not path.exists():
            raise BrokenInput("no such file")
        raise BrokenInput(f"expected a folder of frames, .npy or .npz, got {path.suffix or path.name}")
    clip = _pixels(_load_array(path), 4, "[T, H, W, 3]")
    return clip[_spread(len(clip), frames)]


def read_audio(path: Path, rate: int) -> Array:
    """float32 `[samples]` at `rate` (channels averaged, other rates resampled), or `[frames, mel]`."""
    if path.suffix == ".npy":
        sound = _load_array(path)
        if sound.ndim not in (1, 2) or not np.issubdtype(sound.dtype, np.floating):
            raise BrokenInput(
                f"expected floats [samples] or [frames, mel], got {sound.dtype} {list(sound.shape)}"
            )
        sound = sound.astype(np.float32)
    else:
        sound = _resampled(*_read_wave(path), rate)
    if sound.size == 0:
        raise BrokenInput("empty sound")
    if not np.isfinite(sound).all():
        raise BrokenInput("NaN or inf in the sound")
    return sound


def count_samples(path: Path, rate: int) -> int:
    """Samples that `read_audio` will give, from the file's header alone; 0 where it will not."""
    try:
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r", allow_pickle=False))
        with wave.open(str(path), "rb") as file:
            return math.ceil(file.getnframes() * rate / file.getframerate())
    except (OSError, ValueError, EOFError, wave.Error, TypeError, ZeroDivisionError):
        return 0


def fit_spectrogram(spectrogram: Array, frames: int, bins: int) -> Array:
    """`[frames, bins]`: zeros behind a short spectrogram, a long one cut."""
    if spectrogram.shape[1] != bins:
        raise BrokenInput(f"expected a spectrogram of {bins} mel bins, got {list(spectrogram.shape)}")
    fitted = np.zeros((frames, bins), dtype=np.float32)
    kept = min(frames, len(spectrogram))
    fitted[:kept] = spectrogram[:kept]
    return fitted


def _load_array(path: Path) -> Array:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                raise BrokenInput(f"expected one array in the .npz, got {len(loaded.files)}")
            return np.asarray(loaded[loaded.files[0]])
    except FileNotFoundError:
        raise BrokenInput("no such file") from None
    except BrokenInput:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BrokenInput(f"unreadable array: {_brief(error)}") from error


def _pixels(array: Array, dimensions: int, wanted: str) -> Array:
    if array.dtype != np.uint8 or array.ndim != dimensions or array.shape[-1] != 3 or array.size == 0:
        raise BrokenInput(f"expected uint8 {wanted}, got {array.dtype} {list(array.shape)}")
    return array


def _read_wave(path: Path) -> tuple[Array, int]:
    """float32 `[samples]` in -1..1 and the file's sampling rate."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise BrokenInput("no such file") from None
    except (OSError, EOFError, wave.Error) as error:
        raise BrokenInput(f"unreadable sound: {_brief(error)}") from error
    data = data[: len(data) // (width * channels) * (width * channels)]
    if width == 1:
        samples = np.frombuffer(data, np.uint8).astype(np.float32) - 128
    elif width == 3:
        # As the upper three bytes of an int32, so that the sign comes out right.
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = (padded.view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        samples = np.frombuffer(data, f"<i{width}").astype(np.float32)
    return samples.reshape(-1, channels).mean(axis=1) / np.float32(2 ** (8 * width - 1)), rate


def _resampled(samples: Array, have: int, want: int) -> Array:
    if have == want or samples.size == 0:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise BrokenInput(f"sampling rate {have}, the encoder wants {want}; resampling needs scipy") from None
    common = math.gcd(have, want)
    return np.asarray(resample_poly(samples, want // common, have // common), dtype=np.float32)


def _spread(have: int, want: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, have - 1, want).round().astype(np.int64)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
