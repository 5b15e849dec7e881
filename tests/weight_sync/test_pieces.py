"""What each engine rank is sent fills its parameters as SGLang fuses, stacks and pads them, and nothing is sent twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_opd.mcore.hf_export import TensorInfo
from megatron_opd.mcore.sharding import Dimensions
from megatron_opd.sglang.client import EngineError
from megatron_opd.sglang.engine_side.opd_weights import Receiver, digest
from megatron_opd.weight_sync.native import Native
from megatron_opd.weight_sync.pieces import Piece, piece_of, unsent
from megatron_opd.weight_sync.plan import Parcel, _check_attention, buckets

HIDDEN, HEAD = 12, 3
MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


def dimensions(heads: int = 8, groups: int = 4, vocab: int = 21, experts: int = 0) -> Dimensions:
    return Dimensions(1, heads, groups, HEAD, vocab, vocab, False, experts)


def numbered(*shape: int) -> Tensor:
    """All elements differ, and none is 0."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


class _Engine:
    """What the loader uses of a model."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._parameters.items())


def filled(tensors: dict[str, Tensor], parameters: dict[str, Tensor], rank: int, tp: int, dims: Dimensions) -> list[Piece]:
    """Put into ``parameters`` what the trainer sends of ``tensors``, by the loader that runs in the server."""
    shapes = {name: list(each.shape) for name, each in parameters.items()}
    infos = [TensorInfo(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
    pieces = [piece_of(info, shapes, rank, tp, dims) for info in infos]
    kept = tuple(piece for piece in pieces if piece.nbytes)
    parcel = Parcel(tuple(tensors), kept)
    flat = torch.empty(parcel.nbytes, dtype=torch.uint8)
    for name, full in tensors.items():
        parcel.write(name, full, flat)
    for name in unsent(pieces, shapes):
        parameters[name].zero_()
    command = {
        "pieces": [
            {"name": p.tensor.name, "dtype": "float32", "shape": list(p.shape), "target": p.target, "place": p.place}
            for p in kept
        ]
    }
    Receiver(_Engine(parameters))._put(command, flat)
    return pieces


@pytest.mark.parametrize(("tp", "groups"), [(1, 4), (2, 4), (4, 4), (8, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_attention_keeps_whole_query_groups(tp: int, groups: int, kind: str) -> None:
    dims = dimensions(groups=groups)
    width = (HIDDEN,) if kind == "weight" else ()
    q, k, v = numbered(8 * HEAD, *width), 1000 + numbered(groups * HEAD, *width), 2000 + numbered(groups * HEAD, *width)
    tensors = {f"{ATTENTION}.{name}.{kind}": each for name, each in (("q_proj", q), ("k_proj", k), ("v_proj", v))}
    own = max(1, groups // tp)
    for rank in range(tp):
        fused = torch.full(((8 // tp + 2 * own) * HEAD, *width), torch.nan)
        filled(tensors, {f"{ATTENTION}.qkv_proj.{kind}": fused}, rank, tp, dims)
        heads = range(rank * 8 // tp, (rank + 1) * 8 // tp)
        mine = sorted({head * groups // 8 for head in heads})
        expected = [q.unflatten(0, (8, HEAD))[list(heads)], *(each.unflatten(0, (groups, HEAD))[mine] for each in (k, v))]
        assert torch.equal(fused, torch.cat([each.flatten(0, 1) for each in expected]))


def test_latent_attention_is_left_to_sglangs_own_ways() -> None:
    shapes = {f"{ATTENTION}.fused_qkv_a_proj_with_mqa.weight": [5, HIDDEN], f"{ATTENTION}.kv_b_proj.weight": [8, 4]}
    with pytest.raises(EngineError, match=r"latent attention.*weight_sync: native or disk"):
        _check_attention(shapes, "http://engine")


def test_projections_that_sglang_fuses_go_in_one_call() -> None:
    names = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")
    stream = [(f"{ATTENTION}.{name}.weight", torch.zeros(3, 2)) for name in names]
    trainer, first_rank = cast(Any, None), cast(Any, None)
    native = Native(trainer, first_rank, host="", backend="gloo", bucket_bytes=24, timeout=1.0)
    assert [[name.split(".")[-2] for name, _ in bucket] for bucket in native._buckets(stream)] == [[*names[:2]], [names[2]]]


@pytest.mark.parametrize(("tp", "padded"), [(1, 10), (2, 10), (2, 16), (4, 32)])
def test_padding_of_the_feed_forward_layer_is_zero(tp: int, padded: int) -> None:
    gate, up, down = numbered(10, HIDDEN), 1000 + numbered(10, HIDDEN), numbered(HIDDEN, 10)
    tensors = {f"{MLP}.gate_proj.weight": gate, f"{MLP}.up_proj.weight": up, f"{MLP}.down_proj.weight": down}
    each = padded // tp
    for rank in range(tp):
        fused, rows = torch.full((2 * each, HIDDEN), torch.nan), torch.full((HIDDEN, each), torch.nan)
        filled(tensors, {f"{MLP}.gate_up_proj.weight": fused, f"{MLP}.down_proj.weight": rows}, rank, tp, dimensions())

        def own(full: Tensor, rank: int = rank) -> Tensor:
            return torch.nn.functional.pad(full, (0, 0, 0, padded - 10))[rank * each : (rank + 1) * each]

        assert torch.equal(fused, torch.cat([own(gate), own(up)]))  # of a last rank it may be all padding
        assert torch.equal(rows, own(down.T).T)


@pytest.mark.parametrize("spread", ["each expert over the ranks", "experts of its own"])
def test_experts_are_stacked(spread: str) -> None:
    tp, experts, ffn = 2, 4, 6
    dims = dimensions(experts=experts)
    block = "model.layers.0.mlp.experts"
    names = ("gate_proj", "up_proj", "down_proj")
    shapes = ((ffn, HIDDEN), (ffn, HIDDEN), (HIDDEN, ffn))
    tensors = {
        f"{block}.{e}.{name}.weight": 1000 * (3 * e + n) + numbered(*shape)
        for e in range(experts)
        for n, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    whole = {n: torch.stack([tensors[f"{block}.{e}.{names[n]}.weight"] for e in range(experts)]) for n in range(3)}
    for rank in range(tp):
        if spread == "experts of its own":
            mine, cut = slice(rank * 2, rank * 2 + 2), slice(None)
        else:
            mine, cut = slice(None), slice(rank * 3, rank * 3 + 3)
        expected = torch.cat([whole[0][mine][:, cut], whole[1][mine][:, cut]], dim=1), whole[2][mine][:, :, cut]
        w13, w2 = (torch.full_like(each, torch.nan) for each in expected)
        filled(tensors, {f"{block}.w13_weight": w13, f"{block}.w2_weight": w2}, rank, tp, dims)
        assert torch.equal(w13, expected[0])
        assert torch.equal(w2, expected[1])


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_vocabulary_rows_and_norms(tp: int) -> None:
    rows, norm = numbered(21, HIDDEN), numbered(HIDDEN)
    tensors = {"model.embed_tokens.weight": rows, "model.norm.weight": norm}
    parts = []
    for rank in range(tp):
        own, copy = torch.full((24 // tp, HIDDEN), torch.nan), torch.full((HIDDEN,), torch.nan)
        filled(tensors, {"model.embed_tokens.weight": own, "model.norm.weight": copy}, rank, tp, dimensions())
        parts.append(own)
        assert torch.equal(copy, norm)
    assert torch.equal(torch.cat(parts), torch.nn.functional.pad(rows, (0, 0, 0, 3)))


def test_all_norms_of_a_layer_and_an_embedding_that_is_whole_on_each_rank() -> None:
    """As SGLang has Gemma-3: four norms around attention and MLP, norms of heads, one matrix for embedding and head."""
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    names = [f"model.layers.0.{norm}_layernorm.weight" for norm in norms]
    tensors = {name: 100 * number + numbered(HIDDEN) for number, name in enumerate(names)}
    tensors |= {f"{ATTENTION}.{name}.weight": 1000 * n + numbered(HEAD) for n, name in enumerate(("q_norm", "k_norm"))}
    tensors["model.embed_tokens.weight"] = numbered(21, HIDDEN)
    for rank in range(2):
        own = {name: torch.full_like(each, torch.nan) for name, each in tensors.items()}
        pieces = filled(tensors, own, rank, 2, dimensions())
        assert all(piece.target == piece.tensor.name for piece in pieces)
        assert all(torch.equal(own[name], tensors[name]) for name in tensors)


def test_stacks_of_experts_and_sinks_go_whole_to_sglangs_loader() -> None:
    """gpt-oss: transposed, its gate and up features by turns; sinks have a dtype of the attention backend."""
    experts, ffn = f"{MLP}.experts", 6
    whole = {
        f"{experts}.gate_up_proj": (4, HIDDEN, 2 * ffn),
        f"{experts}.gate_up_proj_bias": (4, 2 * ffn),
        f"{experts}.down_proj": (4, ffn, HIDDEN),
        f"{experts}.down_proj_bias": (4, HIDDEN),
        f"{ATTENTION}.sinks": (8,),
    }
    placed = {f"{ATTENTION}.o_proj.bias": (HIDDEN,), f"{MLP}.router.weight": (4, HIDDEN), f"{MLP}.router.bias": (4,)}
    engine = {
        f"{experts}.w13_weight": [4, 2 * ffn, HIDDEN],
        f"{experts}.w13_weight_bias": [4, 2 * ffn],
        f"{experts}.w2_weight": [4, HIDDEN, ffn],
        f"{experts}.w2_weight_bias": [4, HIDDEN],
        f"{ATTENTION}.sinks": [8],
        **{name: list(shape) for name, shape in placed.items()},
    }
    for name, shape in {**whole, **placed}.items():
        piece = piece_of(TensorInfo(name, torch.bfloat16, shape), engine, 0, 1, dimensions(experts=4))
        assert piece.shape == shape
        assert piece.target == (None if name in whole else name)


def strange_shapes() -> Iterator[tuple[str, tuple[int, ...], dict[str, list[int]]]]:
    yield "a parameter that the engine lacks", (HIDDEN,), {}
    yield "fewer rows than the ranks need", (21, HIDDEN), {"model.embed_tokens.weight": [5, HIDDEN]}
    yield "a transposed parameter", (21, HIDDEN), {"model.embed_tokens.weight": [HIDDEN, 24]}


@pytest.mark.parametrize(("shape", "engine"), [case[1:] for case in strange_shapes()], ids=[c[0] for c in strange_shapes()])
def test_what_fits_no_rule_goes_whole(shape: tuple[int, ...], engine: dict[str, list[int]]) -> None:
    piece = piece_of(TensorInfo("model.embed_tokens.weight", torch.float32, shape), engine, 0, 2, dimensions())
    assert piece.target is None and piece.shape == shape


def test_buckets_are_bounded() -> None:
    tensors = [TensorInfo(str(size), torch.bfloat16, (size,)) for size in (10, 20, 30, 100, 5, 5)]
    names = [[tensor.name for tensor in bucket] for bucket in buckets(tensors, 120)]
    assert names == [["10", "20", "30"], ["100"], ["5", "5"]]
    names = [[tensor.name for tensor in bucket] for bucket in buckets(tensors, 120, alone_from=60)]
    assert names == [["10", "20"], ["30"], ["100"], ["5", "5"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_digest_tells_bits_and_places(dtype: torch.dtype) -> None:
    values = (torch.randn(3000, 7, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    same, swapped, flipped = values.clone(), values.clone(), values.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped.view(torch.uint8)[5, 3] ^= 1
    assert digest(values) == digest(same) == digest(values.T.contiguous().T)
    assert digest(swapped) != digest(values) != digest(flipped)
    assert digest(swapped)[0] == digest(values)[0]  # the second sum is what tells
