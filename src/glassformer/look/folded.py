"""A second model that computes the same function with plainer matrices.

    norm         y = w * n(x) + b, then W y + c      ──►   n(x), then (W diag(w)) n(x) + (c + W b)
    what writes  x + W_out z, read by LayerNorms     ──►   the mean over the stream's features taken out of W_out
    read-out     soft-max(W_U h)                     ──►   the mean over the vocabulary taken out of W_U
    value bias   sum_s a_ts (v_s + b_V), sum a = 1   ──►   b_V = 0, b_O + b_V W_O

Nothing is written into the model that is asked: what changes is made anew, what does not is shared, and the Spec says what has become
different (biases where there were none, a read-out of its own where it was tied).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel
from glassformer.parts.attention import AttentionLayer, CrossAttentionLayer
from glassformer.parts.embed import LiftSum, LiftTokens
from glassformer.parts.experts import Experts, ExpertsLayer
from glassformer.parts.feedforward import GatedLayer, PlainLayer
from glassformer.parts.kernels import Softmax
from glassformer.parts.latent import LatentAttentionLayer
from glassformer.parts.norm import DynamicTanhLayer, LayerNorm, LayerNormLayer, NoNorm, NoNormLayer, RMSNormLayer
from glassformer.parts.packed import Packed
from glassformer.parts.readout import LanguageModel, Tagger
from glassformer.parts.wiring import Parallel, PostNorm, PreNorm, ReorderedNorm, Sandwich


def fold(model: Any, *, norms: bool, writing: bool, readout: bool, value_bias: bool) -> Any:
    """The other model, frozen. Raises :class:`InputError` where one of the steps would change the function."""
    stack: TransformerModel = model.decoder if isinstance(model, EncoderDecoderModel) else model
    work = _Work(stack)
    work.check_dense()
    if norms:
        work.fold_norms()
    if value_bias:
        work.fold_value_biases()
    if writing:
        work.centre_writing()
    if readout:
        work.centre_readout()
    return work.built(model)


def exact(stack: TransformerModel) -> dict[str, bool]:
    """Which of the four steps leave the function of this model as it is."""
    found = {}
    for name in ("fold_norms", "fold_value_bias", "centre_writing", "centre_readout"):
        try:
            work = _Work(stack)
            work.check_dense()
            getattr(work, f"check_{name}")()
            found[name] = True
        except InputError:
            found[name] = False
    return found


class _Work:
    """The Spec and the tensors of the model in the making; ``state`` begins as the very tensors of the old one."""

    def __init__(self, stack: TransformerModel):
        self.stack, self.spec = stack, stack.spec
        self.blocks: list[Any] = list(stack.spec.blocks)
        self.state: dict[str, Tensor] = {n: t.detach() for n, t in stack.state_dict().items()}
        self.embed_changed = False

    # Norms

    def check_dense(self) -> None:
        if any(isinstance(m, Packed) or hasattr(getattr(m, "weight", None), "tensor_data_names") for m in self.stack.modules()):
            raise InputError("This model holds its matrices in few bits, where nothing can be folded exactly: load it unpacked, or read the plain view.")

    def check_fold_norms(self) -> None:
        for i, block in enumerate(self.blocks):
            if isinstance(block.wiring, PostNorm | ReorderedNorm):
                where = "on the stream itself" if isinstance(block.wiring, PostNorm) else "on what is added to the stream"
                raise InputError(
                    f"fold_norms puts a norm's weight into the matrices that read it, but the norms of block {i} stand {where} "
                    f"({type(block.wiring).__name__}), where no matrix alone follows: read the plain view."
                )
            if not isinstance(block.wiring, PreNorm | Parallel | Sandwich):
                raise InputError(f"fold_norms knows where the norms of {type(block.wiring).__name__} stand no better than you do: read the plain view.")
        for path, norm, readers in self.norms():
            if not isinstance(norm, LayerNormLayer | RMSNormLayer | DynamicTanhLayer):
                raise InputError(f"fold_norms knows LayerNorm, RMSNorm and DynamicTanh, but {path} is a {type(norm).__name__}: read the plain view.")
            if self.bias_of(path) is not None and any(r.endswith(".attn.q") for r in readers):
                raise InputError(f"{path} has a bias, but the queries of LatentAttention without q_lora_rank have none to take it: read the plain view.")

    def norms(self) -> list[tuple[str, Any, list[str]]]:
        """Norms whose output goes into matrices and nowhere else: path, module, the paths of those matrices."""
        found: dict[str, tuple[Any, list[str]]] = {}
        for i, block in enumerate(self.stack.blocks):
            for step in block.steps:  # type: ignore[union-attr]
                name, before = step[0], step[1]
                if before and not isinstance(getattr(block, before), NoNormLayer):
                    path = f"blocks.{i}.{before}"
                    found.setdefault(path, (getattr(block, before), []))[1].extend(f"blocks.{i}.{name}.{r}" for r in _readers(getattr(block, name)))
        last = self.readers_of_final()
        if last and not isinstance(self.stack.final_norm, NoNormLayer):
            found["final_norm"] = (self.stack.final_norm, last)
        return [(path, norm, readers) for path, (norm, readers) in found.items()]

    def readers_of_final(self) -> list[str]:
        """What reads the last stream: nothing where the read-out has no matrix, or pools before it."""
        spec = self.spec.readout
        if isinstance(spec, LanguageModel | Tagger) and spec.transform is not None:
            return ["readout.transform.linear"] if hasattr(self.stack.readout.transform, "linear") else []
        if isinstance(spec, LanguageModel):
            return ["readout"]
        return ["readout.linear"] if isinstance(spec, Tagger) else []

    def bias_of(self, path: str) -> Tensor | None:
        """A norm's bias, where it has one that does anything."""
        bias = self.state.get(f"{path}.bias")
        return bias if bias is not None and bool((bias != 0).any()) else None

    def fold_norms(self) -> None:
        self.check_fold_norms()
        for path, norm, readers in self.norms():
            weight, bias = self.state[f"{path}.weight"].double(), self.bias_of(path)
            weight = weight + norm.offset if isinstance(norm, RMSNormLayer) else weight
            for reader in readers:
                self.absorb(reader, weight, None if bias is None else bias.double(), isinstance(norm, LayerNormLayer))
            for name in ("weight", "bias"):
                if f"{path}.{name}" in self.state:
                    self.state[f"{path}.{name}"] = torch.full_like(self.state[f"{path}.{name}"], norm.constants[name])

    def absorb(self, reader: str, weight: Tensor, bias: Tensor | None, centred: bool) -> None:
        """Norm weight and bias into one matrix; ``centred``: what comes has mean zero, so that the matrix may have it too."""
        factor = 1.0
        if reader == "readout":
            self.untie()
            factor = float(self.stack.readout.factor)  # type: ignore[arg-type]
        name = "readout.matrix" if reader == "readout" else f"{reader}.weight"
        old = self.state[name]
        new = old.double() * weight
        self.state[name] = (new - new.mean(1, keepdim=True) if centred else new).to(old.dtype)
        if bias is None:
            return
        held = self.state.get(f"{reader}.bias")
        added = factor * (old.double() @ bias)
        self.state[f"{reader}.bias"] = (added if held is None else held.double() + added).to(old.dtype)
        self.allow_bias(reader)

    def allow_bias(self, reader: str) -> None:
        """Say in the Spec that this matrix has a bias."""
        parts = reader.split(".")
        if parts[0] == "readout":
            readout: Any = self.spec.readout
            if len(parts) > 1 and parts[1] == "transform":
                readout = readout.replace(transform=readout.transform.replace(bias=True))
            elif isinstance(readout, LanguageModel):
                readout = readout.replace(bias=True)
            self.spec = self.spec.replace(readout=readout)
            return
        i, sublayer = int(parts[1]), parts[2]
        block = self.blocks[i]
        if sublayer == "attn":
            field = "qkv_bias" if hasattr(block.attention, "qkv_bias") else "down_bias"
            block = block.replace(attention=block.attention.replace(**{field: True}))
        elif sublayer == "cross":
            block = block.replace(cross=block.cross.replace(qkv_bias=True))
        elif isinstance(ff := block.feedforward, Experts):
            if parts[3] == "router":
                ff = ff.replace(routing=ff.routing.replace(bias=True))
            elif parts[3] == "shared" and ff.shared is not None:
                ff = ff.replace(shared=ff.shared.replace(bias=True))
            else:
                ff = ff.replace(expert=ff.expert.replace(bias=True))
            block = block.replace(feedforward=ff)
        else:
            block = block.replace(feedforward=block.feedforward.replace(bias=True))
        self.blocks[i] = block

    def untie(self) -> None:
        """Give the read-out a matrix of its own."""
        if self.spec.tied:
            self.state["readout.matrix"] = self.state["embed.weight"]
            self.spec = self.spec.replace(tied=False)

    # Value biases

    def check_fold_value_bias(self) -> None:
        for i, block in enumerate(self.blocks):
            for kind in (block.attention, block.cross):
                if kind is not None and type(getattr(kind, "normaliser", Softmax())) is not Softmax:
                    raise InputError(
                        f"fold_value_bias needs attention weights that sum to 1, but the normaliser of block {i} is "
                        f"{type(getattr(kind, 'normaliser', None)).__name__}: leave it out."
                    )

    def fold_value_biases(self) -> None:
        self.check_fold_value_bias()
        for i, block in enumerate(self.stack.blocks):
            for name in ("attn", "cross"):
                layer: Any = getattr(block, name, None)
                source = {AttentionLayer: "qkv", CrossAttentionLayer: "kv"}.get(type(layer))
                key = f"blocks.{i}.{name}.{source}.bias"
                if source is None or key not in self.state:
                    continue
                bias = self.state[key]
                own = bias[-layer.widths[-1] :].double()
                out = self.state[f"blocks.{i}.{name}.out.weight"].double()
                each = own.view(layer.n_kv_heads, -1).repeat_interleave(layer.n_heads // layer.n_kv_heads, 0).flatten()
                held = self.state.get(f"blocks.{i}.{name}.out.bias")
                total = out @ each
                self.state[f"blocks.{i}.{name}.out.bias"] = (total if held is None else held.double() + total).to(bias.dtype)
                self.state[key] = torch.cat([bias[: -layer.widths[-1]], torch.zeros_like(bias[-layer.widths[-1] :])])
                field = "attention" if name == "attn" else "cross"
                self.blocks[i] = self.blocks[i].replace(**{field: getattr(self.blocks[i], field).replace(out_bias=True)})

    # Centring

    def check_centre_writing(self) -> None:
        for i, block in enumerate(self.blocks):
            bare = isinstance(block.wiring, PreNorm) and block.wiring.bare
            if not isinstance(block.wiring, PreNorm | Parallel) or bare or not isinstance(block.norm, LayerNorm):
                what = f"{type(block.wiring).__name__} with {type(block.norm).__name__}" + (f", bare {', '.join(bare)}" if bare else "")
                raise InputError(
                    f"centre_writing is exact where LayerNorms alone read the stream, which take its mean away, but block {i} has {what}: leave it out."
                )
        if not isinstance(self.spec.final_norm, LayerNorm):
            raise InputError(
                f"centre_writing is exact where LayerNorms alone read the stream, but the final norm is {type(self.spec.final_norm).__name__}: leave it out."
            )
        if not isinstance(self.spec.embedding.norm, NoNorm) and not isinstance(self.spec.embedding.lift, LiftSum):
            raise InputError("centre_writing centres matrices, but what this embedding writes to the stream comes out of a norm: leave it out.")

    def centre_writing(self) -> None:
        self.check_centre_writing()
        lift = self.spec.embedding.lift
        if isinstance(lift, LiftSum):
            self.centre("embed.lift_sum", 0)
        else:
            self.untie()
            self.embed_changed = not isinstance(lift, LiftTokens)
            for name in ("embed.types", "position.table", *(("embed.weight",) if self.embed_changed else ())):
                if name in self.state:
                    self.centre(name, 1, "")
            if isinstance(lift, LiftTokens):
                self.centre("embed.lift_tokens", 0)
        for i, block in enumerate(self.stack.blocks):
            for name in block.order:  # type: ignore[union-attr]
                for writer in _writers(getattr(block, name)):
                    self.centre(f"blocks.{i}.{name}.{writer}", 0)

    def centre(self, path: str, axis: int, weight: str = ".weight") -> None:
        """Take the mean over ``axis`` out of a matrix (and, of a linear map, out of its bias)."""
        old = self.state[f"{path}{weight}"]
        self.state[f"{path}{weight}"] = (old.double() - old.double().mean(axis, keepdim=True)).to(old.dtype)
        bias = self.state.get(f"{path}.bias")
        if weight and bias is not None:
            self.state[f"{path}.bias"] = (bias.double() - bias.double().mean()).to(bias.dtype)

    def check_centre_readout(self) -> None:
        readout = self.spec.readout
        if not isinstance(readout, LanguageModel):
            raise InputError(f"centre_readout is about scores over a vocabulary, but this model ends in {type(readout).__name__}: leave it out.")
        if readout.cap is not None:
            raise InputError(f"centre_readout shifts all scores alike, which a soft-cap ({readout.cap}) on them would not keep: leave it out.")

    def centre_readout(self) -> None:
        self.check_centre_readout()
        self.untie()
        self.centre("readout.matrix", 0, "")
        bias = self.state.get("readout.bias")
        if bias is not None:
            self.state["readout.bias"] = (bias.double() - bias.double().mean()).to(bias.dtype)

    # Building

    def built(self, model: Any) -> Any:
        spec = self.spec.replace(blocks=tuple(self.blocks))
        state = self.state
        made: Any
        if isinstance(model, EncoderDecoderModel):
            whole = model.spec.replace(decoder=spec, shared=model.spec.shared and not self.embed_changed)
            with torch.device("meta"):
                made = EncoderDecoderModel(whole)
            state = {n: t.detach() for n, t in model.state_dict().items() if n.startswith("encoder.")} | {f"decoder.{n}": t for n, t in state.items()}
        else:
            cross = getattr(self.stack.blocks[0], "cross", None) if len(self.stack.blocks) else None
            with torch.device("meta"):
                made = TransformerModel(spec, None if cross is None else cross.kv.in_features)
        like = next(iter(self.state.values()))
        for name, empty in made.state_dict().items():  # biases that the Spec has allowed and nothing has filled
            if name not in state:
                state[name] = torch.zeros(empty.shape, dtype=like.dtype, device=like.device)
        made.load_state_dict(state, strict=True, assign=True)
        if isinstance(made, EncoderDecoderModel):
            made.tie()
        # Its tensors are the other model's where nothing changed: training it would train both.
        return made.requires_grad_(False).eval()


def _readers(layer: Any) -> list[str]:
    """The linear maps by which a sublayer reads the stream."""
    if isinstance(layer, AttentionLayer):
        return ["qkv"]
    if isinstance(layer, CrossAttentionLayer):
        return ["q"]
    if isinstance(layer, LatentAttentionLayer):
        return ["q" if layer.spec.q_lora_rank is None else "q_down", "kv_down"]
    if isinstance(layer, PlainLayer):
        return ["up"]
    if isinstance(layer, GatedLayer):
        return ["gate_up"]
    if isinstance(layer, ExpertsLayer):
        each = [f"experts.{e}.{r}" for e, expert in enumerate(layer.experts) for r in _readers(expert)]
        return ["router", *each, *(f"shared.{r}" for r in (_readers(layer.shared) if layer.shared is not None else ()))]
    raise InputError(f"The matrices by which {type(layer).__name__} reads the stream are not known: read the plain view.")


def _writers(layer: Any) -> list[str]:
    """The linear maps by which a sublayer writes to the stream."""
    if isinstance(layer, ExpertsLayer):
        each = [f"experts.{e}.{w}" for e, expert in enumerate(layer.experts) for w in _writers(expert)]
        return [*each, *(f"shared.{w}" for w in (_writers(layer.shared) if layer.shared is not None else ()))]
    if isinstance(layer, PlainLayer | GatedLayer):
        return ["down"]
    if hasattr(layer, "out"):
        return ["out"]
    raise InputError(f"The matrices by which {type(layer).__name__} writes to the stream are not known: read the plain view.")
