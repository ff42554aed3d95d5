"""Our stack on ComfyUI's own CogVideoX. The names are checked always, against a listing of the real class; the rest
with the real core, where COMFYUI_PATH names a ComfyUI that has a CogVideoX (0.21 on) and its packages are there."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nodes.engine import native
from nodes.engine.checkpoints import part_files
from nodes.engine.errors import AdapterMismatch, StackError, WrongFamily
from nodes.engine.lora_file import Adapter, fit, write
from nodes.engine.lora_kinds import DoRA, Full, LoHa, LoKr, LoRA, Module
from nodes.engine.lora_stack import Entry, LoraStack, Steps
from nodes.engine.pristine import PristineFiles
from nodes.engine.switch import Switch
from nodes.lora import read_stack
from nodes.native import native_lora, position
from tests.engine import layouts
from tests.engine.test_checkpoints import RELEASED
from tests.engine.test_layouts import NOT_A_LORA

# Of the parameters of comfy/ldm/cogvideo/model.py (0.33), at the sizes that were released; {b} runs over the blocks.
CORE = json.loads(Path(__file__).with_name("core_cogvideox.json").read_text(encoding="utf-8"))
LIMIT = 1e-5  # relative L2; measured are 1e-7 to 9e-7
RANK = 4
LINEARS = {**dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), (64, 64))}
LINEARS |= {"ff.net.0.proj": (256, 64), "ff.net.2": (64, 256)}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    row = CORE[name]
    return {
        pattern.format(b=block): tuple(shape)
        for pattern, shape in row["parameters"].items()
        for block in (range(row["blocks"]) if "{b}" in pattern else (0,))
    }


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE)
def test_every_parameter_of_the_core_is_one_of_diffusers(name: str):
    shapes = listed(name)
    names = native.native_names(shapes)
    assert names is not None
    theirs = native.shapes_of({**DEFAULTS, **RELEASED[name][0]})
    assert {diffusers: shapes[of_core] for diffusers, of_core in names.items()} == theirs


DEFAULTS = dict(
    attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=512, text_embed_dim=4096, sample_width=90,
    sample_height=60, sample_frames=49, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=226,
)  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_shapes_are_those_of_the_real_class(name: str):
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**RELEASED[name][0])
    assert native.shapes_of(model.config) == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "names",
    [
        ["blocks.0.self_attn.q.weight", "blocks.0.norm1.linear.weight"],  # Wan has blocks, too
        ["blocks.1.norm1.linear.weight"],  # not even a first block
        ["transformer_blocks.0.norm1.linear.weight"],  # diffusers' own names
        [],
    ],
)
def test_another_model_is_told_by_its_names(names: list[str]):
    assert native.native_names(names) is None


# --- arithmetic -------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def modules(path: str) -> list[Module]:
    lora = LoRA(path, random(RANK, 6), random(8, RANK), 0.5)
    lokr = LoKr(path, (random(2, 3),), (random(4, RANK), random(RANK, 2)), 0.7, (8, 6), RANK)
    loha = LoHa(path, random(8, 2), random(2, 6), random(8, 2, seed=1), random(2, 6, seed=1), 0.9, (8, 6))
    full, rows, columns = Full(path, random(8, 6)), random(8).abs() + 1, random(6) + 2
    return [lora, loha, lokr, full, DoRA(path, lora, rows), DoRA(path, lokr, columns, True)]


@pytest.mark.parametrize("n", range(6))
def test_a_module_survives_the_way_through_tuples(n: int):
    module = modules("x")[n]
    again = native.whole(native.flat(module))
    weight = random(8, 6, seed=3)
    assert type(again) is type(module)
    assert torch.equal(again.dense(weight), module.dense(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_added_is_rounded_once_and_goes_by_the_base(dtype: torch.dtype):
    weight = random(8, 6, seed=3).to(dtype)
    parts = [(module, 0.1 * n - 0.25) for n, module in enumerate(modules("x"))]
    exact = weight.double()
    for module, factor in parts:
        exact = exact + factor * module.dense(weight.float()).double()
    got = native.add(weight.clone(), parts)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert bool(((got.double() - exact).abs() <= 0.5 * ulp + 1e-6).all())
    patched = native.add(weight * 2, parts, pristine=weight)  # by another's patch: DoRA still goes by the base
    assert bool(((patched.double() - exact - weight.double()).abs() <= ulp + 0.5 * torch.finfo(dtype).eps + 1e-6).all())


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_a_step_knows_its_place_in_the_schedule(count: int):
    sigmas = torch.linspace(14.6, 0, count + 1).tolist()
    wanted = [n / (count - 1) if n else 0.0 for n in range(count)]
    assert [position(sigma, sigmas) for sigma in sigmas[:-1]] == wanted
    assert [position(sigma * (1 + 3e-5), sigmas) for sigma in sigmas[:-1]] == wanted  # was rounded to bf16's range
    between = [position((a + b) / 2, sigmas) for a, b in itertools.pairwise(sigmas)]
    assert between == wanted  # a second-order sampler's midpoint is of the step it is in


# --- what is refused, before anything is done -------------------------------------------------------------------------


def hollow(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A MODEL as far as it is looked at before it is cloned: a network with these parameters, without numbers. It has
    no `clone`, so that a refusal that comes too late is an error of another kind."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta")))
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=root))


def stack(*entries: tuple[Path, float] | Entry) -> list[tuple[Adapter, Entry]]:
    rows = [e if isinstance(e, Entry) else Entry(str(e[0]), e[0].stem, e[1]) for e in entries]
    return read_stack(LoraStack(tuple(rows)))


def adapter(
    path: Path, layers: Mapping[str, tuple[int, int]] = LINEARS, seed: int = 0, rank: int = RANK, blocks: int = 2
):
    """As diffusers writes it, for all blocks."""
    names = {f"transformer_blocks.{b}.{name}": shape for b in range(blocks) for name, shape in layers.items()}
    made = {
        name: (random(rank, shape[1], seed=seed + 2 * n), random(shape[0], rank, seed=seed + 2 * n + 1))
        for n, (name, shape) in enumerate(names.items())
    }
    return write(path, made, 3.0, {}, torch.float32)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path):
    path = adapter(tmp_path / "small.safetensors")
    with pytest.raises(AdapterMismatch, match=r"0 of 24 tensors fit ComfyUI's CogVideoX-2b \(width 1920\).* is 64"):
        native_lora(hollow(listed("CogVideoX-2b")), stack((path, 1.0)))


def test_blocks_that_the_model_does_not_have_are_refused(tmp_path: Path):
    path = adapter(tmp_path / "small.safetensors")
    with pytest.raises(StackError, match=r"ComfyUI's CogVideoX-5b-I2V has 42 blocks, 0 to 41"):
        native_lora(hollow(listed("CogVideoX-5b-I2V")), stack(Entry(str(path), "small", blocks="40-42:1")))


@pytest.mark.parametrize("model", [object(), hollow({"blocks.0.self_attn.q.weight": (4, 4)}), hollow({})])
def test_a_model_that_is_no_cogvideox_is_refused(model: Any):
    with pytest.raises(WrongFamily, match=r"not ComfyUI's own CogVideoX .* CogVideoX Base"):
        native_lora(model, [])


def test_a_schedule_needs_a_conditioning(tmp_path: Path):
    path = adapter(tmp_path / "wide.safetensors", {"attn1.to_q": (1920, 1920)}, blocks=30)
    entries = stack(Entry(str(path), "wide", steps="0@0 1@1"))
    with pytest.raises(StackError, match=r"The weight of wide changes .* connect positive \(and negative"):
        native_lora(hollow(listed("CogVideoX-2b")), entries)


# --- the real core ----------------------------------------------------------------------------------------------------

core = pytest.mark.comfyui
EXPECTED = (
    "ignore:Already found a `peft_config`",  # PEFT, whenever a second adapter is added
    "ignore:.*torch_dtype.*:FutureWarning",
)


@pytest.fixture(scope="session")
def comfy() -> Any:
    """ComfyUI's own modules, on the CPU."""
    path = os.environ.get("COMFYUI_PATH", "")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI")
    if not Path(path, "comfy", "ldm", "cogvideo", "model.py").is_file():
        pytest.skip(f"the ComfyUI in {path} has no CogVideoX of its own; 0.21 and later have")
    from tests.comfyui.launch import put_stand_ins

    put_stand_ins()
    # At the end: its top level has a `nodes` and an `app`, too.
    sys.path.append(path)
    try:
        import_module("comfy.cli_args").args.cpu = True  # before anything asks for a GPU
        for name in ("hooks", "model_management", "model_patcher", "ops", "sample", "sd"):
            import_module(f"comfy.{name}")
    except ImportError as error:
        pytest.skip(f"a package that ComfyUI needs is not here: {error}")
    return sys.modules["comfy"]


