"""Fit the linear map from a base's latents to RGB that its previews use, over many clips instead of the first one.

python demo/fit_preview.py                                  the embedded base, on painted clips; ships beside its VAE
python demo/fit_preview.py --base CogVideoX-5b --clips DIR  any base, on your own clips; kept in the cache folder
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo.world import draw, wide_scene
from nodes.engine import preview
from nodes.engine.checkpoints import DEMO, fingerprint
from nodes.engine.denoise import encode_video
from nodes.engine.errors import CogLoomError
from nodes.engine.pipeline import bases
from nodes.engine.video import SUFFIXES, read_video
from nodes.host import LocalHost
from nodes.model import choose_base


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEMO)
    parser.add_argument("--clips", type=Path, help="a folder of videos; default: painted clips")
    parser.add_argument("--count", type=int, default=48)
    args = parser.parse_args()
    host, rng = LocalHost(), random.Random(0)
    latents, frames = [], []
    try:
        base = choose_base(host, args.base)
        files = [f for f in sorted(args.clips.iterdir()) if f.suffix.lower() in SUFFIXES] if args.clips else []
        if args.clips and not files:
            parser.error(f"{args.clips} holds no videos ({', '.join(SUFFIXES)})")
        with bases.session(base) as session:
            for number in range(args.count if not files else min(args.count, len(files))):
                clip = read_video(files[number])[0] if files else draw(wide_scene(rng), rng)
                clip = clip[: (len(clip) - 1) // 8 * 8 + 1]
                unit = session.resident.checkpoint.spatial * session.resident.checkpoint.patch
                clip = clip[:, : clip.shape[1] // unit * unit, : clip.shape[2] // unit * unit]
                z = encode_video(session, clip)[0].float().cpu()
                latents.append(z[1:])  # the first latent stands for one frame, the others for four: fit the many
                frames.append(clip[1:])
    except (CogLoomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # `fit` takes one still and then groups of frames: the second clip's first latent frame is as good as any.
    z, x = torch.cat(latents), torch.cat(frames)
    per = len(x) // len(z)
    factors = preview.fit(torch.cat([z[:1], z]), torch.cat([x[:per].mean(0, keepdim=True), x]))
    shown = preview.to_rgb(z, factors).float() / 255
    small = torch.nn.functional.adaptive_avg_pool2d(x.unflatten(0, (-1, per)).mean(1).permute(0, 3, 1, 2), z.shape[2:])
    error = (shown - small.permute(0, 2, 3, 1)).abs().mean().item()
    folder = base.checkpoint().part("vae")
    if args.base == DEMO:
        preview.write(factors, folder / preview.FILE)
    else:
        preview.keep(factors, fingerprint(folder), host.cache_folder)
    print(f"{len(z)} latent frames, mean error {error:.3f} of 1")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
