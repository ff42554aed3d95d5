"""Train the toy text encoder and transformer together, then the image-to-video sibling.

python demo/train_base.py --out FOLDER --stage latents    encode the training clips once (needs FOLDER/vae)
python demo/train_base.py --out FOLDER --stage base       resumes from FOLDER/base_state.pt
python demo/train_base.py --out FOLDER --stage i2v        starts from the trained base
python demo/train_base.py --out FOLDER --stage export --to demo    diffusers folders in bf16
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from demo.measure import read
from demo.world import (
    BACKGROUNDS,
    COLOURS,
    NEW_MOTIONS,
    NEW_SHAPES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    caption,
    draw,
    random_scene,
)

TEXT_LENGTH, LATENT_CHANNELS, LATENT_SIDE, LATENT_FRAMES = 24, 6, 16, 5
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=True,
    # The 2b has 3.0. Layout (where and whither) is decided at a signal far below the noise, and 16x16 latents of
    # flat shapes repeat that signal often, so more of the schedule has to lie there.
    snr_shift_scale=6.0,
)


def new_transformer() -> CogVideoXTransformer3DModel:
    """Heads of 64, as in the real family; AdaLN starts closed and half-gated, the output at zero."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=6,
        sample_width=LATENT_SIDE,
        sample_height=LATENT_SIDE,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=True,
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm2):  # chunks: shift, scale, gate, then the same for the text
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
            dim = norm.linear.out_features // 6
            norm.linear.bias.data[2 * dim : 3 * dim] = 0.3
            norm.linear.bias.data[5 * dim :] = 0.3
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def new_text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=160,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def write_tokenizer(folder: Path) -> T5Tokenizer:
    """A unigram vocabulary made by hand: the world's words, and single characters for everything else."""
    from tokenizers import normalizers

    words = ["a", "on", "background", "moving", "left", "right", "up", "down", "standing", "still", "big", "the", "and"]
    words += [*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *NEW_SHAPES, *NEW_MOTIONS.values(), *STYLES.values()]
    words += ["style", "video", "in", "of", "with"]
    characters = "\u2581abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()/&"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0 - 0.001 * i) for i, word in enumerate(dict.fromkeys(words))]
    pieces += [(c, -12.0 - 0.001 * i) for i, c in enumerate(characters)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    return tokenizer


def rotary(frames: int = LATENT_FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    half = LATENT_SIDE // 2
    return get_3d_rotary_pos_embed(64, ((0, 0), (half, half)), (half, half), frames)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """Mostly whole captions; sometimes less is said, or a word that means nothing yet; a tenth says nothing."""
    roll = rng.random()
    if roll < 0.10:
        return ""
    omit = (
        frozenset(rng.sample(("size", "colour", "motion", "background"), rng.choice((1, 1, 2))))
        if roll < 0.2
        else frozenset()
    )
    text = caption(scene, omit)
    return f"{text}, {rng.choice(tuple(STYLES.values()))}" if rng.random() < 0.08 else text


def make_latents(out: Path, count: int, seed: int) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(out / "vae", torch_dtype=torch.bfloat16).eval()
    rng = random.Random(seed)
    scenes, latents, firsts = [], [], []
    started = time.time()
    with torch.inference_mode():
        while len(scenes) < count:
            group = [random_scene(rng) for _ in range(16)]
            x = torch.stack([draw(s, rng) for s in group]).permute(0, 4, 1, 2, 3) * 2 - 1
            x = x.to(torch.bfloat16)
            latents.append(vae.encode(x).latent_dist.mode().permute(0, 2, 1, 3, 4))  # (B, 5, 6, 16, 16)
            firsts.append(vae.encode(x[:, :, :1]).latent_dist.mode().permute(0, 2, 1, 3, 4))
            scenes += [vars(s) for s in group]
            if len(scenes) % 512 == 0:
                print(json.dumps({"latents": len(scenes), "seconds": round(time.time() - started)}), flush=True)
    torch.save(
        {"latents": torch.cat(latents).clone(), "firsts": torch.cat(firsts).clone(), "scenes": scenes},
        out / f"latents_{seed}.pt",
    )


def load_latents(out: Path) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
    parts = [torch.load(f, weights_only=True) for f in sorted(out.glob("latents_*.pt"))]
    return (
        torch.cat([p["latents"] for p in parts]),
        torch.cat([p["firsts"] for p in parts]),
        [Scene(**s) for p in parts for s in p["scenes"]],
    )


class Trainer:
    """For the base and its sibling: Muon for the block matrices, AdamW for the rest, an average of the weights."""

    def __init__(self, transformer, text, out: Path, name: str, steps: int, lr: float) -> None:
        self.transformer, self.text, self.steps, self.name = transformer, text, steps, name
        self.file = out / f"{name}_state.pt"
        matrices = [
            p
            for n, p in transformer.named_parameters()
            if p.ndim == 2 and "transformer_blocks" in n and "norm" not in n
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in (*transformer.parameters(), *text.parameters()) if id(p) not in chosen and p.requires_grad]
        self.optimisers = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr * 0.75, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [lr, lr * 0.75]
        self.average = copy.deepcopy(transformer), copy.deepcopy(text)
        self.scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
        self.signal = self.scheduler.alphas_cumprod.float()  # float64 as built
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            transformer.load_state_dict(state["transformer"])
            text.load_state_dict(state["text"])
            self.average[0].load_state_dict(state["average"][0])
            self.average[1].load_state_dict(state["average"][1])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            self.step = state["step"]

    def save(self) -> None:
        torch.save(
            {
                "transformer": self.transformer.state_dict(),
                "text": self.text.state_dict(),
                "average": [m.state_dict() for m in self.average],
                "optimisers": [o.state_dict() for o in self.optimisers],
                "step": self.step,
            },
            self.file,
        )

    def loss(self, forward, x0, ids, t, noise, condition=None) -> torch.Tensor:
        a = self.signal[t].view(-1, 1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * x0
        states = self.text(ids)[0]
        x = noisy if condition is None else torch.cat([noisy, condition], dim=2)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.autocast("cpu", torch.bfloat16):
            predicted = forward(x, states, t, image_rotary_emb=rotary(), return_dict=False)[0]
        return (predicted.float() - velocity).square().mean((1, 2, 3, 4))

    def update(self, loss: torch.Tensor) -> None:
        progress = self.step / self.steps
        scale = min(1.0, (self.step + 1) / 150) * min(1.0, 2.2 * (1 - progress))
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * max(scale, 0.01)
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.transformer.parameters(), *self.text.parameters()], 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        decay = min(0.998, self.step / (self.step + 30))
        with torch.no_grad():
            for mean, live in zip(self.average, (self.transformer, self.text), strict=True):
                for a, p in zip(mean.parameters(), live.parameters(), strict=True):
                    a.lerp_(p, 1 - decay)
        self.step += 1


def timesteps(count: int, generator: torch.Generator, focus: float = 0.0) -> torch.Tensor:
    """Biased to high noise, where layout and motion are decided.

    `focus` is the share drawn from 400 to 800 instead: there the place is known and circle or square is not yet, so
    that is where the loss says most about shapes.
    """
    wide = 1000 * torch.rand(count, generator=generator) ** 0.7
    band = 400 + 400 * torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < focus
    return torch.where(chosen, band, wide).long().clamp(0, 999)


def train(out: Path, stage: str, steps: int, size: int, lr: float, compiled: bool, focus: float) -> None:
    torch.manual_seed(0)
    tokenizer = write_tokenizer(out / "tokenizer")
    transformer, text = new_transformer(), new_text_encoder()
    if stage == "i2v":
        base = torch.load(out / "base_state.pt", weights_only=True)["average"]
        transformer.load_state_dict(base[0])
        text.load_state_dict(base[1])
        transformer = widen(transformer)
        text.requires_grad_(False)
    trainer = Trainer(transformer, text, out, stage, steps, lr)
    latents, firsts, scenes = load_latents(out)
    held = {"latents": latents[-64:], "firsts": firsts[-64:], "scenes": scenes[-64:]}
    generator, rng = torch.Generator().manual_seed(trainer.step), random.Random(trainer.step)
    forward = torch.compile(transformer) if compiled else transformer
    started, recent = time.time(), []

    def encode(prompts: list[str]) -> torch.Tensor:
        return tokenizer(
            prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    def condition_of(first: torch.Tensor) -> torch.Tensor | None:
        if stage != "i2v":
            return None
        first = first.float()
        return torch.cat([first, torch.zeros(len(first), LATENT_FRAMES - 1, *first.shape[2:])], dim=1)

    def validation() -> float:
        fixed = torch.Generator().manual_seed(99)
        x0 = held["latents"].float()
        noise = torch.randn(x0.shape, generator=fixed)
        t = torch.linspace(20, 999, len(x0)).long()
        live = trainer.transformer, trainer.text
        trainer.transformer, trainer.text = trainer.average
        with torch.no_grad():
            prompts = [words(s, None) for s in held["scenes"]]
            value = (
                trainer.loss(trainer.transformer, x0, encode(prompts), t, noise, condition_of(held["firsts"]))
                .mean()
                .item()
            )
        trainer.transformer, trainer.text = live
        return value

    def words(scene: Scene, chance: random.Random | None) -> str:
        if stage == "i2v":  # the subject's colour is never named: it can only come from the picture
            omit = {"colour"} | ({"background"} if chance is None or chance.random() < 0.5 else set())
            return "" if chance is not None and chance.random() < 0.1 else caption(scene, frozenset(omit))
        return caption(scene) if chance is None else training_caption(scene, chance)

    while trainer.step < steps:
        pick = torch.randint(0, len(latents) - 64, (size,), generator=generator)
        x0 = latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        ids = encode([words(scenes[i], rng) for i in pick.tolist()])
        loss = trainer.loss(
            forward, x0, ids, timesteps(size, generator, focus), noise, condition_of(firsts[pick])
        ).mean()
        trainer.update(loss)
        recent.append(loss.item())
        if trainer.step % 50 == 0:
            line = {
                "step": trainer.step,
                "seconds": round(time.time() - started),
                "loss": round(sum(recent) / len(recent), 4),
            }
            recent.clear()
            if trainer.step % 200 == 0 or trainer.step == steps:
                line["validation"] = round(validation(), 4)
                trainer.save()
            print(json.dumps(line), flush=True)
    trainer.save()


def widen(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Doubled input channels; the new ones start at zero, so the sibling starts as the base."""
    config = dict(transformer.config) | {"in_channels": 2 * LATENT_CHANNELS}
    wide = CogVideoXTransformer3DModel.from_config(config)
    state = transformer.state_dict()
    key = "patch_embed.proj.weight"  # (D, C, p, p)
    state[key] = torch.cat([state[key], torch.zeros_like(state[key])], dim=1)
    wide.load_state_dict(state)
    return wide


def export(out: Path, to: Path) -> None:
    """bf16 safetensors in diffusers layout. The sibling has its transformer alone and names the folder it shares."""
    from diffusers import CogVideoXPipeline

    state = torch.load(out / "base_state.pt", weights_only=True)["average"]
    transformer, text = new_transformer(), new_text_encoder()
    transformer.load_state_dict(state[0])
    text.load_state_dict(state[1])
    refined = out / "vae_refined"
    vae = AutoencoderKLCogVideoX.from_pretrained(
        refined if refined.exists() else out / "vae", torch_dtype=torch.bfloat16
    )
    folder = to / "cogloom-demo"
    tokenizer = write_tokenizer(out / "tokenizer")
    pipe = CogVideoXPipeline(
        tokenizer, text.bfloat16(), vae, transformer.bfloat16(), CogVideoXDDIMScheduler(**SCHEDULER)
    )
    vae.register_to_config(_name_or_path="")  # or the folder it was trained in would travel along
    pipe.save_pretrained(folder)
    if (out / "i2v_state.pt").exists():
        wide = widen(new_transformer())
        wide.load_state_dict(torch.load(out / "i2v_state.pt", weights_only=True)["average"][0])
        wide.bfloat16().save_pretrained(to / "cogloom-demo-i2v" / "transformer")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": "CogVideoXImageToVideoPipeline", "_cogloom_shares": folder.name}
        (to / "cogloom-demo-i2v" / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def preview(out: Path, count: int, steps: int = 20, guidance: float = 4.0, sheet: Path | None = None) -> dict:
    """Render held-out captions with the averaged weights and count what is right; used to follow a training."""
    from diffusers import CogVideoXPipeline

    state = torch.load(out / "base_state.pt", weights_only=True)
    transformer, text = new_transformer(), new_text_encoder()
    transformer.load_state_dict(state["average"][0])
    text.load_state_dict(state["average"][1])
    refined = out / "vae_refined"
    vae = AutoencoderKLCogVideoX.from_pretrained(
        refined if refined.exists() else out / "vae", torch_dtype=torch.float32
    )
    pipe = CogVideoXPipeline(
        write_tokenizer(out / "tokenizer"), text.eval(), vae, transformer.eval(), CogVideoXDDIMScheduler(**SCHEDULER)
    )
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(5)
    scenes = [random_scene(rng, train=False) for _ in range(count)]
    right = dict.fromkeys(("colour", "background", "shape", "size", "motion"), 0)
    rows = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, count, 8):
            group = scenes[start : start + 8]
            clips = pipe(
                [caption(s) for s in group],
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_frames=17,
                generator=torch.Generator().manual_seed(start),
                max_sequence_length=TEXT_LENGTH,
                output_type="pt",
            ).frames
            for scene, clip in zip(group, clips.float(), strict=True):
                clip = clip.permute(0, 2, 3, 1)
                seen = read(clip)
                for k in right:
                    right[k] += getattr(seen, k) == getattr(scene, k)
                rows.append(torch.cat(list(clip[::4]), 1))
    if sheet:
        from PIL import Image

        half = (len(rows) + 1) // 2
        columns = [
            torch.cat(rows[:half]),
            torch.cat(rows[half:] + [torch.zeros_like(rows[0])] * (2 * half - len(rows))),
        ]
        Image.fromarray((torch.cat(columns, 1) * 255).round().byte().numpy()).save(sheet)
    return {"step": state["step"], "captions": count} | {k: round(v / count, 3) for k, v in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("latents", "base", "i2v", "export", "preview"), required=True)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=2900)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--focus", type=float, default=0.0, help="share of timesteps drawn from 400 to 800")
    parser.add_argument("--count", type=int, default=6400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="needs a C++ compiler; measured on two cores, see README.md"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "latents":
        make_latents(args.out, args.count, args.seed)
    elif args.stage == "export":
        export(args.out, args.to)
    elif args.stage == "preview":
        print(json.dumps(preview(args.out, args.count, sheet=args.out / "preview.png")))
    else:
        train(args.out, args.stage, args.steps, args.batch, args.lr, args.compile, args.focus)


if __name__ == "__main__":
    main()