SMALL = dict(
    num_attention_heads=1, attention_head_dim=64, num_layers=2, time_embed_dim=32, text_embed_dim=48, patch_size_t=2,
    use_rotary_positional_embeddings=True, max_text_seq_length=10,
)  # fmt: skip  # of 1.5: the core turns positions otherwise than diffusers for the first generation
TEXT = random(1, 10, 48, seed=11)
NOISE = random(1, 16, 4, 6, 8, seed=12)


@dataclass
class Bench:
    """One network with random weights, by diffusers and by ComfyUI."""

    comfy: Any
    theirs: Any  # CogVideoXTransformer3DModel
    model: Any  # ModelPatcher
    folder: Path

    def network(self, model: Any) -> Any:
        """ComfyUI's, with its patches in place."""
        self.comfy.model_management.load_models_gpu([model])
        return model.model.diffusion_model

    def seen(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():  # as ComfyUI runs its nodes
            return self.network(model)(NOISE, torch.tensor([500.0]), TEXT)

    def expected(self) -> torch.Tensor:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        grid = (NOISE.shape[3] // 2, NOISE.shape[4] // 2)
        turned = get_3d_rotary_pos_embed(
            64, None, grid, NOISE.shape[2] // 2, grid_type="slice", max_size=(48, 85)
        )  # fmt: skip
        with torch.no_grad():
            found = self.theirs(
                hidden_states=NOISE.transpose(1, 2),
                encoder_hidden_states=TEXT,
                timestep=torch.tensor([500.0]),
                image_rotary_emb=turned,
                return_dict=False,
            )[0]
        return found.transpose(1, 2)

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        """What ComfyUI's network holds, by diffusers' names."""
        own = dict(self.network(model).named_parameters())
        names = native.native_names(own)
        assert names is not None
        return {name: own[of_core].detach().clone() for name, of_core in names.items()}

    def switched(self, entries: list[tuple[Adapter, Entry]], at: float = 0.0) -> dict[str, torch.Tensor]:
        """What our own base would hold."""
        from diffusers import CogVideoXTransformer3DModel

        kept = self.folder / "transformer"
        if not kept.exists():
            self.theirs.save_pretrained(kept)
        ours: Any = CogVideoXTransformer3DModel.from_pretrained(kept)
        switch = Switch(ours.requires_grad_(False), PristineFiles(part_files(kept), torch.float32))
        switch.apply([(fit(a, switch.shapes(), "it", 64, 2, e.partial), e.strength(at)) for a, e in entries])
        return dict(ours.named_parameters())


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def native_name(name: str) -> str:
    """Diffusers' -> the core's, by the listing of the core."""
    return BACK[name]


BACK = native.native_names(listed("CogVideoX1.5-5B-I2V")) or {}


def made(comfy: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Bench:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    theirs = CogVideoXTransformer3DModel(**SMALL).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():  # else norms are ones and biases zeros
        if parameter.ndim == 1:
            parameter.add_(random(*parameter.shape, seed=len(name)))
    weights = {native_name(name): value.to(dtype).clone() for name, value in theirs.state_dict().items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    return Bench(comfy, theirs, model, folder)


@pytest.fixture
def bench(comfy: Any, tmp_path: Path) -> Iterator[Bench]:
    yield made(comfy, tmp_path)
    comfy.model_management.unload_all_models()


def three(folder: Path) -> list[tuple[Path, float]]:
    """Of other layers and ranks; no name is a part of another, which PEFT would mix up."""
    wide = {"norm1.linear": (384, 32), "attn1.to_q": (64, 64)}
    return [
        (adapter(folder / "one.safetensors"), 0.8),
        (adapter(folder / "two.safetensors", wide, 100, 2), -0.5),
        (adapter(folder / "six.safetensors", LINEARS, 200, 6), 1.3),
    ]


@core
def test_the_committed_listing_is_the_cores(comfy: Any):
    Theirs = import_module("comfy.ldm.cogvideo.model").CogVideoXTransformer3DModel
    for name, (config, _, _) in RELEASED.items():
        with torch.device("meta"):
            model = Theirs(**config, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == listed(name)


@core
@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_computes_what_diffusers_and_peft_do(bench: Bench, count: int):
    files = three(bench.folder)[:count]
    plain = bench.seen(bench.model)
    model, positive, negative = native_lora(bench.model, stack(*files))
    got = bench.seen(model)
    for path, _ in files:
        bench.theirs.load_lora_adapter(str(path), adapter_name=path.stem, use_safetensors=True)
    if files:
        bench.theirs.set_adapters([path.stem for path, _ in files], [weight for _, weight in files])
        assert apart(got, plain) > 0.05  # it is seen
    assert apart(got, bench.expected()) <= LIMIT
    assert (positive, negative) == (None, None)
    assert (model is bench.model) == (count == 0)


@core
def test_off_is_off_to_the_bit_and_the_order_does_not_show(bench: Bench):
    before = bench.weights(bench.model)
    files = three(bench.folder)
    results = [bench.weights(native_lora(bench.model, stack(*order))[0]) for order in itertools.permutations(files)]
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())
    changed = [name for name, value in before.items() if not torch.equal(value, results[0][name])]
    assert len(changed) == 2 * 7
    after = bench.weights(bench.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert bench.model.patches == {}


@core
@pytest.mark.parametrize("name", sorted({*layouts.names()} - NOT_A_LORA))
def test_every_layout_and_kind_adds_what_it_adds_to_our_own_base(bench: Bench, name: str):
    layers = {tensor.of for tensor in layouts.listing(name, "tiny", RANK).tensors.values()}
    adds = {
        path: (random(RANK, shape[1], seed=n), random(shape[0], RANK, seed=n + 50))
        for n, (path, shape) in enumerate(
            (f"transformer_blocks.{b}.{k}", s) for b in range(2) for k, s in LINEARS.items()
        )
        if path in layers
    }
    entries = stack((layouts.small(bench.folder / name, name, adds), 0.6))
    got, plain = bench.weights(native_lora(bench.model, entries)[0]), bench.weights(bench.model)
    wanted = bench.switched(entries)
    moved = {path for path in adds if not torch.equal(got[f"{path}.weight"], plain[f"{path}.weight"])}
    assert moved == adds.keys()
    assert all(apart(got[key], value) <= 1e-6 for key, value in wanted.items())
    for path, (a, b) in adds.items():
        assert apart(got[f"{path}.weight"] - plain[f"{path}.weight"], 0.6 * b @ a) <= LIMIT


def dora(path: Path, spelt: str) -> Path:
    """Of every linear layer of the blocks; magnitudes by row as PEFT writes them, or by column as LyCORIS."""
    parts: dict[str, torch.Tensor] = {}
    for n, (block, (name, shape)) in enumerate(itertools.product(range(2), LINEARS.items())):
        layer = f"transformer_blocks.{block}.{name}"
        if spelt == "PEFT":
            stem, sides = f"transformer.{layer}", ("lora_A", "lora_B")
            parts[f"{stem}.lora_magnitude_vector"] = random(shape[0], seed=n) + 2
        else:
            stem, sides = f"lora_unet_{layer.replace('.', '_')}", ("lora_down", "lora_up")
            parts[f"{stem}.dora_scale"] = random(1, shape[1], seed=n) + 2
        parts[f"{stem}.{sides[0]}.weight"] = random(RANK, shape[1], seed=n + 50)
        parts[f"{stem}.{sides[1]}.weight"] = random(shape[0], RANK, seed=n + 90)
    save_file(parts, path)
    return path


@core
@pytest.mark.parametrize("spelt", ["PEFT", "LyCORIS"])
def test_dora_is_what_it_is_on_our_own_base(bench: Bench, spelt: str):
    entries = stack((dora(bench.folder / "it.safetensors", spelt), 0.6), *three(bench.folder))
    assert entries[0][0].kind == "dora"
    got, wanted = bench.weights(native_lora(bench.model, entries)[0]), bench.switched(entries)
    assert all(apart(got[key], value) <= 1e-6 for key, value in wanted.items())


@core
def test_blocks_and_partial_use(bench: Bench):
    path = adapter(bench.folder / "deep.safetensors", blocks=3)  # one block more than the model has
    with pytest.raises(AdapterMismatch, match="no such layer"):
        native_lora(bench.model, stack((path, 1.0)))
    entries = stack(Entry(str(path), "deep", 0.7, blocks="0.attn:0.5,1.ff:2", partial=True))
    got, plain, wanted = (
        bench.weights(native_lora(bench.model, entries)[0]),
        bench.weights(bench.model),
        bench.switched(entries),
    )
    moved = {name for name, value in plain.items() if not torch.equal(value, got[name])}
    assert {name.rsplit(".", 2)[0].split(".to_")[0] for name in moved} == {
        "transformer_blocks.0.attn1", "transformer_blocks.1.ff.net.0", "transformer_blocks.1.ff.net",
    }  # fmt: skip
    assert all(apart(got[name], value) <= 1e-6 for name, value in wanted.items())


@core
def test_a_model_in_bf16_is_rounded_once(comfy: Any, tmp_path: Path):
    bench = made(comfy, tmp_path, torch.bfloat16)
    plain = bench.weights(bench.model)
    entries = stack(*three(tmp_path))
    got = bench.weights(native_lora(bench.model, entries)[0])
    assert got["proj_out.weight"].dtype == torch.bfloat16
    for name, value in plain.items():
        exact = value.double()
        for one, entry in entries:
            for module in one.modules:
                if module.name == name:
                    exact = exact + entry.weight * module.dense(value.float()).double()
        assert float((got[name].double() - exact.to(torch.bfloat16).double()).abs().max()) <= 2**-8 * float(
            exact.abs().max()
        )
        assert float((got[name] != exact.to(torch.bfloat16)).float().mean()) < 0.002  # ties, seen from float32


@core
def test_weights_that_stay_in_memory_are_patched_as_they_are_used(bench: Bench):
    """Where a model is larger than the GPU, ComfyUI asks what a patch takes, brings it there, adds it at each use."""
    model, _, _ = native_lora(bench.model, stack(*three(bench.folder)))
    wanted, plain = bench.weights(model), bench.weights(bench.model)
    for key in ("blocks.0.q.weight", "blocks.1.ff_out.weight"):
        patch = bench.comfy.model_patcher.LowVramPatch(f"diffusion_model.{key}", model.patches)
        size = patch.memory_required()
        assert size >= sum(t.nbytes for t in tensors(model.patches[f"diffusion_model.{key}"][0][1].weights)) > 0
        name = str(native.diffusers_name(key))
        assert torch.equal(patch(plain[name].clone()), wanted[name])
        patch.prepare(torch.empty(size, dtype=torch.uint8), None)
        assert torch.equal(patch(plain[name].clone()), wanted[name])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from tensors(inner)


# --- schedules --------------------------------------------------------------------------------------------------------

KEY = "transformer_blocks.0.attn1.to_q.weight"


def sampled(
    bench: Bench,
    model: Any,
    positive: Any,
    negative: Any,
    steps: int,
    cfg: float = 1.0,
    how: str = "euler",
    **more: Any,
) -> list[tuple[int, torch.Tensor]]:
    """Run ComfyUI's sampler, and tell for each pass of the network which conditioning it was and a weight as it was."""
    seen: list[tuple[int, torch.Tensor]] = []
    names = native.native_names(dict(model.model.diffusion_model.named_parameters())) or {}

    def look(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for which in kwargs["transformer_options"]["cond_or_uncond"]:
            seen.append((which, network.get_parameter(names[KEY]).detach().float().clone()))

    handle = model.model.diffusion_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        latent = torch.zeros_like(NOISE)
        with torch.inference_mode():
            bench.comfy.sample.sample(
                model,
                NOISE,
                steps,
                cfg,
                how,
                "sgm_uniform",
                positive,
                negative,
                latent,
                seed=1,
                disable_pbar=True,
                **more,
            )
    finally:
        handle.remove()
    return seen


def conditioning(sign: float = 1.0) -> list[Any]:
    return [[sign * TEXT, {}]]


def factor(now: torch.Tensor, plain: torch.Tensor, whole: torch.Tensor) -> float:
    """How much of a whole difference is there."""
    full = (whole - plain).double()
    return float(((now.double() - plain.double()) * full).sum() / (full * full).sum())


@core
@pytest.mark.parametrize("text", ["0@0 1@0.3 1@0.7 0.2@1", "held 1@0.4", "-1@0 2@1"])
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_each_step_has_the_weight_of_the_schedule(bench: Bench, text: str, steps: int):
    path = adapter(bench.folder / "it.safetensors")
    plain = bench.weights(bench.model)
    full = bench.weights(native_lora(bench.model, stack((path, 0.8)))[0])
    entries = stack(Entry(str(path), "it", 0.8, steps=text))
    model, positive, negative = native_lora(bench.model, entries, conditioning(), conditioning(-1))
    for _ in range(2):  # the second run begins at the beginning
        seen = sampled(bench, model, positive, negative, steps, cfg=3.0)
        for which in (0, 1):  # both have it: the guided direction would otherwise be the adapter's
            got = [factor(now, plain[KEY], full[KEY]) for cond, now in seen if cond == which]
            assert got == pytest.approx(Steps.parse(text).over(steps), abs=1e-5)
    after = bench.weights(bench.model)
    assert all(torch.equal(after[name], value) for name, value in plain.items())


@core
def test_schedules_stack_with_each_other_and_with_what_is_constant(bench: Bench):
    (one, _), (two, _), (six, _) = three(bench.folder)
    rows = dora(bench.folder / "rows.safetensors", "PEFT")
    entries = stack(
        Entry(str(one), "one", 0.5, steps="0.6@0"),  # a factor that never changes
        Entry(str(two), "two", 1.0, steps="0@0 1@1"),
        Entry(str(six), "six", -0.7, steps="1@0 0@1", blocks="0:0.5,1:1"),
        Entry(str(rows), "rows", 0.9, steps="0@0 1@1"),  # goes by the base, whatever else is added
    )
    model, positive, _ = native_lora(bench.model, entries, conditioning())
    assert len(positive[0][1]["hooks"].hooks) == 2
    seen = sampled(bench, model, positive, conditioning(-1), 5)
    for n, (_, now) in enumerate(seen):
        assert apart(now, bench.switched(entries, n / 4)[KEY]) <= LIMIT
    assert len(seen) == 5


@core
def test_a_part_of_the_steps_is_a_schedule_of_its_own_and_a_midpoint_is_of_its_step(bench: Bench):
    path = adapter(bench.folder / "it.safetensors")
    plain = bench.weights(bench.model)[KEY]
    full = bench.weights(native_lora(bench.model, stack((path, 1.0)))[0])[KEY]
    model, positive, _ = native_lora(bench.model, stack(Entry(str(path), "it", steps="0@0 1@1")), conditioning())
    part = sampled(bench, model, positive, conditioning(-1), 10, start_step=5, last_step=10)
    assert [factor(now, plain, full) for _, now in part] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-5)
    twice = sampled(bench, model, positive, conditioning(-1), 3, how="dpm_2")
    assert [factor(now, plain, full) for _, now in twice] == pytest.approx([0, 0, 0.5, 0.5, 1], abs=1e-5)


@core
def test_hooks_that_are_there_already_stay(bench: Bench):
    path = adapter(bench.folder / "it.safetensors")
    entries = stack(Entry(str(path), "it", steps="0@0 1@1"))
    once = native_lora(bench.model, entries, conditioning())
    twice = native_lora(once[0], entries, once[1])
    assert [len(given[1][0][1]["hooks"].hooks) for given in (once, twice)] == [1, 2]
    assert "hooks" not in conditioning()[0][1]
