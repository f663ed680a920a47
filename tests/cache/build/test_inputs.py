"""Reading raw inputs: sounds of every sample width, frames in order, and one reason for each broken file."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from crossan_fast.cache.build.inputs import (
    BrokenInput,
    count_samples,
    fit_spectrogram,
    read_audio,
    read_image,
    read_video,
)


def write_wave(path: Path, integers: np.ndarray, width: int, channels: int = 1, rate: int = 16_000) -> None:
    """PCM from integers, written out byte by byte."""
    data = b"".join(
        int(v + 128).to_bytes(1, "little") if width == 1 else int(v).to_bytes(width, "little", signed=True)
        for v in integers.reshape(-1)
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_waves_of_every_width(tmp_path: Path, width: int, channels: int) -> None:
    top = 2 ** (8 * width - 1)
    values = np.random.default_rng(0).integers(-top, top, (50, channels))
    values[0], values[1] = -top, top - 1
    write_wave(tmp_path / "a.wav", values, width, channels)
    sound = read_audio(tmp_path / "a.wav", 16_000)
    assert sound.dtype == np.float32
    np.testing.assert_allclose(sound, (values / top).mean(axis=1), rtol=1e-6, atol=1e-7)
    assert count_samples(tmp_path / "a.wav", 16_000) == 50


def test_other_rates_are_resampled(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="resampling needs scipy")
    time = np.arange(4410) / 44_100
    tone = (20_000 * np.sin(2 * np.pi * 440 * time)).astype(int)
    write_wave(tmp_path / "a.wav", tone, 2, rate=44_100)
    sound = read_audio(tmp_path / "a.wav", 16_000)
    assert len(sound) == count_samples(tmp_path / "a.wav", 16_000) == 1600
    truth = 20_000 / 32_768 * np.sin(2 * np.pi * 440 * np.arange(1600) / 16_000)
    assert np.abs(sound - truth)[50:-50].max() < 5e-3


def test_frames_are_spread_and_in_natural_order(tmp_path: Path) -> None:
    for number in range(1, 12):
        np.save(tmp_path / f"frame{number}.npy", np.full((2, 3, 3), number, np.uint8))
    assert read_video(tmp_path, 6)[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9, 11]
    assert read_video(tmp_path, 1)[:, 0, 0, 0].tolist() == [1]
    np.save(tmp_path / "short.npy", np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1).repeat(3, axis=3))
    assert read_video(tmp_path / "short.npy", 4)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_spectrograms_are_padded_or_cut() -> None:
    spectrogram = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(fit_spectrogram(spectrogram, 2, 3), spectrogram[:2])
    padded = fit_spectrogram(spectrogram, 6, 3)
    assert np.array_equal(padded[:4], spectrogram) and not padded[4:].any()
    with pytest.raises(BrokenInput, match=r"expected a spectrogram of 5 mel bins, got \[4, 3\]"):
        fit_spectrogram(spectrogram, 4, 5)


def test_reasons(tmp_path: Path) -> None:
    np.save(tmp_path / "ints.npy", np.zeros(5, np.int16))
    np.save(tmp_path / "nothing.npy", np.zeros(0))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", np.zeros(1), np.zeros(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:40])
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    (tmp_path / "frames").mkdir()
    np.save(tmp_path / "frames" / "1.npy", np.zeros((2, 3, 3), np.uint8))
    np.save(tmp_path / "frames" / "2.npy", np.zeros((3, 3, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    for name, reason in (
        ("ints.npy", r"expected floats \[samples\] or \[frames, mel\], got int16 \[5\]"),
        ("nothing.npy", "empty sound"),
        ("pickle.npy", "unreadable array: Object arrays cannot be loaded"),
        ("cut.wav", "unreadable sound"),
        ("gone.wav", "no such file"),
        ("gone.npy", "no such file"),
    ):
        with pytest.raises(BrokenInput, match=reason):
            read_audio(tmp_path / name, 16_000)
    assert count_samples(tmp_path / "cut.wav", 16_000) == count_samples(tmp_path / "gone.npy", 16_000) == 0
    for name, reason in (
        ("two.npz", r"expected one array in the .npz, got 2"),
        ("cut.npz", "unreadable array"),
        ("frames", "frames differ in size"),
        ("empty", "folder without frames"),
        ("gone.mp4", "no such file"),
        ("cut.wav", "expected a folder of frames, .npy or .npz, got .wav"),
        ("ints.npy", r"expected uint8 \[T, H, W, 3\], got int16 \[5\]"),
    ):
        with pytest.raises(BrokenInput, match=reason):
            read_video(tmp_path / name, 4)
    for name, reason in (
        ("gone.png", "no such file"),
        ("cut.wav", "unreadable image"),
        ("empty", "unreadable image"),
    ):
        with pytest.raises(BrokenInput, match=reason):
            read_image(tmp_path / name)
