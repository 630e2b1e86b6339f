"""The promises of the anatomy: all writers, only writers, the right axis, the right gain, and gaps that are told."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pico
from perpend.errors import UsageError
from perpend.models.anatomy import Anatomy, Writer

ALL = (*pico.FAMILIES, *pico.EXOTIC)
CARRYING = tuple(family for family in ALL if family != "gemma3n_text")
"""Families whose layers hand on their input as it is; Gemma 3n mixes four streams and adds a normed copy of one."""
SQUARE = {"intermediate_size": pico.HIDDEN}
"""With this, down-projections are square too: no shape can tell their axes apart."""
SQUARE_BY_FAMILY = {
    "gpt2": {"n_inner": pico.HIDDEN},
    "opt": {"ffn_dim": pico.HIDDEN},
    "mamba2": {"expand": 1, "num_heads": 4},
    "llama4_text": {"intermediate_size": pico.HIDDEN, "intermediate_size_mlp": pico.HIDDEN},
}
EXPERTS_SQUARE = {"moe_intermediate_size": pico.HIDDEN}
ROUTED = (
    "qwen3_moe",
    "qwen2_moe",
    "deepseek_v3",
    "qwen3_next",
    "qwen3_5_moe_text",
    "glm4_moe",
    "lfm2_moe",
    "nemotron_h",
    "gemma4_moe",
)
TOKENS = torch.tensor([[40, 70, 110, 150, 190, 230], [300, 60, 20, 333, 99, 100]])


def square(family: str) -> nn.Module:
    extra = EXPERTS_SQUARE if family in ROUTED else {}
    return pico.build(family, **SQUARE_BY_FAMILY.get(family, SQUARE), **extra)


@contextmanager
def residuals(model: nn.Module, anatomy: Anatomy) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect what enters and leaves every decoder layer."""
    kept: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        kept.append((entered, output[0] if isinstance(output, tuple) else output))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in anatomy.layer_modules(model)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@torch.no_grad()
def silenced(family: str) -> tuple[nn.Module, Anatomy]:
    """Return a model of which no writer writes."""
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    assert anatomy.gaps == ()
    for writer in anatomy.writers:
        writer.weight(model).zero_()
        if writer.bias:
            writer.bias_of(model).zero_()
    return model, anatomy


@pytest.mark.parametrize("family", CARRYING)
def test_layers_are_the_identity_without_their_writers(family):
    model, anatomy = silenced(family)
    with residuals(model, anatomy) as kept:
        run(model)
    assert len(kept) == anatomy.n_layers
    for entered, left in kept:
        torch.testing.assert_close(left, entered)


def test_layers_of_gemma_3n_only_mix_their_streams_and_a_normed_copy_without_their_writers():
    model, anatomy = silenced("gemma3n_text")
    with residuals(model, anatomy) as kept, torch.no_grad():
        run(model)
        for layer, (entered, left) in zip(anatomy.layer_modules(model), kept, strict=True):
            copy = layer.input_layernorm(layer.altup.predict(entered)[:1])
            known = torch.cat([entered, copy]).permute(1, 2, 3, 0)  # [B, T, d, streams + 1]
            wanted = left.permute(1, 2, 3, 0)
            mixed = known @ torch.linalg.lstsq(known, wanted).solution
            torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_writer_of_gemma_3n_writes_a_removed_direction():
    model = pico.build("gemma3n_text")
    anatomy, kept = Anatomy.of(model), []
    v = F.normalize(torch.randn(anatomy.hidden_size, generator=torch.Generator().manual_seed(3)), dim=0)
    ends = ("linear_right", "o_proj", "down_proj", "per_layer_projection")
    assert [w.name.rpartition(".")[2] for w in anatomy.writers] == [*ends] * pico.LAYERS
    for writer in anatomy.writers:
        weight = writer.weight(model)
        u = F.normalize(anatomy.post_norm_gain(model, writer) * v, dim=0)
        weight.sub_(u[:, None] * (u @ weight))
        model.get_submodule(writer.post_norm).register_forward_hook(lambda m, x, y: kept.append(y))
    run(model)
    assert len(kept) == len(anatomy.writers)
    for written in kept:
        assert (written @ v).abs().max() < 1e-5 * written.norm(dim=-1).max()


