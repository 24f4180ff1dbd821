"""``glassformer inspect``: what a checkpoint is, without reading its tensors."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor and the parameter that it fills.")] = False,
) -> None:
    """Open a checkpoint without reading its tensors: the family, the model in full, what fills which parameter."""
    from ..weights import open

    opened = open(model)
    print(opened)
    print(_without_init(str(opened.spec)))
    if opened.family is None:
        return
    plan = opened.plan
    if tensors:
        width = max(len(f.path) for f in plan.fillings)
        for f in plan.fillings:
            print(f"{f.path:{width}}  " + "  ".join(f"{s.name} {list(s.shape)} {s.type}" for s in f.stored))
    print(f"{len(plan.fillings):,} parameters are filled, none is missing")
    for sentence in opened.assumed:
        print(f"assumed: {sentence}")
    for copy, original in plan.tied.items():
        print(f"repeats another: {copy} = {original}")
    for name, why in plan.left.items():
        print(f"left over: {name} ({why})")
    tokenizer = opened.tokenizer
    print("no tokenizer" if tokenizer is None else f"{tokenizer}{', with a chat template' if tokenizer.chat_template else ''}")


def _without_init(tree: str) -> str:
    """A printed Spec without its table of first values, which a checkpoint has no use for."""
    lines, hidden = [], -1
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        if hidden >= 0 and depth > hidden:
            continue
        hidden = depth if line.lstrip().startswith("init:") else -1
        if hidden < 0:
            lines.append(line)
    return "\n".join(lines)
