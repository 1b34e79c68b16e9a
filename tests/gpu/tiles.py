"""The MoE layer of gpt-oss in OpenAI's Triton kernels, by the tile that they run with, under masks and rewritten: which is the fastest?

    python -m tests.gpu.tiles INTO.json [--experts 32 --keeps 24,16 --rows 16,32 --skews 0,1 --masked-only]

`triton_kernels` on PYTHONPATH is measured: 3.5, as vLLM 0.26 has it, or 3.6, as SGLang 0.5.17 has it. One layer of random MXFP4 weights,
both matrix products as the engines call them, in a CUDA graph.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from triton_kernels import matmul_ogs as ogs
from triton_kernels import topk as topk_module
from triton_kernels.matmul_ogs_details import opt_flags
from triton_kernels.numerics import InFlexData
from triton_kernels.swiglu import swiglu_fn
from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
from triton_kernels.tensor_details import layout

WIDTH, INNER, TOP_K = 2880, 2880, 4
TILES = (16, 32, 64, 128)
IN_GRAPH, ROUTINGS, REPLAYS = 24, 8, 5
OLD = hasattr(ogs, "reduce_grouped")
"""Whether this is triton_kernels 3.5."""

_block_m: list[int] = []


def _watched(original: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        flags = original(*args, **kwargs)
        _block_m.append(flags.block_m)
        return flags

    return make


ogs.make_opt_flags = _watched(ogs.make_opt_flags)


def packed(experts: int, out: int, inner: int) -> tuple[Any, Any]:
    """Random weights [experts, inner, out] in MXFP4, laid out as both engines do, and their precision."""
    values = torch.randint(0, 256, (experts, out, inner // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 122, (experts, out, inner // 32), dtype=torch.uint8, device="cuda")
    if OLD:
        scales = torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4))
    value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    weight = convert_layout(wrap_torch_tensor(values.transpose(-2, -1), dtype=FP4), value_layout, **value_options)
    scale = convert_layout(wrap_torch_tensor(scales.transpose(-2, -1)), scale_layout, **scale_options)
    return weight, ogs.PrecisionConfig(weight_scale=scale, flex_ctx=ogs.FlexCtx(rhs_data=InFlexData()))


def routing(logits: torch.Tensor) -> tuple[Any, Any, Any]:
    """As each engine makes it of a layer's logits."""
    if OLD:
        from triton_kernels.routing import routing as routed

        return tuple(routed(logits, TOP_K))
    from triton_kernels.tensor import make_ragged_tensor_metadata

    sparse = topk_module.topk(logits, TOP_K, apply_softmax=True)
    dispatch, combine = sparse.mask_metadata.row_sorted_indx, sparse.mask_metadata.col_sorted_indx
    ragged = make_ragged_tensor_metadata(sparse.mask_metadata.col_sum, dispatch.shape[0])
    data = ogs.RoutingData(sparse.vals.flatten()[combine], ragged.slice_sizes, logits.shape[-1], TOP_K, ragged)
    return data, ogs.GatherIndx(combine, dispatch), ogs.ScatterIndx(dispatch, combine)