@pytest.mark.parametrize("family", CARRYING)
def test_a_direction_removed_from_every_writer_is_never_written(family):
    """Orientation and post-norm gain together: with matrices square, a wrong axis or γ for 1 + γ leaves much of it."""
    model = square(family)
    anatomy = Anatomy.of(model)
    assert any(writer.matrix(writer.weight(model)).shape[-1] == pico.HIDDEN for writer in anatomy.writers)
    v = F.normalize(torch.randn(anatomy.hidden_size, generator=torch.Generator().manual_seed(3)), dim=0)
    with residuals(model, anatomy) as before:
        run(model)
    for writer in anatomy.writers:
        gain = anatomy.post_norm_gain(model, writer)
        u = v if gain is None else F.normalize(gain * v, dim=0)
        weight = writer.weight(model)
        matrix = writer.matrix(weight.detach())
        writer.assign(weight, matrix - u[:, None] * (u @ matrix).unsqueeze(-2))
        if writer.bias:
            bias = writer.bias_of(model)
            bias.data -= (bias.data @ u)[..., None] * u
    with residuals(model, anatomy) as after:
        run(model)
    written_before = sum(((left - entered) @ v).abs().mean() for entered, left in before)
    written_after = sum(((left - entered) @ v).abs().mean() for entered, left in after)
    assert written_after < 1e-4 * written_before


@pytest.mark.parametrize("family", ALL)
def test_each_writer_alone_moves_the_residual(family):
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    with residuals(model, anatomy) as before:
        run(model)
    for writer in anatomy.writers:
        weight = writer.weight(model)
        saved = weight.detach().clone()
        weight.data.zero_()
        with residuals(model, anatomy) as after:
            run(model)
        weight.data.copy_(saved)
        assert not torch.allclose(after[writer.layer][1], before[writer.layer][1], atol=1e-4), writer.name
        for layer in range(writer.layer):
            assert torch.equal(after[layer][1], before[layer][1])


def roles(anatomy: Anatomy, layer: int) -> dict[str, str]:
    prefix = f"{anatomy.layers}.{layer}."
    return {w.name.removeprefix(prefix): w.role for w in anatomy.writers if w.layer == layer}


@pytest.mark.parametrize(
    ("family", "layer", "expected"),
    [
        ("llama", 2, {"self_attn.o_proj": "attention_out", "mlp.down_proj": "mlp_down"}),
        ("gpt2", 0, {"attn.c_proj": "attention_out", "mlp.c_proj": "mlp_down"}),
        ("gpt_neox", 1, {"attention.dense": "attention_out", "mlp.dense_4h_to_h": "mlp_down"}),
        ("mixtral", 0, {"self_attn.o_proj": "attention_out", "mlp.experts": "expert_down"}),
        ("lfm2", 0, {"conv.out_proj": "mixer_out", "feed_forward.w2": "mlp_down"}),
        ("lfm2", 1, {"self_attn.out_proj": "attention_out", "feed_forward.w2": "mlp_down"}),
        (
            "qwen3_next",
            0,
            {
                "linear_attn.out_proj": "mixer_out",
                "mlp.experts": "expert_down",
                "mlp.shared_expert.down_proj": "shared_expert_down",
            },
        ),
        (
            "falcon_h1",
            0,
            {"mamba.out_proj": "mixer_out", "self_attn.o_proj": "attention_out", "feed_forward.down_proj": "mlp_down"},
        ),
        ("nemotron_h", 0, {"mixer.out_proj": "mixer_out"}),
        ("nemotron_h", 2, {"mixer.experts": "expert_down", "mixer.shared_experts.down_proj": "shared_expert_down"}),
        # layer 2 attends with the keys and values of an earlier layer
        (
            "gemma4_text",
            2,
            {"self_attn.o_proj": "attention_out", "mlp.down_proj": "mlp_down", "per_layer_projection": "mlp_down"},
        ),
    ],
)
def test_roles(family, layer, expected):
    anatomy = Anatomy.of(pico.build(family))
    assert roles(anatomy, layer) == expected
    mixers = {"attention_out", "mixer_out"}
    assert all((w.component == "attention") == (w.role in mixers) for w in anatomy.writers)


