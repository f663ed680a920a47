"""IISAN's public weights in a CrossanModel: against a small model with the public code's names and rules."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crossan_fast import CrossanModel, cli

LEVELS, RANK, D, WINDOW, ITEMS = 3, 5, 8, 4, 20


class Adapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc_down, self.fc_up = nn.Linear(width, RANK), nn.Linear(RANK, width)

    def forward(self, x):
        return x + self.fc_up(F.relu(self.fc_down(x)))


def gates():
    return nn.ParameterList([nn.Parameter(torch.randn(1) * 0.1) for _ in range(LEVELS)])


class Items(nn.Module):
    """Two intra towers, one inter tower, two-layer heads; `asym` narrows as Code_Cached_Asym does."""

    def __init__(self, image, text, asym):
        super().__init__()
        both = min(image, text)
        self.cv_adapter_list = nn.ModuleList(Adapter(image) for _ in range(LEVELS))
        self.bert_adapter_list = nn.ModuleList(Adapter(text) for _ in range(LEVELS))
        self.mm_adapter_list = nn.ModuleList(Adapter(both) for _ in range(LEVELS))
        self.side_gate_params_cv, self.side_gate_params_text = gates(), gates()
        self.side_gate_params_mm = gates()
        self.fc_cv, self.cv_pre_fc = (
            nn.Linear(image, D if asym else image),
            nn.Linear(D if asym else image, D),
        )
        self.fc_bert, self.bert_pre_fc = (
            nn.Linear(text, D if asym else text),
            nn.Linear(D if asym else text, D),
        )
        self.fc_mm, self.fc_mm_down = nn.Linear(both, both), nn.Linear(both, D)
        self.wide_text = text > image
        if text != image:
            wide = max(image, text)
            self.down_project_list = nn.ModuleList(nn.Linear(wide, both) for _ in range(LEVELS))

    def forward(self, image, text):
        """image, text `[N, L, D]` → `[N, 3d]`."""
        h_image, h_text, h_both = 0, 0, 0
        for level in range(LEVELS):
            g_image, g_text, g_both = (
                torch.sigmoid(gate[level] / 0.1)
                for gate in (self.side_gate_params_cv, self.side_gate_params_text, self.side_gate_params_mm)
            )
            c_image, c_text = image[:, level], text[:, level]
            h_image = self.cv_adapter_list[level](g_image * c_image + (1 - g_image) * h_image)
            h_text = self.bert_adapter_list[level](g_text * c_text + (1 - g_text) * h_text)
            if hasattr(self, "down_project_list"):
                if self.wide_text:
                    c_text = self.down_project_list[level](c_text)
                else:
                    c_image = self.down_project_list[level](c_image)
            h_both = self.mm_adapter_list[level](h_both + g_both * c_image + (1 - g_both) * c_text)
        return torch.cat(
            [
                self.cv_pre_fc(self.fc_cv(h_image)),
                self.bert_pre_fc(self.fc_bert(h_text)),
                self.fc_mm_down(self.fc_mm(h_both)),
            ],
            dim=1,
        )


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_Q, self.w_K, self.w_V, self.fc = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x, mask):
        batch, places, _ = x.shape
        q, k, v = (
            w(x).view(batch, places, 2, D // 2).transpose(1, 2) for w in (self.w_Q, self.w_K, self.w_V)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) / (D // 2) ** 0.5 + mask, dim=-1)
        return self.layer_norm(x + self.fc((weights @ v).transpose(1, 2).reshape(batch, places, D)))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.layer_norm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x):
        return self.layer_norm(x + self.w_2(F.relu(self.w_1(x))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.multi_head_attention, self.feed_forward = SelfAttention(), FeedForward()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.position_embedding = nn.Embedding(WINDOW, D)
        self.layer_norm = nn.LayerNorm(D, eps=1e-6)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, real):
        mask = torch.where(torch.tril(real[:, None, None, :].expand(-1, 1, WINDOW, -1)), 0.0, -1e9)
        x = self.layer_norm(x + self.position_embedding.weight)
        for block in self.transformer_blocks:
            x = block.feed_forward(block.multi_head_attention(x, mask))
        return x


class Public(nn.Module):
    def __init__(self, image, text, asym):
        super().__init__()
        self.mm_encoder = Items(image, text, asym)
        self.com_dense = nn.Linear(3 * D, D)
        self.user_encoder = nn.ModuleDict({"transformer_encoder": Encoder()})

    def embed(self, image, text):
        return self.com_dense(self.mm_encoder(image, text))

    def loss(self, ids, image, text, popularity):
        """As the public code computes it: −1e4 for what is masked, one loop over users, one over places."""
        batch, places = ids.shape
        flat = ids.reshape(-1)
        items = self.embed(image[flat], text[flat])
        users = self.user_encoder["transformer_encoder"](
            items.view(batch, places, D)[:, :-1], ids[:, :-1] != 0
        )
        logits = users @ items.T - torch.log(popularity[flat])
        logits[:, :, flat == 0] = -1e4
        labels = torch.arange(batch * places).view(batch, places)[:, 1:]
        for b in range(batch):
            own = torch.isin(flat, ids[b])
            for s in range(places - 1):
                blocked = own.clone()
                blocked[labels[b, s]] = False
                logits[b, s, blocked] = -1e4
        rows = ids[:, :-1] != 0
        return F.cross_entropy(logits[rows], labels[rows])


def make(image, text, asym):
    public = Public(image, text, asym).eval()
    states = [torch.randn(ITEMS + 1, LEVELS, width) for width in (image, text)]
    for state in states:
        state[0] = 0
    return public, *states


@pytest.mark.parametrize(("image", "text", "asym"), [(12, 12, False), (12, 20, True), (20, 12, True)])
def test_public_weights_give_the_public_embeddings_and_loss(image, text, asym):
    public, c_image, c_text = make(image, text, asym)
    # As saved by the public trainer: wrapped for several processes, with the frozen backbones inside.
    saved = {f"module.{name}": tensor for name, tensor in public.state_dict().items()}
    saved["module.mm_encoder.cv_encoder.image_net.vit.layernorm.weight"] = torch.ones(3)
    model = CrossanModel.from_iisan(saved).eval()
    ids = torch.tensor([[0, 0, 3, 2, 5], [1, 4, 4, 5, 9], [0, 5, 1, 1, 2], [7, 8, 9, 10, 11]])
    counts = torch.randint(1, 9, (ITEMS + 1,))
    model.set_popularity(counts)
    with torch.no_grad():
        want = public.embed(c_image, c_text)
        have = model.encode_items({"image": c_image, "text": c_text})
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
        want = public.loss(ids, c_image, c_text, torch.cat([torch.ones(1), counts[1:] / counts[1:].sum()]))
        states = {"image": c_image[ids], "text": c_text[ids]}
        torch.testing.assert_close(model(ids, states).loss, want, rtol=1e-5, atol=1e-5)
        # every tensor of ours came from theirs
        fresh = CrossanModel.from_iisan(saved)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_what_cannot_be_represented_is_named():
    public, *_ = make(12, 12, False)
    saved = public.state_dict()
    short = {k: v for k, v in saved.items() if not k.startswith("mm_encoder.bert_adapter_list.2")}
    with pytest.raises(ValueError, match=r"adapter lists of one length .*'image': 3, 'text': 2"):
        CrossanModel.from_iisan(short)
    del saved["com_dense.bias"]
    with pytest.raises(ValueError, match=r"expected 'com_dense.bias' as in IISAN's public code"):
        CrossanModel.from_iisan(saved)


def test_a_weight_that_is_not_finite_is_refused_by_its_public_name():
    for name in (
        "mm_encoder.bert_adapter_list.1.fc_up.weight",
        "mm_encoder.side_gate_params_mm.2",
        "com_dense.bias",
        "user_encoder.transformer_encoder.transformer_blocks.1.feed_forward.w_2.weight",
    ):
        saved = {key: tensor.clone() for key, tensor in make(12, 12, False)[0].state_dict().items()}
        saved[name].view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=rf"state_dict: {re.escape(name)}.*nan"):
            CrossanModel.from_iisan(saved)
    saved = {key: tensor.clone() for key, tensor in make(12, 12, False)[0].state_dict().items()}
    saved["mm_encoder.cv_encoder.weight"] = torch.full((2,), float("nan"))
    CrossanModel.from_iisan(saved)  # a frozen backbone's is not read


def checkpoint(path, public):
    """As the public trainer writes it."""
    optimizer = torch.optim.Adam(public.parameters())
    torch.save(
        {
            "model_state_dict": {f"module.{name}": tensor for name, tensor in public.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "rng_state": torch.get_rng_state(),
        },
        path,
    )


def test_a_checkpoint_becomes_a_folder(tmp_path, capsys):
    public, c_image, c_text = make(12, 20, True)
    checkpoint(tmp_path / "epoch-3.pt", public)
    torch.save(public.state_dict(), tmp_path / "bare.pt")
    for name in ("epoch-3", "bare"):
        out = tmp_path / name
        assert cli.main(["convert", "iisan", f"{out}.pt", str(out)]) == 0
        assert "IISAN of image 12, text 20; 3 levels" in capsys.readouterr().out
        model = CrossanModel.from_pretrained(out).eval()
        with torch.no_grad():
            have = model.encode_items({"image": c_image, "text": c_text})
            torch.testing.assert_close(have, public.embed(c_image, c_text), rtol=1e-5, atol=1e-5)
    assert cli.main(["convert", "iisan", f"{out}.pt", str(out)]) == 2
    assert "out: expected a folder without a model" in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return print, ("this ran",)


def test_what_is_no_checkpoint_is_said_and_no_code_in_it_runs(tmp_path, capsys):
    torch.save({"model_state_dict": {}, "hook": Payload()}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("not a torch file")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3, "model_state_dict": None}, tmp_path / "empty.pt")
    torch.save({"embedding.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    whole = tmp_path / "whole.pt"
    checkpoint(whole, make(12, 12, False)[0])
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, message in (
        ("code", "cannot be read, expected a torch file of tensors alone"),
        ("text", "cannot be read, expected a torch file"),
        ("cut", "cannot be read, expected a torch file"),
        ("list", "expected a state dict, or one under model_state_dict or state_dict or model, got a list"),
        ("empty", "got a dict of ['epoch', 'model_state_dict']"),
        ("other", "state_dict: expected adapter lists of one length"),
        ("gone", "checkpoint: no file"),
    ):
        assert cli.main(["convert", "iisan", str(tmp_path / f"{name}.pt"), str(tmp_path / "out")]) == 2
        written = capsys.readouterr()
        assert message in written.err and "this ran" not in written.out
    assert not (tmp_path / "out").exists()
