"""omr export_drafter FOLDER OUT [--base MODEL]: a trained ReDrafter in Apple's layout, as TensorRT-LLM reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

from omr.errors import InputError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="omr export_drafter", description=__doc__)
    parser.add_argument("folder", type=Path, help="a drafter artifact, or any drafter folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--base", type=Path, help="the base model's folder; needed for drafter.head=base only")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} exists and is not an empty folder; name another")
    from omr.nn.loader import load
    from omr.nn.redrafter import fingerprint, load_redrafter

    drafter = load_redrafter(args.folder)
    if drafter.config.head == "base":
        if args.base is None:
            raise InputError(
                f"{args.folder} has drafter.head=base, which is part of its base model; give --base FOLDER"
            )
        base = load(args.base, device="cpu")
        if drafter.config.base not in ("", fingerprint(base.embed.weight)):
            raise InputError(f"{args.folder} was trained for another base model than {args.base}")
        drafter.attach(base.lm_head.weight)
    plain = drafter.to_plain()
    args.out.mkdir(parents=True, exist_ok=True)
    plain.save(args.out)
    before, after = (sum(p.numel() for p in d.parameters()) for d in (drafter, plain))
    print(f"{args.out}: {after / 1e6:.1f} M parameters" + (f", from {before / 1e6:.1f} M" if before != after else ""))
    return 0