def test_fused_experts_keep_their_layout_when_square():
    expected = {"mixtral": (1, None), "gpt_oss": (2, "down_proj_bias"), "llama4_text": (2, None)}
    for family, (axis, bias) in expected.items():
        experts = [w for w in Anatomy.of(square(family)).writers if w.role == "expert_down"]
        assert experts
        for writer in experts:
            assert writer.shape == (4, pico.HIDDEN, pico.HIDDEN)
            assert (writer.out_axis, writer.bias, writer.experts, writer.parameter) == (axis, bias, 4, "down_proj")


def test_matrix_is_a_view_in_canonical_orientation():
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    writer = Writer("m", 0, "mlp", "expert_down", "w", None, 2, 2, None, (2, 3, 4), 24)
    assert writer.d_out == 4
    assert torch.equal(writer.matrix(tensor, 1), tensor[1].T)
    assert writer.matrix(tensor).shape == (2, 4, 3)
    writer.assign(tensor, torch.ones(4, 3), expert=0)
    assert bool((tensor[0] == 1).all())
    assert torch.equal(tensor[1], torch.arange(12.0, 24).reshape(3, 4))
    conv = Writer("m", 0, "mlp", "mlp_down", "weight", "bias", 1, None, None, (3, 4), 12)
    assert conv.matrix(torch.zeros(3, 4)).shape == (4, 3)


def test_post_norms_are_found_where_the_family_has_them():
    expected = {
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "llama": (None, None),
        "gpt_neox": (None, None),
    }
    for family, names in expected.items():
        anatomy = Anatomy.of(pico.build(family))
        for writer, name in zip(anatomy.writers[:2], names, strict=True):
            assert writer.post_norm == (name and f"{anatomy.layers}.0.{name}")


@pytest.mark.parametrize(
    ("family", "offset"), [("gemma2", 1.0), ("gemma3_text", 1.0), ("olmo2", 0.0), ("gemma4_text", 0.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_post_norm_gain_is_measured(family, offset, dtype):
    model = pico.build(family).to(dtype)
    anatomy = Anatomy.of(model)
    for writer in anatomy.writers:
        gamma = model.get_submodule(writer.post_norm).weight.detach().float()
        torch.testing.assert_close(anatomy.post_norm_gain(model, writer), gamma + offset, rtol=1e-4, atol=1e-5)


def test_post_norms_in_a_row_are_all_told():
    anatomy = Anatomy.of(pico.build("gemma4_moe"))
    dense = anatomy.writer("model.layers.0.mlp.down_proj")
    assert dense.post_norm == "model.layers.0.post_feedforward_layernorm_1"
    assert dense.further_norms == ("model.layers.0.post_feedforward_layernorm",)


def test_the_vision_tower_is_never_touched():
    deep = {**pico.config("gemma3").to_dict()["vision_config"], "num_hidden_layers": 7}
    config = pico.config("gemma3")
    config.vision_config = type(config.vision_config)(**deep)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config).eval()
    pico.randomise(model, 0)
    anatomy = Anatomy.of(model)
    assert (anatomy.layers, anatomy.n_layers) == ("model.language_model.layers", pico.LAYERS)
    assert all(writer.name.startswith("model.language_model.layers.") for writer in anatomy.writers)
    assert len(anatomy.writers) == 2 * pico.LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3_next", "gemma4_text"])
def test_the_model_is_left_as_it_was(family):
    model = pico.build(family).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Anatomy.of(model)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ALL)
def test_the_same_anatomy_in_bfloat16_and_without_weights(family):
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    assert Anatomy.of(pico.build(family).to(torch.bfloat16)) == anatomy
    assert Anatomy.of(model.to("meta")) == anatomy


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "mixtral", "gemma2"])
def test_the_same_anatomy_of_an_offloaded_model(family, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    gains = [anatomy.post_norm_gain(model, writer) for writer in anatomy.writers]
    offloaded = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.device.type == "meta" for p in offloaded.parameters())
    assert Anatomy.of(offloaded) == anatomy
    for writer, gain in zip(anatomy.writers, gains, strict=True):
        if gain is not None:
            torch.testing.assert_close(anatomy.post_norm_gain(offloaded, writer), gain)