class Layer:
    """One MoE layer with this many experts."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.w1, self.p1 = packed(experts, 2 * INNER, WIDTH)
        self.w2, self.p2 = packed(experts, WIDTH, INNER)
        self.b1 = torch.randn(experts, 2 * INNER, device="cuda")
        self.b2 = torch.randn(experts, WIDTH, device="cuda")
        if OLD:
            self.activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2)
        else:
            self.activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.702, 7.0))

    def run(self, x: torch.Tensor, routed: tuple[Any, Any, Any]) -> torch.Tensor:
        """Both products."""
        data, gather, scatter = routed
        rows = x.shape[0]
        inner = torch.empty(1, rows * TOP_K, INNER, device="cuda", dtype=x.dtype)
        out = torch.empty(1, rows, WIDTH, device="cuda", dtype=x.dtype)
        ogs.matmul_ogs(
            x, self.w1, self.b1, data, gather_indx=gather, precision_config=self.p1, fused_activation=self.activation, y=inner
        )  # fmt: skip
        ogs.matmul_ogs(
            inner.view(rows * TOP_K, INNER), self.w2, self.b2, data, scatter_indx=scatter, precision_config=self.p2,
            gammas=data.gate_scal, y=out,
        )  # fmt: skip
        return out


def told(tile: int) -> int:
    """Tokens of an expert that make the kernels choose a tile: 3.6 doubles them, up to 64."""
    return tile if OLD or tile == 128 else tile // 2


def measure(layer: Layer, keep: int, rows: int, skew: float, generator: torch.Generator) -> dict[str, Any]:
    """Microseconds of the layer for each tile, which the kernels choose themselves, and whether outputs have the bits of the first."""
    logits = torch.randn(ROUTINGS, rows, layer.experts, generator=generator)
    logits += skew * torch.randn(layer.experts, generator=generator)
    logits[..., torch.randperm(layer.experts, generator=generator)[keep:]] = float("-inf")
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Any] = {"experts": layer.experts, "keep": keep, "rows": rows, "skew": skew, "us": {}, "equal": {}}
    first = None
    for tile in (None, *TILES):
        routed = [routing(one.to("cuda", torch.bfloat16)) for one in logits]
        for data, _, _ in routed:
            data.expected_tokens_per_expt = None if tile is None else told(tile)
        _block_m.clear()
        output = layer.run(x, routed[0]).clone()
        assert len(set(_block_m)) == 1
        if tile is None:
            found["own"] = _block_m[0]
            continue
        assert _block_m[0] == tile, f"told {tile}, chose {_block_m[0]}"
        first = output if first is None else first
        found["equal"][str(tile)] = torch.equal(output, first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(IN_GRAPH):
                layer.run(x, routed[number % ROUTINGS])
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / IN_GRAPH)
        found["us"][str(tile)] = round(statistics.median(times), 2)
    return found


def write(out: Path, found: list[dict[str, Any]]) -> None:
    """Put rows into a file, in place of those of the same shapes by the same kernels; one line a row."""
    document = json.loads(out.read_text()) if out.exists() else {}
    kernels = "3.5" if OLD else "3.6"
    rows = {shape(row): row for row in [*document.get(kernels, {}).get("rows", []), *found]}
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat(), "top_k": TOP_K}
    document[kernels] = {**about, "rows": list(rows.values())}
    out.write_text(text_of(document))


def shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("experts", "keep", "rows", "skew"))


def text_of(document: dict[str, Any]) -> str:
    """The file's text."""
    parts = []
    for kernels, part in document.items():
        about = json.dumps({name: value for name, value in part.items() if name != "rows"})
        rows = ",\n".join(f"  {json.dumps(row)}" for row in part["rows"])
        parts.append(f'{json.dumps(kernels)}: {about[:-1]}, "rows": [\n{rows}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--keeps", default="24,16,32,8")
    parser.add_argument("--rows", default="16,32,48,64,96,128,192,256,512")
    parser.add_argument("--skews", default="0,1")
    parser.add_argument("--masked-only", action="store_true", help="no rewritten layers")
    arguments = parser.parse_args()
    opt_flags.update_opt_flags_constraints({"split_k": 1})  # as both engines do on Hopper
    torch.manual_seed(0)
    generator, began, found = torch.Generator().manual_seed(0), time.monotonic(), []
    keeps = [int(text) for text in arguments.keeps.split(",")]
    rewritten = [] if arguments.masked_only else [keep for keep in keeps if keep < arguments.experts]
    for experts, of_this in [(arguments.experts, keeps), *((keep, [keep]) for keep in rewritten)]:
        layer = Layer(experts)
        for keep in of_this:
            for rows in map(int, arguments.rows.split(",")):
                for skew in map(float, arguments.skews.split(",")):
                    found.append(measure(layer, keep, rows, skew, generator))
            print(f"{time.monotonic() - began:.0f} s: {experts} experts, {keep} kept", flush=True)
            write(arguments.out, found)
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