def test_a_gain_is_refused_without_weights():
    model = pico.build("gemma2").to("meta")
    anatomy = Anatomy.of(model)
    with pytest.raises(UsageError, match="weights in memory"):
        anatomy.post_norm_gain(model, anatomy.writers[0])


@pytest.mark.parametrize("family", ALL)
def test_the_printed_overrides_read_back(family):
    model = pico.build(family)
    anatomy = Anatomy.of(model)
    overrides = tomllib.loads(anatomy.to_toml())["edit"]["overrides"]
    assert Anatomy.of(model, overrides) == anatomy


def test_coverage_counts_writers_and_parameters():
    rows = Anatomy.of(pico.build("deepseek_v3")).coverage()
    found = [(r.layer, r.component, r.matched, r.total, r.parameters, r.tensors) for r in rows]
    attention, dense, experts = 32 * 32, 32 * 48, 4 * 32 * 16 + 32 * 16
    assert found[:4] == [
        (0, "attention", 1, 1, attention, 1),
        (0, "mlp", 1, 1, dense, 1),
        (1, "attention", 1, 1, attention, 1),
        (1, "mlp", 2, 2, experts, 5),
    ]
    assert [r.tensors for r in Anatomy.of(pico.build("gpt_oss")).coverage()][:2] == [2, 8], "biases count"


# ------------------------------------------------------------------------------- models that no library has


class Block(nn.Module):
    """A decoder layer of its own: attention by averaging, then one of several ways to write."""

    def __init__(self, kind: str, size: int = 32) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(size)
        self.mix = nn.Linear(size, size, bias=False)
        self.inner = nn.Linear(size, 24)
        self.outer = nn.Linear(24, size)
        self.raw = nn.Parameter(torch.randn(size, size) * 0.1)
        self.gate = nn.Linear(size, size)
        self.router = nn.Linear(size, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 16), nn.GELU(), nn.Linear(16, size)) for _ in range(4)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        past = self.norm(hidden).cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        hidden = hidden + self.mix(past)
        normed = self.norm(hidden)  # for "post" this is the residual itself
        if self.kind == "raw":
            return hidden + normed @ self.raw
        written = self.outer(F.gelu(self.inner(normed)))
        if self.kind == "post":
            return self.norm(self.norm(hidden) + written)
        if self.kind == "gated":
            return hidden + torch.sigmoid(self.gate(normed)) * written
        if self.kind == "experts":
            choice = self.router(normed).argmax(-1)
            written = torch.zeros_like(hidden)
            for k in range(3):  # the last expert is never reached
                written[choice == k] = self.experts[k](normed[choice == k])
        return hidden + written


class Tower(nn.Module):
    """A language model of such layers."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.sides = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
        self.head = nn.Linear(32, 64)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + sum(side(hidden) for side in self.sides)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def test_experts_that_no_token_reaches_are_found_by_their_siblings():
    anatomy = Anatomy.of(Tower("experts", "experts"))
    assert anatomy.gaps == ()
    assert [w.name for w in anatomy.writers if w.layer == 0] == [
        "blocks.0.mix",
        *(f"blocks.0.experts.{k}.2" for k in range(4)),
    ]
    assert {w.role for w in anatomy.writers} == {"attention_out", "expert_down"}


def test_a_norm_of_the_whole_residual_is_no_post_norm():
    anatomy = Anatomy.of(Tower("post", "post"))
    assert anatomy.gaps == ()
    assert [(w.name, w.post_norm) for w in anatomy.writers[:2]] == [("blocks.0.mix", None), ("blocks.0.outer", None)]


def test_what_is_written_past_all_modules_is_a_gap():
    anatomy = Anatomy.of(Tower("plain", "raw"))
    assert [(gap.layer, gap.component) for gap in anatomy.gaps] == [(1, "mlp")]
    row = next(r for r in anatomy.coverage() if (r.layer, r.component) == (1, "mlp"))
    assert (row.matched, row.total) == (0, 1)
    anatomy.require_complete(allow_partial=True)
    with pytest.raises(UsageError, match=r"Tower: .*layer 1 mlp.*--allow-partial.*edit\.overrides\.writers"):
        anatomy.require_complete()


def test_a_gated_writer_is_a_gap_and_the_printed_override_closes_it():
    model = Tower("plain", "gated")
    anatomy = Anatomy.of(model)
    assert {gap.module for gap in anatomy.gaps} == {"outer", "gate"}
    with pytest.raises(UsageError) as error:
        anatomy.require_complete()
    line = str(error.value).partition("name the module in the recipe: ")[2]
    printed = anatomy.to_toml()
    assert Anatomy.of(model, tomllib.loads(printed)["edit"]["overrides"]).gaps != (), "a gap is printed as a comment"
    entry = line.removeprefix("edit.overrides.writers.")
    assert any(row.startswith(f"# {entry}  # layer 1 mlp: outer") for row in printed.splitlines())
    healed = Anatomy.of(model, tomllib.loads(line)["edit"]["overrides"])
    assert healed.gaps == ()
    assert healed.writer("blocks.1.outer").component == "mlp"
    assert [w for w in healed.writers if w.layer == 0] == [w for w in anatomy.writers if w.layer == 0]


def test_modules_that_run_side_by_side_are_no_layers():
    anatomy = Anatomy.of(Tower("plain", "plain"))
    assert (anatomy.layers, anatomy.n_layers, anatomy.hidden_size) == ("blocks", 2, 32)


def test_complete_anatomies_pass():
    Anatomy.of(Tower("plain")).require_complete()


def test_a_model_that_cannot_be_probed_is_taken_as_described():
    model = Tower("plain", "plain")

    def broken(ids: Tensor) -> Tensor:
        raise NotImplementedError("needs an image")

    model.forward = broken
    with pytest.raises(UsageError, match=r"Tower: a forward pass over 4 tokens failed .*needs an image"):
        Anatomy.of(model)
    overrides = {
        "layers": "blocks",
        "writers": {
            "blocks.{layer}.mix": {"component": "attention", "out_axis": 0},
            "blocks.{layer}.outer": {"component": "mlp", "out_axis": 0},
        },
    }
    anatomy = Anatomy.of(model, overrides)
    assert [w.name for w in anatomy.writers] == ["blocks.0.mix", "blocks.0.outer", "blocks.1.mix", "blocks.1.outer"]
    assert anatomy.writers[1].bias == "bias"


def test_an_architecture_without_decoder_layers_is_named():
    with pytest.raises(UsageError, match="Sequential"):
        Anatomy.of(nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"writer": {}}, "unknown key 'writer'.*did you mean 'writers'"),
        ({"layers": "model.layer"}, "no list of modules 'model.layer'.*did you mean 'model.layers'"),
        ({"writers": {"model.layers.{layer}.mlp.down_proj": {"component": "mlp"}}}, "out_axis is missing"),
        ({"writers": {"a": {"component": "ffn", "out_axis": 0}}}, "component is 'ffn'.*attention, mlp"),
        ({"writers": {"a": {"component": "mlp", "out_axis": 0, "axis": 1}}}, "unknown key 'axis'"),
        (
            {"writers": {"model.layers.{layer}.mlp.down": {"component": "mlp", "out_axis": 0}}},
            r"matches no module of LlamaForCausalLM.*did you mean 'model.layers.\{layer\}.mlp.down_proj'",
        ),
        (
            {"writers": {"model.layers.{layer}.mlp.down_proj": {"component": "mlp", "out_axis": 1}}},
            "axis 1 of weight .* is not the hidden size 32",
        ),
        (
            {"writers": {"model.layers.{layer}.mlp.down_proj": {"component": "mlp", "out_axis": 0, "parameter": "w"}}},
            "has no parameter 'w'; valid: weight",
        ),
    ],
)
def test_overrides_are_checked(overrides, message):
    with pytest.raises(UsageError, match=message):
        Anatomy.of(pico.build("llama"), overrides)
